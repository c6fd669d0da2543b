"""The runner of the demo and of the evidence: order, records, continuing, failure."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_training import ROOT

from qmimic_d2.cli import task_runner
from qmimic_d2.cli.task_runner import Task, run_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(task_runner, "_POLL_SECONDS", 0.02)


def appending(path, word, *more):
    """A command that appends a word and its further arguments to a file."""
    code = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '\\n')"
    return [sys.executable, "-c", code, str(path), word, *more]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_task_waits_for_its_needs_and_is_done_once(tmp_path, capsys):
    out = tmp_path / "out"
    tasks = [
        Task("second", appending(out, "second"), needs=["first"]),
        Task("first", appending(out, "first")),
    ]
    seconds = run_tasks(tasks, str(tmp_path / "records"), jobs=2, environment={})
    assert lines(out) == ["first", "second"]
    assert set(seconds) == {"first", "second"} and all(value > 0.0 for value in seconds.values())

    again = run_tasks(tasks, str(tmp_path / "records"), jobs=2, environment={})
    assert lines(out) == ["first", "second"]
    assert again == seconds
    assert "done already: first" in capsys.readouterr().out


def test_another_command_or_input_is_run_again(tmp_path):
    out, folder = tmp_path / "out", str(tmp_path / "records")
    run_tasks([Task("one", appending(out, "a"))], folder, 1, {})
    run_tasks([Task("one", appending(out, "b"))], folder, 1, {})
    run_tasks([Task("one", appending(out, "b"), inputs="changed")], folder, 1, {})
    assert lines(out) == ["a", "b", "b"]


def test_a_second_runner_in_the_folder_is_refused(tmp_path):
    folder, out = str(tmp_path / "records"), tmp_path / "out"
    nested = []

    def run_another(continues):
        with pytest.raises(SystemExit, match="another process is at work in .*records"):
            run_tasks([Task("two", appending(out, "two"))], folder, 1, {})
        run_tasks([Task("three", appending(out, "three"))], str(tmp_path / "elsewhere"), 1, {})
        nested.append(continues)

    run_tasks([Task("one", appending(out, "one"), on_start=run_another)], folder, 1, {})
    assert nested == [False] and lines(out) == ["three", "one"]
    run_tasks([Task("two", appending(out, "two"))], folder, 1, {})  # free again
    assert lines(out) == ["three", "one", "two"]


def test_failure_names_the_log_and_shows_its_end_and_the_next_run_resumes(tmp_path):
    folder = tmp_path / "records"
    flag = tmp_path / "flag"
    code = "import os, sys; print('wrong setting', sys.argv); sys.exit(not os.path.exists(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(flag), "--config-file", "x.yaml"]
    task = Task("training", command, resumes=True)
    with pytest.raises(SystemExit, match=r"training stopped with status 1; end of .*training\.log:\n.*wrong setting"):
        run_tasks([task], str(folder), 1, {})
    assert "--resume" not in (folder / "logs" / "training.log").read_text()

    flag.touch()
    seconds = run_tasks([task], str(folder), 1, {})
    assert "'--resume', '--config-file', 'x.yaml'" in (folder / "logs" / "training.log").read_text()
    record = json.loads((folder / "logs" / "training.json").read_text())
    assert record["done"] and record["seconds"] == seconds["training"]


@pytest.mark.parametrize("status", [130, 143])
def test_a_training_that_a_signal_stopped_interrupts_the_rest(tmp_path, status):
    task = Task("training", [sys.executable, "-c", f"raise SystemExit({status})"])
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task], str(tmp_path), 1, {})


def test_environment_reaches_the_command(tmp_path):
    out = tmp_path / "out"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['A_VARIABLE'])"
    task = Task("one", [sys.executable, "-c", code, str(out)])
    run_tasks([task], str(tmp_path / "records"), 1, {"A_VARIABLE": "7"})
    assert lines(out) == ["7"]


def test_shown_output_is_the_result_without_warnings(tmp_path, capfd):
    code = "import sys; print('the table'); print('a warning', file=sys.stderr)"
    task = Task("one", [sys.executable, "-c", code], shows_output=True)
    run_tasks([task], str(tmp_path / "records"), 1, {})
    shown = capfd.readouterr().out
    assert "    the table" in shown and "a warning\n" not in shown
    assert (tmp_path / "records" / "logs" / "one.log").read_text() == "a warning\n"
    again = Task("one", [sys.executable, "-c", "print('another')"], shows_output=True)
    run_tasks([again], str(tmp_path / "records"), 1, {})
    shown = capfd.readouterr().out
    assert "    another" in shown and "the table" not in shown.replace("print('the table')", "")


@pytest.fixture
def statuses(tmp_path, monkeypatch):
    """Gives the status lines of a runner, while metrics.json of its first task holds one text after the other."""

    def run(texts, following=(), jobs=1):
        shown, end = [], tmp_path / "end"

        def say(text):
            if not text.startswith("["):
                return
            if len(shown) < len(texts):
                (tmp_path / "metrics.json").write_text(texts[len(shown)])
            else:
                end.touch()
            shown.append(text.partition("] ")[2])

        monkeypatch.setattr(task_runner, "say", say)
        monkeypatch.setattr(task_runner, "_STATUS_SECONDS", 0.0)
        code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"
        first = Task("one", [sys.executable, "-c", code, str(end)], output_dir=str(tmp_path), max_iter=100)
        run_tasks([first, *following], str(tmp_path / "records"), jobs, {})
        return shown[: 1 + len(texts)]

    return run


def test_progress_of_a_training(statuses):
    progress = {
        '{"iteration": 39, "eta_seconds": 12.4}\n': " 40/100, 12 s left",
        '{"iteration": 39, "eta_se': " 0/100",  # a line that is being written
        '{"iteration": 39, "total_loss": 1.234, "eta_seconds": 600}\n': " 40/100, loss 1.23, 10 min left",
        '{"iteration": 99}\n': " 100/100, evaluating",
        '{"iteration": 100}\n': " 100/100, evaluating",  # with the figures of the last evaluation
    }
    damaged = ("{}x\n", "[]\n", '{"iteration": 1e999}\n', '{"iteration": null}\n', "[" * 100_000 + "\n")
    progress.update(dict.fromkeys(damaged, " 0/100"))
    assert statuses(list(progress)) == [f"one{each} | 0 waiting" for each in (" 0/100", *progress.values())]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"seconds": 1e309}', "[" * 100_000, "null"])
def test_a_damaged_record_counts_for_nothing(tmp_path, damaged):
    out = tmp_path / "out"
    task = Task("one", appending(out, "one"))
    run_tasks([task], str(tmp_path), 1, {})
    (tmp_path / "logs" / "one.json").write_text(damaged)
    run_tasks([task], str(tmp_path), 1, {})
    run_tasks([task], str(tmp_path), 1, {})
    assert lines(out) == ["one", "one"]


def test_a_killed_runner_takes_its_tasks_along(tmp_path):
    """The named pipe ends when the task, which holds its other end, has ended."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"import time; file = open({str(pipe)!r}, 'w'); print('started', file=file, flush=True); time.sleep(600)"
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from qmimic_d2.cli.task_runner import Task, run_tasks\n"
        f"run_tasks([Task('one', [sys.executable, '-c', {code!r}])], sys.argv[1], 1, {{}})\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "records"), str(ROOT), str(ROOT / "tools")]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with open(pipe) as file:
        assert file.readline() == "started\n"
        runner.kill()
        assert file.read() == ""
    assert runner.wait() == -signal.SIGKILL


def test_keeping_going_leaves_out_what_needs_a_failed_task(tmp_path, capsys):
    out, reasons = tmp_path / "out", []
    failing = [sys.executable, "-c", "import sys; print('ValueError: too large'); sys.exit(1)"]
    tasks = [
        Task("bad", failing, on_failure=reasons.append),
        Task("below", appending(out, "below"), needs=["bad"]),
        Task("far below", appending(out, "far below"), needs=["below"]),
        Task("good", appending(out, "good")),
    ]
    seconds = run_tasks(tasks, str(tmp_path / "records"), 1, {}, keeps_going=True)
    assert lines(out) == ["good"] and set(seconds) == {"bad", "good"}
    assert reasons == ["stopped with status 1: ValueError: too large"]
    printed = capsys.readouterr().out
    assert "not run: below needs bad\n" in printed and "not run: far below needs below\n" in printed


def test_a_killed_command_and_one_without_a_word_have_a_reason_too(tmp_path):
    reasons = []
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    tasks = [Task("killed", killed, on_failure=reasons.append)]
    run_tasks(tasks, str(tmp_path), 1, {}, keeps_going=True)
    assert reasons == ["was killed by signal 9: its log is empty"]


def test_a_result_that_cannot_be_read_is_a_failure(tmp_path):
    reasons = []

    def unreadable(seconds):
        raise KeyError("bbox")

    task = Task("one", appending(tmp_path / "out", "one"), on_success=unreadable, on_failure=reasons.append)
    run_tasks([task], str(tmp_path), 1, {}, keeps_going=True)
    assert reasons == ["KeyError: 'bbox'"]
    with pytest.raises(SystemExit, match="one KeyError: 'bbox'; end of"):
        run_tasks([task], str(tmp_path), 1, {})
    assert lines(tmp_path / "out") == ["one", "one"]


def test_a_task_is_asked_in_its_turn(tmp_path):
    out, seen = tmp_path / "out", []
    second = Task(
        "second",
        appending(out, "second"),
        needs=["first"],
        inputs=lambda: seen.append(lines(out)) or "",
        is_done=lambda: lines(out) == ["first"],
    )
    third = Task("third", appending(out, "third"), needs=["second"], is_done=lambda: "third" in lines(out))
    run_tasks([second, third, Task("first", appending(out, "first"))], str(tmp_path), 2, {})
    assert lines(out) == ["first", "third"] and seen and all(each == ["first"] for each in seen)


def test_what_its_record_calls_done_and_the_task_does_not_begins_anew(tmp_path):
    continued, seconds = [], []
    code = "import sys; print(sys.argv[1:])"
    task = Task(
        "training",
        [sys.executable, "-c", code, "--config-file", "x.yaml"],
        resumes=True,
        is_done=lambda: False,
        on_start=continued.append,
        on_success=seconds.append,
    )
    first = run_tasks([task], str(tmp_path), 1, {})
    again = run_tasks([task], str(tmp_path), 1, {})
    assert continued == [False, False]
    assert seconds == [first["training"], again["training"]]
    assert "--resume" not in (tmp_path / "logs" / "training.log").read_text()


@pytest.mark.parametrize("seconds, text", [((90.0, 150.0), "2 waiting, about 2 min"), ((0.0,), "1 waiting")])
def test_status_tells_what_is_left(statuses, seconds, text):
    quick = [sys.executable, "-c", ""]
    following = [Task(f"after {each:g}", quick, needs=["one"], expected_seconds=each) for each in seconds]
    assert statuses([], following, jobs=2) == [f"one 0/100 | {text}"]


def test_an_interruption_stops_what_runs_and_notes_its_time(tmp_path):
    ready = tmp_path / "ready"
    code = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"

    def interrupt_when_ready():
        while not ready.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    finished = []
    tasks = [
        Task("long", [sys.executable, "-c", code, str(ready)], on_success=finished.append),
        Task("next", appending(tmp_path / "out", "next"), is_done=interrupt_when_ready),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, str(tmp_path), 2, {})
    record = json.loads((tmp_path / "logs" / "long.json").read_text())
    assert not record["done"] and 0.0 < record["seconds"] < 60.0 and not finished
