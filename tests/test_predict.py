"""Prediction on images: reading, finding, naming, drawing, COCO's JSON, and the command's exit status."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from helpers import tiny_cfg, write_teacher
from PIL import Image
from pycocotools.coco import COCO
from tiny_coco import write_images

from qmimic_d2.__main__ import main
from qmimic_d2.export import Detections
from qmimic_d2.image_file import UnusableImageError, read_bgr_image
from qmimic_d2.inference.categories import Category
from qmimic_d2.inference.coco_predictions import CocoPredictions
from qmimic_d2.inference.dataset_categories import dataset_categories
from qmimic_d2.inference.drawing import draw_detections
from qmimic_d2.inference.input_files import find_images, unique_names
from qmimic_d2.inference.prediction import Predictor


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny detector on disk; its scores are about 1/4, for three classes and background."""
    return write_teacher(tmp_path_factory.mktemp("detector"), "INPUT.MIN_SIZE_TEST", 64, name="detector")


def with_weights(detector, *options):
    cfg = detector.cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", detector.weights, *options])
    cfg.freeze()
    return cfg


def random_image(height=48, width=64):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections_of(boxes, scores, classes):
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes, np.int64)
    )


def drawing_of(image, found, names):
    return draw_detections(image, found.boxes, found.scores.tolist(), found.classes.tolist(), names)


def assert_same_detections(first, second):
    assert len(first) == len(second) > 0
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.pred_classes, second.pred_classes)


# ------------------------------------------------------------------------------------ predictor


@pytest.mark.parametrize("model_format", ["BGR", "RGB"])
def test_predicts_what_detectron2_predicts(detector, model_format):
    cfg = with_weights(detector, "INPUT.FORMAT", model_format)
    image = random_image()
    ours = Predictor(cfg)
    assert not ours.model.training
    assert_same_detections(ours(image), DefaultPredictor(cfg)(image)["instances"])
    assert_same_detections(ours(image), ours(np.ascontiguousarray(image[:, :, ::-1]), "RGB"))


def test_a_student_needs_no_file_of_its_teacher(detector):
    cfg = with_weights(
        detector,
        *("MODEL.META_ARCHITECTURE", "QuantMimicRCNN"),
        *("MODEL.QMIMIC.TEACHER.CONFIG_FILE", "/nowhere/teacher.yaml"),
    )
    assert len(Predictor(cfg)(random_image())) > 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        (["MODEL.WEIGHTS", ""], ValueError, "--weights is empty"),
        (["MODEL.WEIGHTS", "/nowhere/model.pth"], FileNotFoundError, "/nowhere/model.pth"),
        (["MODEL.VGG.WIDTH_DIVISOR", 32], ValueError, "--weights.*of another shape"),
        (["INPUT.FORMAT", "L"], ValueError, "INPUT.FORMAT is 'L'"),
    ],
)
def test_no_prediction_with_untrained_weights(detector, options, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        Predictor(with_weights(detector, *options), weights_key="--weights")


def test_images_that_cannot_be_predicted_on(detector):
    predictor = Predictor(with_weights(detector))
    for image in (np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="shape"):
            predictor(image)
    with pytest.raises(ValueError, match="'HSV'"):
        predictor(random_image(), "HSV")


def test_an_image_of_one_pixel_row_is_padded(detector):
    found = Predictor(with_weights(detector, "INPUT.MAX_SIZE_TEST", 64))(random_image(1, 1000))
    boxes = found.pred_boxes.tensor
    assert len(found) > 0
    assert (boxes[:, 0::2] <= 1000).all() and (boxes[:, 1::2] <= 1).all() and (boxes >= 0).all()


# --------------------------------------------------------------------------------------- images


def test_a_turned_photograph_is_put_upright(tmp_path):
    image = Image.new("RGB", (30, 20))
    image.paste((255, 0, 0), (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    read = read_bgr_image(str(tmp_path / "turned.png"))
    assert read.shape == (30, 20, 3)
    assert read[0, 0].tolist() == [0, 0, 255] and read[-1, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("L", 77, [77, 77, 77]),
        ("RGB", (1, 2, 3), [3, 2, 1]),
        ("RGBA", (1, 2, 3, 0), [3, 2, 1]),
        ("LA", (50, 10), [50, 50, 50]),
        ("P", 0, [0, 0, 0]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_kind_of_image_becomes_three_channels(tmp_path, mode, color, expected):
    Image.new(mode, (5, 4), color).save(tmp_path / "image.png")
    read = read_bgr_image(str(tmp_path / "image.png"))
    assert (read.shape, read.dtype) == ((4, 5, 3), np.uint8)
    assert read[2, 2].tolist() == expected


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    path = str(tmp_path / f"deep.{ending}")
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    read = read_bgr_image(path)
    assert read.shape == (2, 3, 3)
    assert read[:, :, 1].tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]
    assert (read[:, :, 0] == read[:, :, 2]).all()


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    whole, = write_images(tmp_path / "whole", 1)
    with open(whole, "rb") as file:
        (tmp_path / "cut.jpg").write_bytes(file.read()[:600])
    for name in ("empty.jpg", "text.jpg", "cut.jpg", "absent.jpg"):
        with pytest.raises(UnusableImageError, match="cannot be read"):
            read_bgr_image(str(tmp_path / name))


def test_finding_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.jpg", "sub/c.tiff", "out/a.jpg", ".git/d.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    folder = str(tmp_path)

    def names(*paths, **options):
        return [os.path.relpath(path, folder) for path in find_images(paths, **options)]

    assert names(folder) == ["a.jpg", "b.PNG", "out/a.jpg", "sub/c.tiff"]
    assert names(folder, excluded_folder=os.path.join(folder, "out")) == ["a.jpg", "b.PNG", "sub/c.tiff"]
    assert names(os.path.join(folder, "notes.txt"), os.path.join(folder, "sub")) == ["notes.txt", "sub/c.tiff"]
    assert names(os.path.join(folder, "b.PNG"), folder)[:2] == ["b.PNG", "a.jpg"], "none twice"
    with pytest.raises(FileNotFoundError, match="absent"):
        find_images([os.path.join(folder, "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        find_images([str(tmp_path / "empty")])


def test_unique_names():
    paths = ["x/a.jpg", "y/a.png", "a_2.jpg", "B.jpg", "z/b.jpg", "c.tar.gz"]
    assert unique_names(paths, ".jpg") == ["a.jpg", "a_3.jpg", "a_2.jpg", "B.jpg", "b_2.jpg", "c.tar.jpg"]
    assert unique_names([], ".jpg") == []


# -------------------------------------------------------------------------------------- results


@pytest.fixture
def metadata():
    names = ("tiny_named", "tiny_numbered", "tiny_other")
    MetadataCatalog.get(names[0]).set(
        thing_classes=["a", "b", "c"], thing_dataset_id_to_contiguous_id={3: 0, 5: 1, 9: 2}
    )
    MetadataCatalog.get(names[1]).set(thing_classes=["x", "y", "z"])
    MetadataCatalog.get(names[2]).set(thing_classes=["only one"])
    yield names
    for name in names:
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "test, train, expected",
    [
        (["tiny_named"], ["tiny_numbered"], [(3, "a"), (5, "b"), (9, "c")]),
        (["tiny_numbered"], [], [(0, "x"), (1, "y"), (2, "z")]),
        (["tiny_other"], ["tiny_named"], [(3, "a"), (5, "b"), (9, "c")]),
        ([], [], [(0, "0"), (1, "1"), (2, "2")]),
    ],
)
def test_categories(metadata, test, train, expected):
    cfg = tiny_cfg("DATASETS.TEST", tuple(test), "DATASETS.TRAIN", tuple(train))
    assert [(each.id, each.name) for each in dataset_categories(cfg)] == expected


def test_drawing(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :, 0] = 200  # blue
    categories = ["one", "two"]
    detections = detections_of([[10, 10, 30, 35], [40, 5, 50, 15]], [0.9, 0.6], [0, 1])
    drawn = drawing_of(image, detections, categories)
    # 11 is the least whole factor that makes 60 pixels 640 or more
    assert (drawn.shape, drawn.dtype) == ((440, 660, 3), np.uint8)
    assert drawn[20, 20].tolist() == [0, 0, 200]
    edges = drawn[110 + 60 : 385, 110 - 1 : 110 + 2].reshape(-1, 3)
    assert (edges[:, 0] > 100).any(), "the first class is drawn in red"
    assert (drawing_of(image, detections, categories) == drawn).all()
    nothing = drawing_of(image, detections_of([], [], []), categories)
    assert (nothing == [0, 0, 200]).all()
    assert detections.boxes[0].tolist() == [10, 10, 30, 35]


def test_a_large_image_keeps_its_size():
    image = np.zeros((700, 650, 3), np.uint8)
    assert drawing_of(image, detections_of([], [], []), []).shape == image.shape


def test_coco_json_by_hand(tmp_path):
    predictions = CocoPredictions([Category(7, "seven"), Category(8, "eight")], {"weights": "w.pth"})
    predictions.add("first.jpg", (40, 60), detections_of([], [], []), "first.jpg")
    predictions.add("second.png", (40, 60), detections_of([[10, 20, 30, 25]], [0.75], [1]), "second.jpg")
    predictions.skip("third.jpg", "broken")
    content = predictions.to_dict()
    assert content["info"] == {"weights": "w.pth"}
    assert content["images"][1] == {
        "id": 2,
        "file_name": "second.png",
        "width": 60,
        "height": 40,
        "drawn_file": "second.jpg",
    }
    assert content["annotations"] == [
        {
            "id": 1,
            "image_id": 2,
            "category_id": 8,
            "bbox": [10.0, 20.0, 20.0, 5.0],
            "score": 0.75,
            "area": 100.0,
            "iscrowd": 0,
        }
    ]
    assert content["categories"] == [{"id": 7, "name": "seven"}, {"id": 8, "name": "eight"}]
    assert content["skipped"] == [{"file_name": "third.jpg", "reason": "broken"}]
    assert content["incomplete"] == []
    predictions.write(str(tmp_path / "predictions.json"))
    assert json.loads((tmp_path / "predictions.json").read_text()) == content
    assert predictions.num_detections == 1


# -------------------------------------------------------------------------------------- command


def predict(detector, *arguments):
    return main(["predict", "--config-file", detector.config_file, "--weights", detector.weights, *arguments])


def test_command_predicts_on_a_folder(detector, tmp_path, capsys):
    write_images(tmp_path / "in", 2)
    out = tmp_path / "results" / "out"
    status = predict(
        detector, "--input", str(tmp_path / "in"), "--output", str(out), "--score-threshold", "0.1"
    )
    assert status == 0
    assert sorted(os.listdir(out)) == ["0.jpg", "1.jpg", "predictions.json"]
    with Image.open(out / "0.jpg") as drawn:
        assert drawn.size == (640, 640)
    coco = COCO(str(out / "predictions.json"))
    assert len(coco.imgs) == 2 and len(coco.anns) > 0
    assert all(each["score"] >= 0.1 for each in coco.anns.values())
    assert coco.loadRes(list(coco.anns.values())) is not None
    content = json.loads((out / "predictions.json").read_text())
    assert content["skipped"] == []
    assert [each["file_name"] for each in content["images"]] == [
        str(tmp_path / "in" / "0.jpg"),
        str(tmp_path / "in" / "1.jpg"),
    ]
    assert content["info"]["weights"] == detector.weights
    assert f"detections: {len(coco.anns)}" in capsys.readouterr().out


def test_a_broken_image_is_reported_and_skipped(detector, tmp_path, capsys):
    good, = write_images(tmp_path / "in", 1)
    bad = tmp_path / "in" / "bad.png"
    bad.write_text("no image")
    assert predict(detector, "--input", str(bad), good, "--output", str(tmp_path / "out")) == 1
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 1 and str(bad) in skipped[0]
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [each["file_name"] for each in content["images"]] == [good]
    assert [each["file_name"] for each in content["skipped"]] == [str(bad)]
    assert sorted(os.listdir(tmp_path / "out")) == ["0.jpg", "predictions.json"]


def test_a_threshold_below_the_configs_takes_effect(detector, tmp_path):
    image, = write_images(tmp_path / "in", 1)
    counts = []
    for threshold in ("0", "0.99"):
        out = tmp_path / threshold
        options = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9", "TEST.DETECTIONS_PER_IMAGE", "5"]
        arguments = ["--input", image, "--output", str(out), "--score-threshold", threshold]
        assert predict(detector, *arguments, *options) == 0
        counts.append(len(json.loads((out / "predictions.json").read_text())["annotations"]))
    assert counts == [5, 0]


def test_results_are_no_input_the_next_time(detector, tmp_path):
    write_images(tmp_path, 1)
    for _ in range(2):
        assert predict(detector, "--input", str(tmp_path), "--output", str(tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(content["images"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "absent.jpg", "--output", "out"], "absent.jpg"),
        (["--input", "in", "--output", "in"], "might be overwritten"),
        (["--input", "in", "--output", "in/0.jpg"], "which is a file"),
        (["--input", "in", "--output", "out", "--score-threshold", "1.5"], "--score-threshold: '1.5'"),
        (["--input", "in", "--output", "out", "--score-threshold", "high"], "--score-threshold: 'high'"),
        (["--output", "out"], "--input"),
    ],
)
def test_mistakes_in_the_arguments(detector, tmp_path, monkeypatch, capsys, arguments, message):
    write_images(tmp_path / "in", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        predict(detector, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_wrong_weights_are_a_mistake_in_the_arguments(detector, tmp_path, capsys):
    image, = write_images(tmp_path / "in", 1)
    arguments = ["--input", image, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        predict(detector, *arguments, "MODEL.VGG.WIDTH_DIVISOR", "32")
    assert stopped.value.code == 2
    assert "--weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
