"""QUANTIZER.RELATIVE_STRIDE: the stride that a training takes from its teacher."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from data_sources import catalogs_as_before, write_yolo  # noqa: F401
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes
from helpers import batch, write_teacher

from qmimic_d2.config_files import changed
from qmimic_d2.engine import load_config, one_teacher, with_measured_stride
from qmimic_d2.engine.mimic_evaluator import annotated_mapper, has_box
from qmimic_d2.engine.relative_stride import squares_inside
from qmimic_d2.modeling.attach import quantizer_arguments
from qmimic_d2.modeling.mimic import teacher
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

ROOT = Path(__file__).resolve().parent.parent
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
RELATIVE = f"{QUANTIZER}.RELATIVE_STRIDE"


def test_squares_inside_boxes_by_hand():
    feature = torch.arange(12.0).view(1, 3, 4)  # cells of 10 pixels
    one_cell = Boxes([[10.0, 0.0, 20.0, 10.0]])
    assert squares_inside(feature, one_cell, 10.0) == (1.0, 1)
    # centers count: 5 and 15 of x, 15 of y; cells in two boxes count once
    two = Boxes([[4.0, 14.0, 16.0, 16.0], [0.0, 10.0, 10.0, 20.0]])
    assert squares_inside(feature, two, 10.0) == (16.0 + 25.0, 2)
    assert squares_inside(feature.repeat(2, 1, 1), one_cell, 10.0) == (2.0, 2)
    for none in (Boxes(torch.zeros(0, 4)), Boxes([[1.0, 1.0, 3.0, 3.0]])):
        assert squares_inside(feature, none, 10.0) == (0.0, 0)


@pytest.fixture
def student(tmp_path):
    """Path of a student's config with a teacher of random weights, on three small images."""
    data = write_yolo(tmp_path / "yolo")
    teacher = write_teacher(tmp_path)
    entry = {"FORMAT": "yolo", "PATH": str(data)}
    content = {
        "_BASE_": str(ROOT / "configs" / "Digits" / "student_vgg_1_16_qmimic.yaml"),
        "DATASETS": {
            "SOURCES": [{**entry, "NAME": f"mine_{split}", "SPLIT": split} for split in ("train", "val")],
            "TRAIN": ["mine_train"],
            "TEST": ["mine_val"],
        },
        "MODEL": {
            "DEVICE": "cpu",
            "ROI_HEADS": {"NUM_CLASSES": 2},
            "QMIMIC": {
                "TEACHER": {"CONFIG_FILE": teacher.config_file, "WEIGHTS": teacher.weights},
                "QUANTIZER": {"RELATIVE_STRIDE": 0.5},
            },
        },
        "SOLVER": {"MAX_ITER": 2, "STEPS": [], "IMS_PER_BATCH": 2, "CHECKPOINT_PERIOD": 1},
    }
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def measured(path, *opts, **kwargs):
    return with_measured_stride(load_config(str(path), opts), **kwargs)


def test_the_stride_follows_the_teacher(student, caplog):
    caplog.set_level("INFO")
    half, whole = (measured(student, RELATIVE, str(each)) for each in (0.5, 1.0))
    first, second = (cfg.MODEL.QMIMIC.QUANTIZER.STRIDE for cfg in (half, whole))
    assert first > 0.0 and second == pytest.approx(2.0 * first, rel=0.01)
    assert half.MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE == 0.0 and half.is_frozen()
    assert "inside the 3 boxes of 2 training images" in caplog.text
    assert with_measured_stride(half) is half


def test_the_measured_teacher_teaches(student, monkeypatch):
    """Its weights are read once."""
    read, stock = [], teacher.read_checkpoint
    monkeypatch.setattr(teacher, "read_checkpoint", lambda *args, **more: read.append(args) or stock(*args, **more))
    with one_teacher():
        assert measured(student) == measured(student)
        maps = FrozenTeacher(measured(student)).features(batch())
    assert len(read) == 1
    assert torch.equal(maps["conv5"], FrozenTeacher(measured(student)).features(batch())["conv5"])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_regions_are_those_of_the_students_image(student, scale):
    cfg = load_config(str(student), ["MODEL.QMIMIC.TEACHER.INPUT_SCALE", str(scale)])
    teacher = FrozenTeacher(changed(cfg, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False))
    mapper, total, number = annotated_mapper(cfg), 0.0, 0
    for each in filter(has_box, DatasetCatalog.get("mine_train")):
        inputs = mapper(each)
        (feature,) = teacher.features([inputs]).values()
        # a cell of 8 pixels of the teacher's own image
        squares, count = squares_inside(feature[0], inputs["instances"].gt_boxes, 8.0 / scale)
        total, number = total + squares, number + count
    expected = 0.5 * math.sqrt(total / number)
    assert with_measured_stride(cfg).MODEL.QMIMIC.QUANTIZER.STRIDE == pytest.approx(expected, rel=0.005)


def test_a_folder_that_was_never_measured_has_no_number(student, tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {QMIMIC: {QUANTIZER: {STRIDE: 1.0, RELATIVE_STRIDE: 0.5}}}\n")
    with pytest.raises(ValueError, match="config.yaml of the training's OUTPUT_DIR"):
        measured(student, "OUTPUT_DIR", str(tmp_path), eval_only=True)


def test_a_lazy_config_is_told_to_give_a_number(student):
    cfg = load_config(str(student))
    with pytest.raises(ValueError, match="RELATIVE_STRIDE is 0.5.*with_measured_stride"):
        quantizer_arguments(cfg)


@pytest.mark.parametrize(
    "opts, kwargs, words",
    [
        ([RELATIVE, "-0.5"], {}, ["-0.5", "positive"]),
        ([RELATIVE, "1e999"], {}, ["inf", "positive"]),
        (["MODEL.QMIMIC.TEACHER.CONFIG_FILE", ""], {}, ["names no teacher", "QUANTIZER.STRIDE"]),
        ([RELATIVE, "-1.0", f"{QUANTIZER}.NAME", ""], {}, ["-1.0"]),
        ([], {"eval_only": True}, ["config.yaml of the training's OUTPUT_DIR"]),
    ],
)
def test_what_cannot_be_measured_is_refused(student, tmp_path, opts, kwargs, words):
    with pytest.raises(ValueError) as caught:
        measured(student, "OUTPUT_DIR", str(tmp_path / "out"), *opts, **kwargs)
    for word in (RELATIVE, *words):
        assert word in str(caught.value)


def test_boxes_smaller_than_a_cell_are_refused(student, tmp_path):
    for path in (tmp_path / "yolo" / "labels" / "train").iterdir():
        path.write_text("0 0.51 0.51 0.01 0.01\n")
    with pytest.raises(ValueError, match="root mean square 0.0.*larger than its cells"):
        measured(student)


def test_without_a_quantizer_nothing_is_measured(student):
    cfg = load_config(str(student), [f"{QUANTIZER}.NAME", ""])
    assert with_measured_stride(cfg) is cfg


def train(config, output, *flags):
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, "OUTPUT_DIR", str(output)], check=True, env=env, capture_output=True, timeout=300)
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    saved = yaml.safe_load((output / "config.yaml").read_text())["MODEL"]["QMIMIC"]["QUANTIZER"]
    return saved["STRIDE"], saved["RELATIVE_STRIDE"], [row.get("total_loss") for row in rows]


@pytest.mark.slow
def test_a_run_writes_the_number_and_repeats_from_it(student, tmp_path):
    stride, relative, losses = train(student, tmp_path / "first")
    assert stride == measured(student).MODEL.QMIMIC.QUANTIZER.STRIDE and relative == 0.0
    assert train(tmp_path / "first" / "config.yaml", tmp_path / "second") == (stride, 0.0, losses)
    # resumed, it keeps its number, whatever became of the data
    (tmp_path / "yolo" / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    assert train(student, tmp_path / "first", "--resume")[:2] == (stride, 0.0)
    evaluated = measured(student, "OUTPUT_DIR", str(tmp_path / "first"), eval_only=True)
    assert evaluated.MODEL.QMIMIC.QUANTIZER.STRIDE == stride


@pytest.mark.slow
def test_two_processes_have_one_stride(student, tmp_path):
    stride = measured(student).MODEL.QMIMIC.QUANTIZER.STRIDE
    assert train(student, tmp_path / "two", "--num-processes", "2")[0] == stride
