"""What is shown of long work: bars on a terminal, plain lines elsewhere, and the items as they were."""

import io
import os
import pty
import subprocess
import sys

import pytest
from tiny_training import ROOT

from qmimic_d2 import progress
from qmimic_d2.progress import Row, seconds_text, track

WORK = """
import sys, time
from qmimic_d2.progress import track
for number in track(range(12), "outer \\x1b[2J"):
    time.sleep(0.12)
    if number == 10:
        print("a result " + "x" * 200, flush=True)
        for _ in track(range(12), "inner"):
            time.sleep(0.12)
"""


@pytest.fixture
def often(monkeypatch):
    """Every update is shown."""
    for name in ("_SECONDS_BETWEEN_FRAMES", "_SECONDS_BETWEEN_LINES"):
        monkeypatch.setattr(progress, name, 0.0)


def test_the_items_and_their_number_stay():
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert len(track(range(7), "numbers")) == 7
    assert len(track(iter("abc"), "letters", total=3)) == 3
    assert list(track((each for each in "abc"), "letters")) == ["a", "b", "c"]


def test_plain_lines_where_there_is_no_terminal(often, capsys):
    with Row("work", 4, delay=0.0) as row:
        row.update(1, "AP 12.3")
        row.update(4, "the end\x1b[2J")
    with Row("reading", delay=0.0) as row:
        row.update(3)
    for _ in track("ab", "quick"):  # over before it is worth a line
        pass
    shown = capsys.readouterr()
    assert shown.err == "work: 1/4, AP 12.3\nwork: 4/4, the end?[2J\nreading: \n"
    assert shown.out == ""


def test_the_time_left_follows_from_the_time_taken(often, monkeypatch, capsys):
    now = [1e9]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Row("work", 10) as row:
        now[0] += 30.0
        row.update(2)
    assert capsys.readouterr().err == "work: 2/10, 2 min left\n"


def test_a_stream_that_is_closed_stops_no_work(often, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with Row("work", 2, delay=0.0) as row:
        row.update(1)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (3600.0, "60 min"), (9000.0, "2.5 h")]
)
def test_times_for_people(seconds, text):
    assert seconds_text(seconds) == text


def on_terminal(code, **variables):
    """What a terminal of 100 columns gets from Python code, in bytes."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", **variables}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while True:
            shown += os.read(ours, 65536)
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


@pytest.mark.slow
def test_bars_on_a_terminal_stand_below_what_is_printed():
    shown = on_terminal(WORK)
    assert "outer ?[2J" in shown and "\x1b[2J" not in shown  # a name cannot clear the screen
    assert "inner" in shown and "11/12" in shown and " left" in shown
    assert "a result " + "x" * 200 in shown.replace("\r\n", "\n")  # not wrapped: a user may copy it
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.slow
def test_no_bars_on_a_terminal_that_cannot_redraw():
    shown = on_terminal(WORK, TERM="dumb")
    assert "\x1b" not in shown and "a result" in shown
