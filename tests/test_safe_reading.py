"""No command runs what a config file says: each is given a hostile one, and no reader of the project is unsafe."""

import ast
import io
import os
import subprocess
import sys

import pytest
from detectron2.modeling import build_model
from helpers import tiny_cfg, write_teacher
from report_runs import write_run
from test_layering import PACKAGE, ROOT
from tiny_coco import registered_coco

from qmimic_d2.__main__ import main
from qmimic_d2.engine import argument_parser, load_config
from qmimic_d2.report import collect_run

TEACHER = "MODEL.QMIMIC.TEACHER"
FOLDERS = (PACKAGE, ROOT / "tools", ROOT / "benchmarks", ROOT / "demo", ROOT / "configs")
SOURCES = [ROOT / "train_net.py", *(path for folder in FOLDERS for path in sorted(folder.rglob("*.py")))]

# Readers that run what a file says, by the last name of a call. yaml.safe_load and json.load do not.
UNSAFE = {"merge_from_file", "load_yaml_with_base", "load_cfg", "unsafe_load", "full_load", "unsafe_load_all"}
UNSAFE_OF = {("yaml", "load"), ("yaml", "load_all"), ("pickle", "load"), ("pickle", "loads"), ("LazyConfig", "load")}
# A LazyConfig is code by nature: a training with a teacher that has one runs it, and says so.
LAZY = {("qmimic_d2/modeling/mimic/teacher_config.py", "LazyConfig.load")}


def unsafe_calls(source):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in UNSAFE or (owner, node.attr) in UNSAFE_OF:
                yield source.relative_to(ROOT).as_posix(), f"{owner}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_unsafe":
            yield source.relative_to(ROOT).as_posix(), "allow_unsafe"


def test_no_reader_runs_what_a_file_says():
    assert len(SOURCES) > 100
    assert {call for source in SOURCES for call in unsafe_calls(source)} == LAZY


def test_unsafe_readers_are_recognized(tmp_path):
    source = ROOT / "tests" / "test_safe_reading.py"
    assert list(unsafe_calls(source)) == []
    written = tmp_path / "reader.py"
    written.write_text("cfg.merge_from_file(x)\nyaml.load(x)\nyaml.safe_load(x)\nf(allow_unsafe=True)\n")
    names = [node for node in ast.walk(ast.parse(written.read_text())) if isinstance(node, ast.Attribute)]
    assert [name.attr in UNSAFE or ("yaml", name.attr) in UNSAFE_OF for name in names].count(True) == 2


# ------------------------------------------------------------------------------------ hostile files


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder with hostile YAMLs, the working directory of the test; a MARK in it means that one has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text("MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch MARK']\n")
    (tmp_path / "based.yaml").write_text("_BASE_: evil.yaml\nMODEL: {DEVICE: cpu}\n")
    (tmp_path / "loop.yaml").write_text("_BASE_: loop.yaml\n")
    (tmp_path / "bomb.yaml").write_text(
        "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9) if n else '*a'}]\n" for n in range(12))
    )
    (tmp_path / "image.png").touch()
    yield tmp_path
    assert not (tmp_path / "MARK").exists()


def status_of(*arguments):
    try:
        return main([str(each) for each in arguments])
    except SystemExit as stopped:
        return stopped.code


COMMANDS = {
    "calibrate": ("calibrate", "--config-file", "{}"),
    "predict": ("predict", "--config-file", "{}", "--input", "image.png", "--output", "out"),
    "predict --model": ("predict", "--model", "{}", "--input", "image.png", "--output", "out"),
    "export": ("export", "--format", "onnx", "--config-file", "{}", "--output", "out"),
    "size": ("size", "--config-file", "{}"),
}


@pytest.mark.parametrize("name", ["evil.yaml", "based.yaml", "loop.yaml", "bomb.yaml"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_it(evil, capsys, command, name):
    assert status_of(*(each.format(name) for each in COMMANDS[command])) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("evil.yaml" if name == "based.yaml" else name) in said
    assert not list(evil.glob("out/*"))


@pytest.mark.slow
def test_train_net_refuses_it(evil):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", "based.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=evil)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--config-file" in done.stderr and "evil.yaml" in done.stderr
    assert not (evil / "output").exists()


@pytest.mark.parametrize("name", ["evil.yaml", "based.yaml"])
def test_a_teachers_yaml(evil, name):
    (evil / "student.yaml").write_text(
        tiny_cfg(f"{TEACHER}.CONFIG_FILE", name, meta_architecture="QuantMimicRCNN").dump()
    )
    model = build_model(load_config("student.yaml"))
    with pytest.raises(ValueError, match="evil.yaml"):
        model.train()


# -------------------------------------------------------------------------- somebody else's run folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data")) as name:
        yield name


@pytest.mark.parametrize("name", ["config.yaml", "teacher_config.yaml"])
def test_a_report_runs_nothing(evil, dataset, name):
    folder = write_run(evil / "run", dataset)
    for hostile in ("evil.yaml", "based.yaml", "loop.yaml"):
        (folder / name).write_text(f"_BASE_: {evil / hostile}\nMODEL: {{}}\n")
        run = collect_run(str(folder))
        assert name == "teacher_config.yaml" or any("config.yaml" in note for note in run.notes)
        (folder / name).write_bytes((evil / hostile).read_bytes())
        is_plain = (name, hostile) == ("teacher_config.yaml", "based.yaml")  # but for _BASE_, which is not followed
        assert is_plain or any(name in note for note in collect_run(str(folder)).notes)


@pytest.mark.parametrize("place", ["lazy.py", "{}/lazy.py", "{}/outside.yaml", "../outside.yaml", "~/outside.yaml"])
def test_a_report_opens_nothing_outside_the_folder(evil, dataset, monkeypatch, place):
    trunk = ("MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT", "trunk", f"{TEACHER}.ADD_CONFIG", "evil_module:add")
    folder = write_run(evil / "run", dataset, is_finished=False)
    content = tiny_cfg(*trunk, f"{TEACHER}.CONFIG_FILE", place.format(evil), meta_architecture="QuantMimicRCNN")
    (folder / "config.yaml").write_text(content.dump())
    for code in (evil / "lazy.py", folder / "lazy.py", evil / "evil_module.py"):
        code.write_text("open('MARK', 'w').close()\n")
    monkeypatch.syspath_prepend(str(evil))
    write_teacher(evil, name="outside")
    opened = []

    def noted_open(path, *args, **kwargs):
        opened.append(path)
        return io.open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", noted_open)
    run = collect_run(str(folder))
    monkeypatch.undo()
    assert run.has_teacher and run.teacher_config == {}
    assert opened and all(os.path.dirname(path) == str(folder) for path in opened), opened
    assert not (evil / "MARK").exists()


def test_a_report_fetches_nothing(evil, dataset, monkeypatch):
    folder = write_run(evil / "run", dataset, is_finished=False)
    content = tiny_cfg("MODEL.WEIGHTS", "https://somewhere/model.pth", f"{TEACHER}.WEIGHTS", "detectron2://x.pkl")
    (folder / "config.yaml").write_text(content.dump())

    def refuse(*args):
        raise AssertionError(f"connected to {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert status_of("report", folder, "-o", evil / "report.html", "--images", "0", "--no-latency") == 0
    assert collect_run(str(folder)).cfg.MODEL.WEIGHTS == ""


def test_the_help_says_what_runs():
    text = " ".join(argument_parser().format_help().split())
    assert "a training runs the Python of a teacher's LazyConfig" in text and "ADD_CONFIG" in text
