"""The demo's runner: order, records, continuing, failure."""

import importlib.util
import json
import os
import sys

import pytest

_PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo", "tasks.py")


@pytest.fixture(scope="module")
def demo_tasks():
    spec = importlib.util.spec_from_file_location("demo_tasks", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_tasks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_tasks"]


def appending(path, word, *more):
    """A command that appends a word and its further arguments to a file."""
    code = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '\\n')"
    return [sys.executable, "-c", code, str(path), word, *more]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_task_waits_for_its_needs_and_is_done_once(demo_tasks, tmp_path, capsys):
    out = tmp_path / "out"
    tasks = [
        demo_tasks.Task("second", appending(out, "second"), needs=["first"]),
        demo_tasks.Task("first", appending(out, "first")),
    ]
    seconds = demo_tasks.run_tasks(tasks, str(tmp_path / "demo"), jobs=2, environment={})
    assert lines(out) == ["first", "second"]
    assert set(seconds) == {"first", "second"} and all(value > 0.0 for value in seconds.values())

    again = demo_tasks.run_tasks(tasks, str(tmp_path / "demo"), jobs=2, environment={})
    assert lines(out) == ["first", "second"]
    assert again == seconds
    assert "done already: first" in capsys.readouterr().out


def test_another_command_or_input_is_run_again(demo_tasks, tmp_path):
    out, folder = tmp_path / "out", str(tmp_path / "demo")
    demo_tasks.run_tasks([demo_tasks.Task("one", appending(out, "a"))], folder, 1, {})
    demo_tasks.run_tasks([demo_tasks.Task("one", appending(out, "b"))], folder, 1, {})
    demo_tasks.run_tasks([demo_tasks.Task("one", appending(out, "b"), inputs="changed")], folder, 1, {})
    assert lines(out) == ["a", "b", "b"]


def test_failure_names_the_log_and_shows_its_end_and_the_next_run_resumes(demo_tasks, tmp_path):
    folder = tmp_path / "demo"
    flag = tmp_path / "flag"
    code = "import os, sys; print('wrong setting', sys.argv); sys.exit(not os.path.exists(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(flag), "--config-file", "x.yaml"]
    task = demo_tasks.Task("training", command, resumes=True)
    with pytest.raises(SystemExit, match=r"training stopped with status 1; end of .*training\.log:\n.*wrong setting"):
        demo_tasks.run_tasks([task], str(folder), 1, {})
    assert "--resume" not in (folder / "logs" / "training.log").read_text()

    flag.touch()
    seconds = demo_tasks.run_tasks([task], str(folder), 1, {})
    assert "'--resume', '--config-file', 'x.yaml'" in (folder / "logs" / "training.log").read_text()
    record = json.loads((folder / "logs" / "training.json").read_text())
    assert record["done"] and record["seconds"] == seconds["training"]


@pytest.mark.parametrize("status", [130, 143])
def test_a_training_that_a_signal_stopped_interrupts_the_demo(demo_tasks, tmp_path, status):
    task = demo_tasks.Task("training", [sys.executable, "-c", f"raise SystemExit({status})"])
    with pytest.raises(KeyboardInterrupt):
        demo_tasks.run_tasks([task], str(tmp_path), 1, {})


def test_environment_reaches_the_command(demo_tasks, tmp_path):
    out = tmp_path / "out"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['A_VARIABLE'])"
    task = demo_tasks.Task("one", [sys.executable, "-c", code, str(out)])
    demo_tasks.run_tasks([task], str(tmp_path / "demo"), 1, {"A_VARIABLE": "7"})
    assert lines(out) == ["7"]


def test_shown_output_is_the_result_without_warnings(demo_tasks, tmp_path, capfd):
    code = "import sys; print('the table'); print('a warning', file=sys.stderr)"
    task = demo_tasks.Task("one", [sys.executable, "-c", code], shows_output=True)
    demo_tasks.run_tasks([task], str(tmp_path / "demo"), 1, {})
    shown = capfd.readouterr().out
    assert "    the table" in shown and "a warning\n" not in shown
    assert (tmp_path / "demo" / "logs" / "one.log").read_text() == "a warning\n"


def test_progress_of_a_training(demo_tasks, tmp_path):
    task = demo_tasks.Task("one", [], output_dir=str(tmp_path), max_iter=100)
    assert demo_tasks._progress(task) == ""
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 39, "eta_seconds": 12.4}\n')
    assert demo_tasks._progress(task) == "40/100, 12 s left"
    metrics.write_text('{"iteration": 39, "eta_se')  # a line that is being written
    assert demo_tasks._progress(task) == "0/100"
    metrics.write_text('{"iteration": 99}\n')
    assert demo_tasks._progress(task) == "evaluating"
