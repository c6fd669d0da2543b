"""The config keys, where config files are found, and what importing the package leaves alone."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

import qmimic_d2
from qmimic_d2 import config as config_module
from qmimic_d2.config import add_qmimic_config
from qmimic_d2.config_files import find_config_file, get_config_file, packaged_config_folder
from qmimic_d2.engine import load_config
from qmimic_d2.modeling.mimic.teacher_config import TeacherConfigError, load_teacher_config

PACKAGE = Path(qmimic_d2.__file__).parent


def flatten(node, prefix=""):
    """{"MODEL.MASK_ON": False, ...}"""
    flat = {}
    for key, value in node.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return flat


def qmimic_cfg(*options):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


STOCK = flatten(get_cfg())
ADDED = {key: value for key, value in flatten(qmimic_cfg()).items() if key not in STOCK}


# ------------------------------------------------------------------------------------ keys


def test_there_are_keys():
    assert len(ADDED) > 20
    assert {"MODEL.QMIMIC.QUANTIZER.STRIDE", "MODEL.VGG.WIDTH_DIVISOR", "SOLVER.OPTIMIZER"} <= set(ADDED)


def test_no_other_key_changes():
    assert {key: value for key, value in flatten(qmimic_cfg()).items() if key in STOCK} == STOCK


def test_adding_twice_keeps_what_was_set():
    cfg = qmimic_cfg()
    for key, value in (("MODEL.QMIMIC.QUANTIZER.STRIDE", 0.25), ("MODEL.VGG.DEPTH", 11), ("SOLVER.OPTIMIZER", "AdamW")):
        cfg.merge_from_list([key, value])
    expected = flatten(cfg)
    add_qmimic_config(cfg)
    assert flatten(cfg) == expected


def test_configs_share_no_list():
    qmimic_cfg().MODEL.QMIMIC.MIMIC.ROI_SOURCE.append("elsewhere")
    assert qmimic_cfg().MODEL.QMIMIC.MIMIC.ROI_SOURCE == ["sampled"]


@pytest.mark.parametrize("key", ADDED)
def test_defaults_have_a_type_that_yacs_checks(key):
    value = ADDED[key]
    assert isinstance(value, (bool, int, float, str, list)), f"{key} is {value!r}, for which yacs takes anything"
    # yacs refuses 0.5 for an int default, so what may be fractional must be written 1.0
    is_fractional = re.search(r"(WEIGHT|SCALE|THRESH|DECAY|MOMENTUM|QUANTIZER\.STRIDE)$", key)
    if is_fractional:
        assert isinstance(value, float), f"{key} is {value!r}; write it as a float"


@pytest.mark.parametrize("key", ADDED)
def test_every_key_is_read(key):
    name = key.rsplit(".", 1)[1]
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    readers = [path for path, source in sources.items() if re.search(rf"[.\"]{name}\b", source)]
    assert [path for path in readers if path != PACKAGE / "config.py"], f"nothing reads {key}"


def test_a_saved_config_is_read_back(tmp_path):
    cfg = qmimic_cfg()
    cfg.MODEL.QMIMIC.QUANTIZER.STRIDE = 0.25
    cfg.MODEL.QMIMIC.MIMIC.IN_FEATURES = ["conv5"]
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    again = qmimic_cfg()
    again.merge_from_file(str(path))
    assert {key: flatten(again)[key] for key in ADDED} == {key: flatten(cfg)[key] for key in ADDED}


def test_every_key_has_a_comment_above_it():
    source = Path(config_module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    documented = []
    for statement in ast.walk(ast.parse(source)):
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute)):
            continue
        is_node = isinstance(statement.value, ast.Call)
        if not is_node:
            documented.append(statement.targets[0].attr)
            assert lines[statement.lineno - 2].strip().startswith("# "), f"no comment above: {ast.unparse(statement)}"
    assert sorted(documented) == sorted(key.rsplit(".", 1)[1] for key in ADDED)


# ------------------------------------------------------------------------------------ import

# Prints Detectron2's defaults before and after the import, and every file operation that changes something.
_IMPORT = """
import json, os, sys
import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling
from detectron2.config import get_cfg

changes = []
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.", "tempfile.")

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            changes.append([event, str(arguments[0])])
    elif event.startswith(CHANGING):
        changes.append([event, str(arguments)])

sys.addaudithook(watch)
before = get_cfg().dump()
import qmimic_d2
after = get_cfg().dump()
watched = list(changes)
open(sys.argv[1], "w").close()
print(json.dumps({"before": before, "after": after, "changes": watched, "is_watching": len(changes) > len(watched)}))
"""


@pytest.mark.slow
def test_importing_changes_no_default_and_writes_no_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    work = tmp_path / "work"
    work.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT, str(tmp_path / "probe")],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["before"] == result["after"]
    assert "QMIMIC" not in result["after"]
    assert result["changes"] == []
    assert result["is_watching"]
    assert not list(work.iterdir())


# ------------------------------------------------------------------------------------ config files


def test_packaged_configs():
    folder = packaged_config_folder()
    assert os.path.isabs(folder) and os.listdir(folder)
    path = get_config_file("Digits/student_vgg_1_16_qmimic.yaml")
    assert os.path.isabs(path) and os.path.isfile(path)
    assert path == os.path.join(folder, "Digits", "student_vgg_1_16_qmimic.yaml")
    assert qmimic_d2.get_config_file is get_config_file


@pytest.mark.parametrize("name, beside", [("Digits/none.yaml", "student_vgg"), ("Nowhere/none.yaml", "Digits")])
def test_a_packaged_config_that_is_not_there(name, beside):
    with pytest.raises(FileNotFoundError) as error:
        get_config_file(name)
    assert repr(name) in str(error.value) and beside in str(error.value)


def test_configs_in_a_wheel_come_first(tmp_path, monkeypatch):
    from qmimic_d2 import config_files

    package = tmp_path / "checkout" / "package"
    (tmp_path / "checkout" / "configs").mkdir(parents=True)
    package.mkdir()
    monkeypatch.setattr(config_files, "_PACKAGE", str(package))
    assert packaged_config_folder() == str(tmp_path / "checkout" / "configs")
    (package / "configs").mkdir()
    assert packaged_config_folder() == str(package / "configs")


def test_places_in_order(tmp_path, monkeypatch):
    beside, work, packaged = (tmp_path / name for name in ("beside", "work", "package"))
    for folder in (beside, work, packaged / "configs"):
        folder.mkdir(parents=True)
        (folder / "teacher.yaml").write_text("")
    monkeypatch.setattr("qmimic_d2.config_files._PACKAGE", str(packaged))
    monkeypatch.chdir(work)
    places = [beside, work, packaged / "configs"]
    for folder in places:
        assert find_config_file("teacher.yaml", "KEY", beside=[str(beside)]) == str(folder / "teacher.yaml")
        (folder / "teacher.yaml").unlink()
    with pytest.raises(FileNotFoundError) as error:
        find_config_file("teacher.yaml", "SOME.KEY", beside=[str(beside)])
    assert str(error.value).startswith("SOME.KEY is 'teacher.yaml'")
    for folder in places:
        assert str(folder / "teacher.yaml") in str(error.value)


def test_paths_that_are_written_in_other_ways(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "teacher.yaml"
    path.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_config_file(str(path), "KEY", beside=["elsewhere"]) == str(path)
    for written in ("sub/teacher.yaml", "~/sub/teacher.yaml", "./sub/../sub/teacher.yaml"):
        assert find_config_file(written, "KEY") == str(path)
    assert find_config_file("../teacher.yaml", "KEY", beside=["sub/below"]) == str(path)


@pytest.mark.parametrize("path", ["", ".", "/", "none.yaml"])
def test_what_is_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^SOME.KEY is .*no such file.*absolute"):
        find_config_file(path, "SOME.KEY")


EARLIER = {
    "TEACHER_ON": (False, ["MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER"]),
    "STUDENT_AT": (["mimic"], ["MODEL.QMIMIC.QUANTIZER.ON_BACKBONE", "MODEL.QMIMIC.MIMIC.QUANTIZE_STUDENT", "'mimic'"]),
}


def assert_renamed(caught, name):
    for word in (f"MODEL.QMIMIC.QUANTIZER.{name}", "was renamed to", *EARLIER[name][1]):
        assert word in caught.value.args[0]


@pytest.mark.parametrize("name", EARLIER)
def test_an_earlier_key_is_refused_with_its_new_name(tmp_path, name):
    value = EARLIER[name][0]
    base, path = tmp_path / "base.yaml", tmp_path / "config.yaml"
    base.write_text(yaml.safe_dump({"MODEL": {"QMIMIC": {"QUANTIZER": {name: value}}}}))
    path.write_text("_BASE_: base.yaml\n")
    empty = tmp_path / "empty.yaml"
    empty.write_text("VERSION: 2\n")
    for file in (base, path):
        for merge in (qmimic_cfg().merge_from_file, load_config):
            with pytest.raises(KeyError) as caught:
                merge(str(file))
            assert_renamed(caught, name)
    with pytest.raises(KeyError) as caught:
        load_config("", [f"MODEL.QMIMIC.QUANTIZER.{name}", str(value)])
    assert_renamed(caught, name)
    assert "Near keys" not in caught.value.args[0]
    teacher = ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(empty))
    opts = ("MODEL.QMIMIC.TEACHER.OPTS", [f"MODEL.QMIMIC.QUANTIZER.{name}", value])
    for options in (("MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(base)), (*teacher, *opts)):
        with pytest.raises(TeacherConfigError) as caught:
            load_teacher_config(qmimic_cfg(*options))
        assert_renamed(caught, name)


def test_an_earlier_value_is_refused_with_the_new_form(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {QMIMIC: {MIMIC: {ROI_SOURCE: ground_truth+sampled}}}\n")
    pair = ["MODEL.QMIMIC.MIMIC.ROI_SOURCE", "ground_truth+sampled"]
    empty = tmp_path / "empty.yaml"
    empty.write_text("VERSION: 2\n")
    teacher = ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(empty), "MODEL.QMIMIC.TEACHER.OPTS", pair)
    for load in (
        lambda: load_config(str(path)),
        lambda: load_config("", pair),
        lambda: load_teacher_config(qmimic_cfg(*teacher)),
    ):
        with pytest.raises(ValueError, match="ROI_SOURCE. Give a list: \\['ground_truth', 'sampled'\\]"):
            load()
