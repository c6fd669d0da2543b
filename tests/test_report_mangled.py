"""A report of a run folder in which something is wrong: the page is written, and the file is named."""

import json
import os
import random
import shutil

import pytest
from mangled import OTHER_KINDS, spoil_bytes, spoil_json, spoil_yaml
from report_runs import HELD_OUT, write_run
from tiny_coco import registered_coco

from qmimic_d2.__main__ import main
from qmimic_d2.report import collect_run, collect_runs
from qmimic_d2.report.charts import agreement_charts, histogram_charts, training_charts
from qmimic_d2.report.facts import describe_run
from qmimic_d2.report.measure import measure
from qmimic_d2.report.page import render_page, write_report
from qmimic_d2.report.tables import class_columns, held_out_columns, result_columns

DETECTIONS = "inference/coco_instances_results.json"
JSON_FILES = ("metrics.json", "evaluation.json", "mimic.json", DETECTIONS)
FILES = ("config.yaml", "teacher_config.yaml", *JSON_FILES, "last_checkpoint", "model_final.pth")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data")) as name:
        yield name


@pytest.fixture(scope="module")
def original(tmp_path_factory, dataset):
    return write_run(tmp_path_factory.mktemp("runs") / "run", dataset)


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def everything_said(run):
    """What a page says of a run, but its drawings and what has to be measured."""
    describe_run(run)
    for columns in (result_columns([run], [None]), class_columns([run]), held_out_columns([run])):
        assert all(isinstance(text, str) for column in columns for text in column.texts)
    return run


def page(folder, num_images=1):
    runs = collect_runs([str(folder)])
    measured = measure(runs, num_images=num_images, threads=0, score_threshold=0.5)
    text = render_page(runs, measured, title="x", footer="", score_threshold=0.5)
    assert "<script>alert(1)" not in text
    return runs[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_value_in_a_json_file(folder, name, seed):
    done = spoil_json(str(folder / name), random.Random(f"{name} {seed}"))
    run = everything_said(collect_run(str(folder)))
    assert run.cfg is not None, done
    if name == DETECTIONS:
        measure([run], num_images=3, threads=0, score_threshold=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_wrong_value_in_the_config(folder, seed):
    done = spoil_yaml(str(folder / "config.yaml"), random.Random(seed))
    run = everything_said(collect_run(str(folder)))
    assert run.cfg is not None or any("config.yaml" in note for note in run.notes), done
    measure([run], num_images=1, threads=0, score_threshold=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(8))
def test_spoilt_bytes(folder, name, seed):
    done = spoil_bytes(str(folder / name), random.Random(f"{name} {seed}"))
    run = everything_said(collect_run(str(folder)))
    assert run.name == "run", done
    if name == "model_final.pth":
        measure([run], num_images=1, threads=0, score_threshold=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", FILES)
def test_another_kind_of_file(folder, name, kind):
    path = folder / name
    path.unlink()
    OTHER_KINDS[kind](str(path))
    run = everything_said(collect_run(str(folder)))
    measure([run], num_images=1, threads=0, score_threshold=0.5)
    # model_final.pth comes before last_checkpoint; the detector runs where there are no detections of an evaluation,
    # and an evaluation that has left no trace was none
    says_nothing = name in ("last_checkpoint", DETECTIONS) or (name, kind) == ("evaluation.json", "nothing")
    is_readable = (name, kind) == ("metrics.json", "an empty file")
    assert says_nothing or is_readable or any(name in note for note in run.notes), run.notes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_whole_page_of_spoilt_figures(folder, seed):
    rng = random.Random(seed)
    for name in ("metrics.json", "metrics.json", "metrics.json", "mimic.json", "evaluation.json"):
        try:
            spoil_json(str(folder / name), rng)
        except (AttributeError, TypeError, ValueError):  # the one before has left nothing to spoil
            pass
    page(folder)


EXTREME = (0.0, 5e-324, 1e100, -1e100, 1e308, float("nan"))


@pytest.mark.parametrize("value", EXTREME)
def test_extreme_figures_are_drawn_or_left_out(folder, value):
    rows = [{"iteration": 19, "total_loss": 1.0, "loss_cls": value, "loss_mimic": value, "bbox/AP": value}]
    rows += [{"iteration": 39, "total_loss": 1.0, "loss_cls": 1.0, "qmimic/match_ratio": value, "bbox/AP": 2.0}]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes = {"codes": [0.0, value, 1.0], "student": [1, 2, abs(value)], "teacher": [abs(value), 0, 1]}
    level = {**HELD_OUT["levels"]["conv5"], "code_histogram": codes}
    (folder / "mimic.json").write_text(json.dumps({**HELD_OUT, "levels": {"conv5": level}}))
    run = everything_said(collect_run(str(folder)))
    charts = [*training_charts([run]), *agreement_charts([run]), *histogram_charts([run])]
    assert all("<svg" in chart.svg for chart in charts)


@pytest.mark.parametrize(
    "text, unreadable",
    [
        ('{"iteration": -5, "a": 1}\n', 1),
        ('{"iteration": true, "a": 1}\n', 1),
        ('{"iteration": "7", "a": 1}\n', 1),
        ('{"iteration": 1e309, "a": 1}\n', 1),
        ('{"iteration": ' + "9" * 5000 + ', "a": 1}\n', 1),
        ("[" * 100_000 + "\n", 1),
        ('{"iteration": 3, "a": ' + "9" * 5000 + "}\n", 0),
        ('{"iteration": 3, "a": [1], "b": {"c": 1}, "d": "x", "e": true}\n', 0),
    ],
)
def test_lines_of_metrics(folder, text, unreadable):
    (folder / "metrics.json").write_text(text)
    run = collect_run(str(folder))
    assert run.metrics.num_unreadable == unreadable and run.metrics.series == {}
    assert unreadable == 0 or any("lines of metrics.json that cannot be read: 1" in note for note in run.notes)


def test_names_with_odd_characters(original, tmp_path, capsys):
    folder = tmp_path / os.fsdecode("ru\x1b[31mn <b>&\u202e'\"".encode() + b"\xff")
    shutil.copytree(original, folder)
    level = HELD_OUT["levels"]["conv5"]
    (folder / "mimic.json").write_text(json.dumps({**HELD_OUT, "levels": {"\ud800<i>": level}, "dataset": "\udfff"}))
    (folder / "last_checkpoint").unlink()
    (folder / "model_final.pth").unlink()
    output = tmp_path / "report.html"
    write_report(collect_runs([str(folder)]), str(output), num_images=0, threads=0)
    text = output.read_text(encoding="utf-8")
    assert "<i>" not in text and "ru\x1b[31mn <b>" not in text and "&lt;i&gt;" in text
    assert main(["report", str(folder), "-o", str(output), "--images", "0", "--no-latency"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "no checkpoint" in said


def test_too_much_is_not_built(folder):
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("FC_DIM: 8\n", "FC_DIM: 1000000000\n"))
    run = page(folder, num_images=0)
    assert run.cfg is None and any("config.yaml asks for" in note for note in run.notes)
