"""``python -m qmimic_d2 export`` and ``predict --model`` from end to end, and the verification between them."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from exported import FORMS, assert_close, random_image, write_detector, write_forms
from PIL import Image
from test_command_line import status_of
from tiny_coco import registered_coco, write_images

from qmimic_d2.cli.export_text import human_bytes, verdict_text
from qmimic_d2.engine.verification import Difference, VerifiedModel, difference
from qmimic_d2.export.preprocessing import Detections
from qmimic_d2.image_file import UnusableImageError, read_bgr_image
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.inference.video import VideoFrames

pytestmark = pytest.mark.export

CLAMP = ("MODEL.QMIMIC.QUANTIZER.NAME", "Clamp")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return write_forms(tmp_path_factory.mktemp("forms"), *CLAMP)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data"), count=6, name="tiny_export") as name:
        yield name


def make_true(detector, dataset, *options):
    """Makes the ground truth of a data set what a detector finds there, so that there is an AP to lose."""
    path = MetadataCatalog.get(dataset).json_file
    with open(path) as file:
        content = json.load(file)
    detect = Predictor(with_weights(detector, *options)).detect
    found = {each["id"]: detect(read_bgr_image(image_file(dataset, each))) for each in content["images"]}
    for annotation in content["annotations"]:
        x0, y0, x1, y1 = found[annotation["image_id"]].boxes[0].tolist()
        annotation["bbox"], annotation["area"] = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
        annotation["category_id"] = (3, 5, 9)[found[annotation["image_id"]].classes[0]]
    with open(path, "w") as file:
        json.dump(content, file)


def image_file(dataset, image):
    return os.path.join(MetadataCatalog.get(dataset).image_root, image["file_name"])


def with_weights(detector, *options):
    cfg = detector.cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", detector.weights, *options])
    return cfg


@pytest.fixture(scope="module")
def student(tmp_path_factory, dataset):
    """A student that was taught, with its teacher, and data sets in its config, on which it finds what is there."""
    folder = tmp_path_factory.mktemp("student")
    data = ("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,))
    teacher = write_detector(folder, *data, "MODEL.WEIGHTS", str(folder / "teacher.pth"), name="teacher")
    options = (*data, *teacher.options, "MODEL.META_ARCHITECTURE", "QuantMimicRCNN")
    student = write_detector(folder, *options, name="student")
    make_true(student, dataset)
    return student


def export(detector, *arguments):
    weights = [] if "--weights" in arguments else ["--weights", detector.weights]
    return status_of("export", "--config-file", detector.config_file, *weights, "--runs", 2, *arguments)


# ----------------------------------------------------------------------------------- export


@pytest.mark.parametrize("form", FORMS)
def test_export_and_verify(student, dataset, tmp_path, capsys, form):
    arguments = ["--format", form, "--output", tmp_path, "--verify", dataset, "--verify-images", 4]
    assert export(student, *arguments) == 0
    out = capsys.readouterr().out
    names = ["eager student, quantizer kept", f"{form}, quantizer kept", "eager student, quantizer dropped", "teacher"]
    rows = json.loads((tmp_path / "verification.json").read_text())
    assert [row["name"] for row in rows] == names
    assert all(name in out for name in names)
    assert rows[1]["difference"]["boxes"] < 0.01 and rows[1]["difference"]["matched"] > 0
    assert rows[2]["difference"]["scores"] > 0 and rows[3]["difference"] is None
    assert all(row["milliseconds"] > 0 for row in rows)
    assert "within the tolerance of 0.1" in out and "1 thread" in out
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert labels["classes"][0] == {"id": 3, "name": "class 3"}
    assert ("Needs this package (QuantRCNN)" in out) == (form == "detectron2")
    assert not [name for name in os.listdir(tmp_path) if ".part" in name]


def test_int8(student, dataset, tmp_path, capsys):
    options = ["--calibration-images", 2, "--search-images", 2, "--search-seconds", 0, "--max-ap-loss", 1e9]
    options += ["--verify", dataset, "--verify-images", 2]
    status = export(student, "--format", "onnx", "onnx-int8", "--output", tmp_path, *options)
    out = capsys.readouterr().out
    assert status == int("NOT within" in out)
    assert "onnx: AP" in out and "within the tolerance of 0.1;" in out
    assert "onnx-int8: AP" in out and "within the tolerance of 1;" in out
    names = [row["name"] for row in json.loads((tmp_path / "verification.json").read_text())]
    assert names[1:3] == ["onnx, quantizer kept", "onnx-int8, quantizer kept"]
    assert "Calibrated on 2 images, AP on 2 images of tiny_export" in out and "int8, in float nothing" in out
    found = open_detector(str(tmp_path / "model_int8.onnx")).detect(random_image(64, 64))
    assert len(found) > 0


def test_int8_without_a_search(student, tmp_path, capsys):
    options = ["--calibration-images", 1, "--search-images", 0]
    assert export(student, "--format", "onnx-int8", "--output", tmp_path, *options) == 0
    assert "AP not measured, no search" in capsys.readouterr().out


def test_a_difference_above_the_tolerance(student, dataset, tmp_path, capsys, monkeypatch):
    """A file whose boxes are off must not pass."""
    real = open_detector

    class Broken:
        def __init__(self, detector):
            self._detect = detector.detect

        def detect(self, image):
            found = self._detect(image)
            return Detections(found.boxes + np.float32(100), found.scores, found.classes)

    monkeypatch.setattr("qmimic_d2.cli.export.open_detector", lambda *a, **k: Broken(real(*a, **k)))
    arguments = ["--format", "detectron2", "--output", tmp_path, "--verify", dataset, "--verify-images", 2]
    assert export(student, *arguments, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "") == 1
    assert "NOT within the tolerance of 0.1" in capsys.readouterr().out
    assert export(student, *arguments, "--tolerance", 100, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "") == 0


def test_sizes(student, tmp_path, capsys):
    with registered_coco(tmp_path, count=2, name="tiny_sizes") as dataset:
        make_true(student, dataset, "INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 48)
        arguments = ["--format", "onnx", "--output", tmp_path, "--verify", dataset]
        assert export(student, *arguments, "--min-size", 32, "--max-size", 48) == 0
    assert "eager student, sizes of its config" in capsys.readouterr().out
    assert "shorter side to 32 pixels" in (tmp_path / "labels.json").read_text()
    assert export(student, "--format", "torchscript", "--output", tmp_path, "--fixed-size", "48x64") == 0
    assert json.loads((tmp_path / "labels.json").read_text())["preprocessing"]["size"] == "48 x 64"


def test_a_dropped_quantizer(student, dataset, tmp_path, capsys):
    arguments = ["--format", "detectron2", "--output", tmp_path, "--quantizer", "drop"]
    assert export(student, *arguments, "--verify", dataset, "--verify-images", 2) == 0
    out = capsys.readouterr().out
    for text in ("Quantizer: none", "detectron2, quantizer dropped", "eager student, quantizer kept"):
        assert text in out


def test_a_teacher_that_is_not_at_hand(student, dataset, tmp_path, capsys):
    arguments = ["--format", "detectron2", "--output", tmp_path, "--verify", dataset, "--verify-images", 1]
    assert export(student, *arguments, "MODEL.QMIMIC.TEACHER.WEIGHTS", "/nowhere/model.pth") == 0
    captured = capsys.readouterr()
    assert "The teacher is not compared" in captured.err and " teacher " not in captured.out


def test_class_names_are_looked_up(tmp_path, capsys):
    """The annotation file of a data set is read for them, if it is there."""
    (tmp_path / "data").mkdir()
    with registered_coco(tmp_path / "data", count=1, name="tiny_named_export") as name:
        data = ("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,))
        detector = write_detector(tmp_path, *data)
        assert export(detector, "--format", "torchscript", "--output", tmp_path / "out") == 0
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels["classes"] == [{"id": each, "name": f"class {each}"} for each in (3, 5, 9)]


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "/nowhere/model.pth"], "/nowhere/model.pth"),
        (["MODEL.VGG.WIDTH_DIVISOR", "32"], "of another shape"),
        (["--fixed-size", "64"], "give height and width such as 480x640"),
        (["--fixed-size", "0x64"], "give height and width such as 480x640"),
        (["--fixed-size", "64x64", "--min-size", "32"], "--fixed-size goes without"),
        (["--min-size", "0"], "'0': give a whole number"),
        (["--verify", "unheard_of"], "unheard_of"),
        (["--fixed-size", "64x64", "--format", "detectron2"], "a Detectron2 config has no key for it"),
        (["--format", "onnx-int8", "DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["--format", "tflite"], "--format is 'tflite'; choose from"),
    ],
)
def test_mistakes_in_the_arguments(student, tmp_path, capsys, arguments, message):
    form = [] if "--format" in arguments else ["--format", "torchscript"]
    assert export(student, "--output", tmp_path / "out", *form, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_a_checkpoint_cut_short(student, tmp_path, capsys):
    with open(student.weights, "rb") as file:
        (tmp_path / "cut.pth").write_bytes(file.read()[:2000])
    arguments = ["--format", "onnx", "--output", tmp_path / "out", "--weights", tmp_path / "cut.pth"]
    assert export(student, *arguments) == 2
    assert "unreadable or cut short" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


def test_an_unwritable_folder(student, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert export(student, "--format", "onnx", "--output", tmp_path / "file") == 2
    assert "--output is" in capsys.readouterr().err

    def refused(*args, **kwargs):  # as for a folder without write permission, which root would not notice
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert export(student, "--format", "onnx", "--output", tmp_path / "out") == 2
    assert "where nothing can be written" in capsys.readouterr().err


@pytest.mark.parametrize("form, package", [("onnx", "onnx"), ("onnx-int8", "onnxruntime.quantization")])
def test_a_form_whose_package_is_missing(student, tmp_path, capsys, monkeypatch, form, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert export(student, "--format", form, "--output", tmp_path / "out") == 2
    assert "qmimic_d2[export]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- difference


def found(*rows):
    """Detections from rows of score, class, box."""
    table = np.array([row for row in rows], np.float32).reshape(-1, 6)
    return Detections(table[:, 2:], table[:, 0], table[:, 1].astype(np.int64))


def test_differences_by_hand():
    one = found((0.9, 0, 0, 0, 10, 10), (0.8, 1, 0, 0, 10, 10), (0.7, 0, 50, 50, 60, 60))
    other = found((0.85, 0, 0, 0, 10, 12), (0.8, 1, 0, 1, 10, 10), (0.2, 2, 50, 50, 60, 60))
    apart = difference(one, other)
    assert (apart.boxes, apart.matched, apart.unmatched) == (2.0, 2, 2)
    assert apart.scores == pytest.approx(0.05) and apart.unmatched_score == pytest.approx(0.7)


def test_a_detection_has_one_partner():
    one = found((0.9, 0, 0, 0, 10, 10))
    other = found((0.5, 0, 0, 0, 10, 9), (0.9, 0, 0, 0, 10, 10))
    apart = difference(one, other)
    assert (apart.boxes, apart.scores, apart.matched, apart.unmatched) == (0.0, 0.0, 1, 1)


def test_no_detections():
    assert difference(found(), found()) == Difference()
    apart = difference(found(), found((0.5, 0, 0, 0, 1, 1)))
    assert (apart.matched, apart.unmatched, apart.unmatched_score) == (0, 1, 0.5)
    assert Difference(1.0, 0.1, 2, 3, 0.4).worst(Difference(0.5, 0.2, 1, 1, 0.1)) == Difference(1.0, 0.2, 3, 4, 0.4)


def test_the_verdict():
    def verdict(before, after, is_gain_allowed=False):
        rows = [VerifiedModel("eager", before, None, 10, 2.0), VerifiedModel("file", after, Difference(), 10, 1.0)]
        return verdict_text(*rows, 0.5, is_gain_allowed)

    assert verdict(50.0, 49.5)[1] and verdict(50.0, 50.5)[1]
    assert not verdict(50.0, 49.4)[1] and not verdict(50.0, 50.6)[1]
    assert verdict(50.0, 50.6, is_gain_allowed=True)[1] and not verdict(50.0, 49.4, is_gain_allowed=True)[1]
    assert not verdict(50.0, float("nan"))[1]
    expected = "AP 50.00 -> 49.50 (-0.50), within the tolerance of 0.5; 2.0 times as fast as eager"
    assert verdict(50.0, 49.5)[0] == expected
    assert "(+0.00), within" in verdict(50.0, 49.999)[0]
    assert (human_bytes(1500), human_bytes(2_500_000)) == ("2 kB", "2.50 MB")


# ---------------------------------------------------------------------------------- predict


def predictions(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_predict_through_every_form(forms, tmp_path):
    images = tmp_path / "in"
    write_images(images, 2, 50, 70)
    Image.fromarray(random_image(200, 1)).save(images / "narrow.png")
    Image.fromarray(random_image(40, 60)[:, :, 0].astype(np.uint16) * 257).save(images / "deep.png")
    contents = []
    for form, path in forms.files.items():
        out = tmp_path / form
        assert status_of("predict", "--model", path, "--input", images, "--output", out, "--score-threshold", 0.3) == 0
        assert sorted(os.listdir(out)) == ["0.jpg", "1.jpg", "deep.jpg", "narrow.jpg", "predictions.json"]
        contents.append(predictions(out))
    first, *others = contents
    assert len(first["annotations"]) > 0 and len(first["images"]) == 4
    for other in others:
        assert other["images"] == first["images"] and len(other["annotations"]) == len(first["annotations"])
        for one, same in zip(first["annotations"], other["annotations"]):
            assert one["category_id"] == same["category_id"]
            assert one["bbox"] == pytest.approx(same["bbox"], abs=0.01)


def test_predict_on_a_video(forms, tmp_path, capsys):
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for seed in range(3):
        writer.write(random_image(48, 64, seed))
    writer.release()
    out = tmp_path / "out"
    arguments = ["--input", path, "--output", out, "--score-threshold", 0.1]
    assert status_of("predict", "--model", forms.files["onnx"], *arguments) == 0
    assert sorted(os.listdir(out)) == ["film.mp4", "predictions.json"]
    content = predictions(out)
    assert [each["file_name"] for each in content["images"]] == [f"{path}#{index}" for index in range(3)]
    assert "frames: 3" in capsys.readouterr().out and len(content["annotations"]) > 0
    frames = VideoFrames(str(out / "film.mp4"))
    assert frames.rate == pytest.approx(5.0) and [each.shape for each in frames] == [(672 - 192, 640, 3)] * 3
    expected = open_detector(forms.files["detectron2"]).detect(next(iter(VideoFrames(path))))
    drawn = [each for each in content["annotations"] if each["image_id"] == 1]
    assert len(drawn) == len(expected.above(0.1))


def test_a_broken_video_is_skipped(forms, tmp_path, capsys):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    arguments = ["--input", tmp_path / "film.mp4", "--output", tmp_path / "out"]
    assert status_of("predict", "--model", forms.files["onnx"], *arguments) == 1
    assert "OpenCV finds no video" in capsys.readouterr().err
    with pytest.raises(UnusableImageError):
        VideoFrames(str(tmp_path / "film.mp4"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --model FILE, or --config-file"),
        (["--model", "model.onnx", "--config-file", "x.yaml"], "either --model FILE, or --config-file"),
        (["--model", "model.onnx", "--weights", "x.pth"], "--weights goes with --config-file"),
        (["--model", "model.tflite"], "the ending tells the form"),
        (["--model", "absent.onnx"], "no such file"),
        (["--model", "model.onnx", "SEED", "1"], "takes no KEY VALUE pairs"),
        (["--model", "model.onnx", "--score-threshold", "0.01"], "was exported with 0.05"),
    ],
)
def test_mistakes_in_predicts_arguments(forms, tmp_path, monkeypatch, capsys, arguments, message):
    image, = write_images(tmp_path / "in", 1)
    monkeypatch.chdir(forms.folder / "out")
    assert status_of("predict", "--input", image, "--output", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_yaml_takes_overrides_and_another_threshold(forms):
    path = forms.files["detectron2"]
    image = random_image(64, 64)
    found = open_detector(path).detect(image)
    middle = float(np.median(found.scores))
    assert_close(open_detector(path, score_threshold=middle).detect(image).above(0.0), found.above(middle + 1e-6))
    few = open_detector(path, opts=["TEST.DETECTIONS_PER_IMAGE", 2]).detect(image)
    assert_close(few, Detections(found.boxes[:2], found.scores[:2], found.classes[:2]))
