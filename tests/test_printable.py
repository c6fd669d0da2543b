"""What the command line prints: names that no terminal acts on, whatever the stream can show."""

import io
import os
import subprocess
import sys

import pytest
from test_command_line import ROOT, status_of

from qmimic_d2.cli.printable import printable, say


@pytest.mark.parametrize(
    "name, shown",
    [
        ("plain name.jpg", "plain name.jpg"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        (b"\xff\xfe.png".decode("utf-8", "surrogateescape"), r"\udcff\udcfe.png"),
        ("\x9b31m\u2028", r"\x9b31m\u2028"),
        ("数字 Ü\u3000x", "数字 Ü\u3000x"),
    ],
)
def test_a_name_on_one_line(name, shown):
    assert printable(name) == shown


def test_lines_are_kept_and_the_rest_is_escaped():
    stream = io.StringIO()
    say("a\tb\n\x1b[2J数", stream)
    assert stream.getvalue() == "a\tb\n\\x1b[2J数\n"


@pytest.mark.parametrize("encoding, shown", [("ascii", rb"\u6570 \xdc \udcff"), ("latin-1", b"\\u6570 \xdc \\udcff")])
def test_a_stream_that_cannot_show_a_character(encoding, shown):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    say("数 Ü \udcff", stream)
    assert raw.getvalue() == shown + b"\n"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, text):
        raise self._error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken"), OSError(28, "No space left"), ValueError("closed")])
def test_a_stream_that_takes_nothing_stops_no_work(error):
    say("text", Broken(error))


@pytest.mark.slow
def test_a_pipe_whose_reader_is_gone():
    code = "from qmimic_d2.cli.printable import say\nfor _ in range(20000): say('line')\n"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert command.stdout.readline() == b"line\n"
    command.stdout.close()
    assert command.wait() == 0
    assert b"Error" not in command.stderr.read()
    command.stderr.close()


def test_arguments_are_repeated_without_escapes(capsys):
    assert status_of("\x1b[31mcommand") == 2
    assert status_of("size", "--\x1b[31m") == 2
    assert "\x1b" not in capsys.readouterr().err


def test_paths_in_errors_have_no_escapes(capsys, tmp_path):
    arguments = ["--input", tmp_path, "--output", tmp_path / "out"]
    assert status_of("predict", "--model", "\x1b[31m.onnx", *arguments) == 2
    assert status_of("size", "--config-file", "\x1b[31m.yaml") == 2
    assert "\x1b" not in capsys.readouterr().err
