"""``export --verify``: its reference is what an evaluation sees, and a silent detector verifies nothing."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from detectron2.data import MetadataCatalog
from exported import spread_model, write_detector
from test_command_line import status_of
from test_export_command import make_true
from tiny_coco import registered_coco, write_images

from qmimic_d2.cli.export_text import verdict_text
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.engine.exporting import Exporter
from qmimic_d2.engine.trainer import Trainer
from qmimic_d2.engine.verification import Difference, Verification, VerifiedModel, read_named_image
from qmimic_d2.export import InputSpec, ModelDescription
from qmimic_d2.export.network import drop_quantizer
from qmimic_d2.image_file import UnusableImageError
from qmimic_d2.inference.categories import Category, unknown_names_note
from qmimic_d2.inference.dataset_categories import dataset_categories


def cfg_of(detector, *options):
    cfg = detector.cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", detector.weights, "DATALOADER.NUM_WORKERS", 0, *options])
    return cfg


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data"), count=4, name="tiny_verified") as name:
        yield name


@pytest.fixture(scope="module")
def student(tmp_path_factory, dataset):
    data = ("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,))
    detector = write_detector(tmp_path_factory.mktemp("student"), *data, "MODEL.QMIMIC.QUANTIZER.NAME", "Clamp")
    make_true(detector, dataset)
    return detector


def export(detector, *arguments):
    pairs = ["DATALOADER.NUM_WORKERS", 0]
    options = ["--config-file", detector.config_file, "--weights", detector.weights, "--runs", 2]
    return status_of("export", *options, *arguments, *pairs)


# ------------------------------------------------------------------------------------- reference


def test_the_reference_is_what_an_evaluation_measures(student, dataset, tmp_path):
    cfg = cfg_of(student, "OUTPUT_DIR", str(tmp_path))
    exporter = Exporter(cfg)
    row = Verification(cfg, dataset)("eager", exporter.predictor.detect, model=exporter.model)
    evaluated = Trainer.test(cfg, exporter.model)["bbox"]["AP"]
    assert row.AP == evaluated > 0.0
    assert row.AP == APEvaluation(cfg, dataset)(exporter.model)
    assert row.detections > 0


def test_the_reference_gets_its_images_from_the_evaluations_loader(student, dataset):
    """What a training's reader sees counts, whatever the exported file's reader makes of the same files."""
    cfg = cfg_of(student)
    exporter = Exporter(cfg)
    verification = Verification(cfg, dataset)
    reference = verification("eager", exporter.predictor.detect, model=exporter.model)
    darker = verification("file", lambda image: exporter.predictor.detect(image // 4))
    assert darker.difference.scores > 0.0 and darker.AP != reference.AP
    same = verification("file", exporter.predictor.detect)
    assert same.AP == reference.AP and same.difference.boxes < 1e-3 and same.difference.unmatched == 0


def test_a_reader_that_differs_from_the_evaluations_does_not_pass(student, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qmimic_d2.engine.verification.read_bgr_image", lambda path: np.zeros((64, 64, 3), np.uint8))
    assert export(student, "--format", "torchscript", "--output", tmp_path, "--verify", dataset) == 1
    assert "NOT within the tolerance" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ silence


@pytest.fixture
def silent(student, tmp_path):
    """The student with a threshold that nothing reaches, which stands for one that was not trained."""
    return [student, "--output", tmp_path / "out", "--format", "torchscript"], [
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "1.0",
    ]


def test_a_verification_in_which_nothing_is_detected_fails(silent, dataset, tmp_path, capsys):
    arguments, pairs = silent
    assert export(*arguments, "--verify", dataset, *pairs) == 1
    out = capsys.readouterr().out
    assert "AP nan -> nan, NOT verified: the training's model detects nothing on these images" in out
    assert " within the tolerance" not in out
    rows = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert [row["detections"] for row in rows[:2]] == [0, 0] and rows[0]["AP"] is None


def test_an_ap_of_zero_on_both_sides_is_no_success(student, tmp_path, capsys):
    """Detections there are, and all of them are wrong."""
    with registered_coco(tmp_path, count=2, name="tiny_wrong") as dataset:
        path = Path(MetadataCatalog.get(dataset).json_file)
        content = json.loads(path.read_text())
        for each in content["annotations"]:
            each.update(bbox=[0.0, 0.0, 3.0, 3.0], area=9.0)
        path.write_text(json.dumps(content))
        arguments = ["--format", "torchscript", "--output", tmp_path / "out", "--verify", dataset]
        assert export(student, *arguments) == 1
    out = capsys.readouterr().out
    assert "AP 0.00 -> 0.00, NOT verified: the training's model has" in out and "none of them is right" in out


@pytest.mark.parametrize("before", [math.nan, 0.0, 0.004])
@pytest.mark.parametrize("after", [math.nan, 0.0, 50.0])
@pytest.mark.parametrize("detections", [0, 9])
def test_no_verdict_without_an_ap_to_lose(before, after, detections):
    reference = VerifiedModel("eager", before, None, 10, 2.0, detections)
    exported = VerifiedModel("file", after, Difference(), 10, 1.0, detections)
    text, is_within = verdict_text(reference, exported, 100.0, is_gain_allowed=True)
    assert not is_within and "NOT verified" in text
    assert ("detects nothing" in text) == (detections == 0)


def test_a_student_that_diverged_is_no_reference(student, dataset):
    cfg = cfg_of(student)
    exporter = Exporter(cfg)
    next(exporter.model.roi_heads.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Verification(cfg, dataset)("eager", exporter.predictor.detect, model=exporter.model)


def test_an_image_that_cannot_be_read_is_named(student, tmp_path, capsys):
    with registered_coco(tmp_path, count=2, name="tiny_damaged") as dataset:
        (tmp_path / "images" / "1.jpg").write_bytes(b"no image")
        arguments = ["--format", "torchscript", "--output", tmp_path / "out", "--verify", dataset]
        assert export(student, *arguments) == 2
        assert "1.jpg" in capsys.readouterr().err
        arguments = ["--format", "onnx-int8", "--output", tmp_path / "out", "--search-images", 0]
        assert export(student, *arguments, "DATASETS.TRAIN", (dataset,)) == 2
        assert "1.jpg" in capsys.readouterr().err
    with pytest.raises(UnusableImageError, match="1.jpg"):
        read_named_image(str(tmp_path / "images" / "1.jpg"))


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tolerance", "nan"], "--tolerance: 'nan'"),
        (["--tolerance", "inf"], "--tolerance: 'inf'"),
        (["--tolerance", "-1"], "--tolerance: '-1'"),
        (["--max-ap-loss", "nan"], "--max-ap-loss: 'nan'"),
        (["--search-seconds", "nan"], "--search-seconds: 'nan'"),
        (["--search-images", "-1"], "--search-images: '-1'"),
        (["--calibration-images", "0"], "--calibration-images: '0'"),
        (["--verify-images", "-5"], "--verify-images: '-5'"),
        (["--verify-images", "many"], "--verify-images: 'many'"),
        (["--threads", "0"], "--threads: '0'"),
        (["--threads", "1000000"], "--threads: '1000000'"),
        (["--runs", "0"], "--runs: '0'"),
        (["--min-size", "100000000"], "--min-size: '100000000'"),
        (["--fixed-size", "99999999x64"], "--fixed-size: '99999999x64'"),
    ],
)
def test_numbers_that_cannot_be(student, tmp_path, capsys, arguments, message):
    assert export(student, "--format", "torchscript", "--output", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--threads", "-1"], ["--threads", "1e9"], ["--score-threshold", "nan"]])
def test_numbers_that_cannot_be_in_predict(tmp_path, capsys, arguments):
    paths = ["--model", "model.onnx", "--input", tmp_path, "--output", tmp_path / "out"]
    assert status_of("predict", *paths, *arguments) == 2
    assert f"{arguments[0]}: '{arguments[1]}'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- class names


def test_unknown_class_names_are_said(tmp_path, capsys):
    """A data set that no module registered: numbers in place of names, in the files and on the screen."""
    detector = write_detector(tmp_path, "DATASETS.TEST", ("unheard_of_set",))
    out = tmp_path / "out"
    assert export(detector, "--format", "torchscript", "detectron2", "--output", out) == 0
    err = capsys.readouterr().err
    for text in ("unheard_of_set", "DATASETS.TEST", "--import MODULE", '"0" to "2"'):
        assert text in err
    assert json.loads((out / "labels.json").read_text())["class_names_known"] is False
    image, = write_images(tmp_path / "in", 1)
    for name in ("model.ts", "config.yaml"):
        results = tmp_path / name
        assert status_of("predict", "--model", out / name, "--input", image, "--output", results) == 0
        assert "--import MODULE" in capsys.readouterr().err
        assert json.loads((results / "predictions.json").read_text())["info"]["class_names_known"] is False


def test_known_class_names(student, dataset, tmp_path, capsys):
    assert export(student, "--format", "torchscript", "detectron2", "--output", tmp_path) == 0
    assert json.loads((tmp_path / "labels.json").read_text())["class_names_known"] is True
    assert "--import" not in capsys.readouterr().err
    description = ModelDescription(((0, "0"),), InputSpec("RGB", 0, 0), 0.0, "", {}, has_names=False)
    assert ModelDescription.from_json(description.to_json()) == description


def test_predict_reads_the_names_of_a_registered_set(tmp_path, capsys):
    """Its annotation file is read for them, as export does; a damaged one costs the names and nothing else."""
    image, = write_images(tmp_path / "in", 1)

    def names(folder):
        arguments = ["--input", image, "--output", folder, "--config-file", detector.config_file]
        assert status_of("predict", *arguments, "--weights", detector.weights) == 0
        return [each["name"] for each in json.loads((folder / "predictions.json").read_text())["categories"]]

    (tmp_path / "data").mkdir()
    with registered_coco(tmp_path / "data", count=1, name="tiny_named_predict") as name:
        detector = write_detector(tmp_path, "DATASETS.TEST", (name,))
        (tmp_path / "data" / "annotations.json").rename(tmp_path / "data" / "kept.json")
        (tmp_path / "data" / "annotations.json").write_text("{")
        assert names(tmp_path / "damaged") == ["0", "1", "2"]
        assert "--import MODULE" in capsys.readouterr().err
        (tmp_path / "data" / "kept.json").rename(tmp_path / "data" / "annotations.json")
        assert names(tmp_path / "whole") == ["class 3", "class 5", "class 9"]


def test_the_note_by_hand(student):
    assert unknown_names_note([Category(1, "cat")]) == ""
    note = unknown_names_note([Category(0, "0", is_named=False)], path="model.onnx")
    assert "'model.onnx' was exported without class names, so the class is called \"0\"" in note
    cfg = cfg_of(student, "DATASETS.TEST", (), "DATASETS.TRAIN", ())
    assert not any(each.is_named for each in dataset_categories(cfg))


# -------------------------------------------------------------------------------------- others


def test_an_int8_file_names_one_operator_set(student, tmp_path):
    arguments = ["--format", "onnx-int8", "--calibration-images", 1, "--search-images", 0]
    assert export(student, *arguments, "--output", tmp_path) == 0
    model = onnx.load(str(tmp_path / "model_int8.onnx"))
    assert [each.domain for each in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_a_kept_quantizer_cannot_be_scripted_and_says_what_to_do():
    _, model = spread_model()
    with pytest.raises(AttributeError, match="cannot compile the quantizer.*--format torchscript.*--quantizer drop"):
        torch.jit.script(model.backbone)
    assert drop_quantizer(model)
    with pytest.raises(Exception) as error:
        torch.jit.script(model.backbone)
        raise RuntimeError("it was compiled")
    assert "quantizer" not in str(error.value)
