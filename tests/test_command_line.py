"""``python -m qmimic_d2``: its sub-commands, the arguments they share, and calibrate from end to end."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog
from helpers import RESNET_FPN, write_teacher
from tiny_coco import registered_coco

import qmimic_d2
from qmimic_d2.__main__ import main
from qmimic_d2.cli import COMMANDS
from qmimic_d2.cli.calibration_text import measurement_text, recommendation_text
from qmimic_d2.cli.usage import split_overrides
from qmimic_d2.files import check_writable, write_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(qmimic_d2.__file__)))


def status_of(*arguments):
    """Exit status, whether it is returned or raised."""
    try:
        return main([str(each) for each in arguments])
    except SystemExit as stopped:
        return stopped.code


# ----------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_as_a_module():
    environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "qmimic_d2", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n    {name.replace('_', '-')}" in done.stdout




def test_an_unknown_option_is_told_by_its_command(capsys):
    assert status_of("predict", "--model", "x.onnx", "--input", "a.png", "--score-treshold", 0.2) == 2
    shown = capsys.readouterr().err
    assert "usage: python -m qmimic_d2 predict " in shown
    assert "unrecognized arguments: --score-treshold; near options are ['--score-threshold']" in shown

def test_without_a_command_it_lists_them(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert all(f"    {name} " in shown for name in ("distill", "export", "predict"))

def test_every_command_has_help(capsys):
    for name in COMMANDS:
        module = importlib.import_module(f"qmimic_d2.cli.{name}")
        assert status_of(name.replace("_", "-"), "--help") == 0
        assert module.__doc__.strip().splitlines()[0] in capsys.readouterr().out


def test_version(capsys):
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"qmimic_d2 {qmimic_d2.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["unheard-of"]])
def test_without_a_known_command(arguments, capsys):
    assert status_of(*arguments) == 2
    assert "COMMAND" in capsys.readouterr().err


# ------------------------------------------------------------------------------ shared arguments


@pytest.mark.parametrize(
    "argv, overrides",
    [
        (["calibrate", "--strides", "1", "2", "MODEL.DEVICE", "cpu"], ["MODEL.DEVICE", "cpu"]),
        (["--input", "a.jpg", "SEED", "1", "OUTPUT_DIR", "x"], ["SEED", "1", "OUTPUT_DIR", "x"]),
        (["--strides", "1", "MODEL.QMIMIC.QUANTIZER.STRIDE", "-1"], ["MODEL.QMIMIC.QUANTIZER.STRIDE", "-1"]),
        (["--input", "IMG.JPG", "b.jpg"], []),
        (["--strides", "1", "2"], []),
        (["MODEL.DEVICE"], []),
        ([], []),
    ],
)
def test_overrides_end_a_list_of_values(argv, overrides):
    assert split_overrides(argv) == (argv[: len(argv) - len(overrides)], overrides)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "absent.yaml"], "absent.yaml"),
        (["MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["MODEL.VGG.DEPTH", "eleven"], "MODEL.VGG.DEPTH"),
        (["MODEL.VGG.DEPTH"], "leaves a KEY without its VALUE"),
        (["--device", "toaster"], "--device: 'toaster'"),
        (["--weights", "absent.pth"], "--weights: checkpoint 'absent.pth'"),
        (["--", "NO_SUCH.KEY", "1"], "NO_SUCH.KEY"),
    ],
)
def test_mistakes_are_told_in_a_line(teacher, arguments, message, capsys):
    config = [] if "--config-file" in arguments else ["--config-file", teacher.config_file]
    assert status_of("calibrate", *config, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_config_that_is_no_yaml(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("MODEL: [unclosed")
    assert status_of("calibrate", "--config-file", tmp_path / "broken.yaml") == 2
    assert "ParserError" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- calibrate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data"), count=4) as name:
        yield name


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, dataset):
    options = [
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)),
        *("INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0),
    ]
    return write_teacher(tmp_path_factory.mktemp("teacher"), *options)


def calibrate(teacher, *arguments):
    return status_of(
        "calibrate", "--config-file", teacher.config_file, "--weights", teacher.weights, *arguments
    )


def test_calibrate_without_evaluation(teacher, tmp_path, capsys):
    file = tmp_path / "new" / "report.json"
    assert calibrate(teacher, "--num-images", 3, "--json", file) == 0
    output = capsys.readouterr().out
    assert "3 of 4 from tiny_coco" in output
    assert "No stride is recommended" in output and "--eval" in output
    report = json.loads(file.read_text())
    assert report["weights"] == teacher.weights
    assert report["quantizer"] == {"name": "Uniform", "num_codes": 0, "signed": False}
    assert report["evaluation"] is None and report["recommended_stride"] is None
    feature = report["features"]["conv5"]
    assert feature["num_values"] == 3 * 32 * 8 * 8
    assert set(feature["percentiles"]) == {"50", "90", "99", "99.9"}
    assert len(report["strides"]) == 7
    assert report["strides"][5]["stride"] == pytest.approx(feature["rms"], rel=0.05)
    errors = [each["features"]["conv5"]["relative_error"] for each in report["strides"]]
    assert errors == sorted(errors) and errors[0] < 0.05
    assert "AP" not in report["strides"][0]


def test_calibrate_measures_what_the_model_computes(teacher, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--num-images", 4, "--strides", 0.5, 0.25, 0.5, "--num-codes", 4, "--json", file]
    assert calibrate(teacher, *arguments, "MODEL.PIXEL_STD", "[32.0, 32.0, 32.0]") == 0
    report = json.loads(file.read_text())
    assert [each["stride"] for each in report["strides"]] == [0.25, 0.5]
    codes = report["strides"][0]["features"]["conv5"]
    assert codes["codes_used"] == 4 and codes["largest_code"] == 3
    assert 0.0 < codes["saturation"] < 1.0
    feature = report["features"]["conv5"]
    # half of a stride and less becomes 0, at least what was 0 before
    assert codes["zero_share"] > feature["zero_share"] > 0.0


def test_calibrate_with_evaluation(teacher, tmp_path, capsys, monkeypatch):
    # full precision, then one AP per stride, in rising order of the strides
    aps = iter([60.0, 59.9, 59.5, 58.0])
    seen = []

    def evaluate(self, model):
        seen.append(len(model.backbone._forward_hooks))
        return next(aps)

    monkeypatch.setattr("qmimic_d2.engine.average_precision.APEvaluation.__call__", evaluate)
    file = tmp_path / "report.json"
    arguments = ["--strides", 1.0, 0.25, 0.5, "--eval", "--eval-images", 2, "--json", file]
    assert calibrate(teacher, *arguments, "--max-relative-stride", 10.0) == 0
    assert seen == [0, 1, 1, 1]
    output = capsys.readouterr().out
    assert "tiny_coco, 2 images" in output and "a subset" in output
    assert "Recommended: stride 0.5" in output
    assert "MODEL.QMIMIC.QUANTIZER.NAME Uniform MODEL.QMIMIC.QUANTIZER.STRIDE 0.5\n" in output
    report = json.loads(file.read_text())
    assert report["recommended_stride"] == 0.5
    assert report["evaluation"] == {
        "dataset": "tiny_coco",
        "num_images": 2,
        "num_images_in_dataset": 4,
        "is_subset": True,
        "full_precision_AP": 60.0,
        "max_AP_loss": 0.5,
        "max_relative_stride": 10.0,
    }
    assert [each["AP"] for each in report["strides"]] == [59.9, 59.5, 58.0]
    assert [each["AP_loss"] for each in report["strides"]] == pytest.approx([0.1, 0.5, 2.0])


def test_calibrate_recommends_no_stride_that_a_student_cannot_bear(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qmimic_d2.engine.average_precision.APEvaluation.__call__", lambda self, model: 60.0)
    file = tmp_path / "report.json"
    assert calibrate(teacher, "--strides", 0.001, 100.0, "--eval", "--eval-images", 2, "--json", file) == 0
    report = json.loads(file.read_text())
    # the teacher bears both
    assert [each["AP_loss"] for each in report["strides"]] == [0.0, 0.0]
    assert 0.001 < 0.75 * report["features"]["conv5"]["rms"] < 100.0
    assert report["recommended_stride"] == 0.001
    assert "at most 0.75 times the features' rms (--max-relative-stride)" in capsys.readouterr().out


def test_calibrate_really_evaluates(teacher, tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["--strides", 1e-5, 1000.0, "--num-images", 1, "--eval", "--json", file]
    assert calibrate(teacher, *arguments, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0") == 0
    captured = capsys.readouterr()
    assert "Average Precision" not in captured.out, "what COCO's API prints is no part of the report"
    assert "evaluating 3 of 3 on 4 images of tiny_coco" in captured.err
    report = json.loads(file.read_text())
    fine, erased = (each["AP"] for each in report["strides"])
    assert fine == pytest.approx(report["evaluation"]["full_precision_AP"], abs=0.5)
    assert 0.0 <= erased <= 100.0


def test_a_module_of_ones_own_registers_the_data(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_data.py").write_text(
        "from detectron2.data import DatasetCatalog\n"
        "DatasetCatalog.register('mine', lambda: DatasetCatalog.get('tiny_coco'))\n"
    )
    arguments = ["calibrate", "--config-file", teacher.config_file, "--weights", teacher.weights]
    arguments += ["--num-images", "1", "--strides", "0.5"]
    try:
        assert status_of("--import", "my_data", *arguments, "--dataset", "mine") == 0
        assert "1 of" in capsys.readouterr().out
    finally:
        DatasetCatalog.remove("mine")
    assert status_of("--import", "not_my_data", *arguments) == 2
    assert "No module named 'not_my_data'" in capsys.readouterr().err


def test_calibrate_warns_of_signed_features(tmp_path, dataset, capsys, monkeypatch):
    pyramid = write_teacher(
        tmp_path,
        *RESNET_FPN,
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)),
        *("INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0),
    )
    assert calibrate(pyramid, "--num-images", 1, "--strides", 0.5) == 0
    output = capsys.readouterr().out
    assert "p3: features are signed" in output and "use --signed" in output
    monkeypatch.setattr("qmimic_d2.engine.average_precision.APEvaluation.__call__", lambda self, model: 70.0)
    assert calibrate(pyramid, "--num-images", 1, "--strides", 0.5, "--eval") == 0
    assert "No stride is recommended for a dictionary that does not fit" in capsys.readouterr().out
    assert all(f"Feature {name}:" in output for name in ("p3", "p4", "p5"))
    file = tmp_path / "report.json"
    arguments = ["--signed", "--quantizer", "PowerOfTwo", "--features", "p4", "--json", file]
    assert calibrate(pyramid, "--num-images", 1, "--strides", 0.5, *arguments) == 0
    assert "WARNING" not in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert list(report["features"]) == ["p4"] and report["warnings"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strides", "0.5", "-1"], "--strides: '-1'"),
        (["--strides", "nan"], "--strides: 'nan'"),
        (["--num-codes", "1"], "--num-codes: '1'"),
        (["--num-images", "0"], "--num-images: '0'"),
        (["--max-ap-loss", "-0.5"], "--max-ap-loss: '-0.5'"),
        (["--quantizer", "Clamp"], "--quantizer"),
        (["--eval-images", "5"], "--eval is not given"),
        (["--features", "conv9"], "--features names ['conv9']"),
        (["--dataset", "tiny_coc"], "near names are ['tiny_coco'"),
        (["--dataset", "%%%"], "--dataset names '%%%'"),
        (["--json", "."], "--json is '.'"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["--eval", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["--eval", "DATASETS.TEST", "('absent',)"], "DATASETS.TEST names 'absent'"),
    ],
)
def test_calibrate_mistakes(teacher, arguments, message, capsys):
    assert calibrate(teacher, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_calibrate_with_broken_weights(teacher, tmp_path, capsys):
    state = torch.load(teacher.weights)["model"]
    name = next(name for name in state if name.startswith("backbone") and name.endswith("norm.weight"))
    state[name].fill_(float("nan"))
    torch.save({"model": state}, tmp_path / "broken.pth")
    arguments = ["calibrate", "--config-file", teacher.config_file, "--weights", tmp_path / "broken.pth"]
    assert status_of(*arguments) == 2
    assert "NaN" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ text


def report_with(aps, full_precision, recommended, **quantizer):
    return {
        "quantizer": {"name": "Uniform", "num_codes": 0, "signed": False, **quantizer},
        "strides": [{"stride": 0.5 * 2**k, "AP": ap, "AP_loss": full_precision - ap} for k, ap in enumerate(aps)],
        "evaluation": {
            "dataset": "d",
            "num_images": 9,
            "num_images_in_dataset": 9,
            "is_subset": False,
            "full_precision_AP": full_precision,
            "max_AP_loss": 0.5,
            "max_relative_stride": 10.0,
        },
        "recommended_stride": recommended,
        "warnings": [],
    }


def test_text_where_no_stride_qualifies():
    text = recommendation_text(report_with([60.0, 50.0], 70.0, None))
    assert "each of these costs more than 0.5 AP" in text and "--strides 0.25 0.12" in text
    assert "or is more than 10 times the features' rms" in text
    assert "subset" not in text and "--num-codes" not in text
    assert "-10.00" in text


def test_advice_suits_the_dictionary():
    assert "--num-codes" in recommendation_text(report_with([60.0], 70.0, None, num_codes=4))
    text = recommendation_text(report_with([60.0], 70.0, None, name="PowerOfTwo"))
    assert "Try --quantizer Uniform" in text and "--strides" not in text


def test_text_where_the_largest_stride_qualifies():
    text = recommendation_text(report_with([70.001, 70.0], 70.0, 1.0, num_codes=16, signed=True))
    assert "the largest that was tried" in text
    assert "NAME Uniform" in text and "NUM_CODES 16" in text and "SIGNED True" in text
    assert "-0.00" not in text


def test_text_where_the_teacher_detects_nothing():
    assert "Train it first" in recommendation_text(report_with([0.0], 0.0, None))
    assert "Train it first" in recommendation_text(report_with([float("nan")], float("nan"), None))


def test_text_tells_that_percentiles_are_of_a_sample():
    feature = {
        **{"num_values": 10, "zero_share": 0.5, "negative_share": 0.0, "mean": 1.0, "rms": 0.0, "min": 0.0},
        **{"max": 3.0, "percentiles": {"50": 1.0}, "percentile_sample": 5},
    }
    report = {
        **{"config_file": "c", "weights": "w", "datasets": ["d"], "num_images": 1, "num_images_available": 1},
        "quantizer": {"name": "Uniform", "num_codes": 8, "signed": True},
        "warnings": ["careful"],
        "features": {"conv5": feature},
        "strides": [],
    }
    text = measurement_text(report)
    assert "random sample of 5 values" in text and "8 codes, signed" in text and "careful" in text


# ------------------------------------------------------------------------------------------ JSON


def test_json_without_nan_and_without_leftovers(tmp_path):
    path = str(tmp_path / "file.json")
    write_json(path, {"a": [1.0, float("nan")], "b": (float("inf"), "x"), "c": None})
    with open(path) as file:
        assert json.load(file) == {"a": [1.0, None], "b": [None, "x"], "c": None}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with open(path) as file:
        assert json.load(file)["c"] is None, "a failed attempt must leave the file as it was"
    check_writable(str(tmp_path / "deeper" / "file.json"), "--json")
    assert (tmp_path / "deeper").is_dir()
