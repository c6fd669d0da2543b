"""The files of a run folder: one module names, writes and reads them."""

import ast
import math
import re

import pytest
from test_layering import SOURCES, TREES

from qmimic_d2 import run_folder

NAMES = (*run_folder.FILES, "coco_instances_results.json")
HOME = "qmimic_d2.run_folder"
# The leftovers of earlier versions, which wrote the tag under another name first.
ELSEWHERE = {"qmimic_d2.files": {run_folder.TAG}}


def texts(tree):
    """Strings of a module without its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [each for each in ast.walk(tree) if isinstance(each, documented) and ast.get_docstring(each) is not None]
    docstrings = {id(each.body[0].value) for each in nodes}
    return [
        each.value
        for each in ast.walk(tree)
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in docstrings
    ]


def test_texts_without_docstrings():
    assert texts(ast.parse('"""a"""\ndef f():\n    """b"""\n    return "c" + f"d{1}"\n')) == ["c", "d"]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != HOME])
def test_nobody_else_names_a_file_of_a_run(name):
    for text in texts(TREES[name]):
        named = {each for each in NAMES if re.search(rf"(?<!\w){re.escape(each)}(?!\w)", text)}
        assert named <= ELSEWHERE.get(name, set()), f"{name} names {named}; ask qmimic_d2.run_folder: {text!r}"


def test_what_is_a_run(tmp_path):
    assert not run_folder.is_run(str(tmp_path))
    (tmp_path / "metrics.json").touch()
    assert run_folder.is_run(str(tmp_path))
    assert [run_folder.is_local(each) for each in ("", "output", "s3://output")] == [False, True, False]


def test_configs(tmp_path):
    folder = str(tmp_path)
    run_folder.write_configs(folder, "SEED: 1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    run_folder.write_configs(folder, "SEED: 2\n", "SEED: 3\n")
    assert run_folder.read_config(folder) == {"SEED": 2}
    assert run_folder.read_config(folder, "teacher_config.yaml") == {"SEED": 3}
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="no Detectron2 config"):
        run_folder.read_config(folder)


def test_figures(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(FileNotFoundError):
        run_folder.read_evaluation(folder)
    run_folder.write_evaluation(folder, ("a",), {"bbox": {"AP": math.nan}})
    assert run_folder.read_evaluation(folder) == {"bbox": {"AP": None}}
    (tmp_path / "evaluation.json").write_text("[]")
    assert run_folder.read_evaluation(folder) == {}
    run_folder.write_mimic(folder, {"levels": {}})
    assert (tmp_path / "mimic.json").read_text() == '{\n  "levels": {}\n}\n'


def test_rows_of_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "a": 2}\n[]\n\n{"iteration": -1}\n{"iteration": 2}\n{"iterat')
    assert list(run_folder.read_metrics_rows(str(path))) == [{"iteration": 1, "a": 2}, None, None, {"iteration": 2}]
    assert run_folder.has_metric(str(tmp_path), 1, "a") and not run_folder.has_metric(str(tmp_path), 2, "a")
    assert not run_folder.has_metric(str(tmp_path / "nowhere"), 1, "a")


def test_last_checkpoint(tmp_path):
    assert run_folder.last_checkpoint(str(tmp_path)) == ""
    (tmp_path / "last_checkpoint").write_text("../model_1.pth\n")
    assert run_folder.last_checkpoint(str(tmp_path)) == ""
    for name in ("model_1.pth", "model_final.pth"):
        (tmp_path / name).touch()
        assert run_folder.last_checkpoint(str(tmp_path)) == str(tmp_path / name)
