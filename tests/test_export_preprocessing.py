"""What happens to an image before the network and to boxes behind it, against Pillow and Detectron2."""

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from exported import random_image, run_without
from PIL import Image

from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.preprocessing import Detections, InputSpec, Placement, resize_bilinear
from qmimic_d2.image_file import UnusableImageError, as_bgr_image, read_bgr_image

pytestmark = pytest.mark.export

SPEC = InputSpec("BGR", 64, 128, least=8, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0))


@pytest.mark.parametrize("size", [(64, 64), (50, 33), (33, 50), (100, 900), (480, 640), (7, 9), (1, 1)])
def test_sizes_are_detectron2s(size):
    height, width = ResizeShortestEdge.get_output_shape(*size, 64, 128)
    assert SPEC.resized(*size) == (height, width)


def test_no_side_vanishes():
    assert SPEC.resized(1, 1000) == (1, 128)
    pixels, placement = SPEC.prepare(random_image(1, 1000))
    assert pixels.shape == (3, 8, 128) and placement == Placement(1, 1000, 1, 128)
    # below the image stands the mean, which normalization makes 0
    assert (pixels[:, 1:] == np.array([1, 2, 3])[:, None, None]).all()


def test_an_image_keeps_its_size_with_min_size_0():
    pixels, placement = InputSpec("BGR", 0, 0).prepare(random_image(30, 20))
    assert pixels.shape == (3, 30, 20) and placement == Placement(30, 20, 30, 20)


@pytest.mark.parametrize(
    "size, resized", [((60, 80), (48, 64)), ((80, 60), (64, 48)), ((64, 64), (64, 64)), ((1, 640), (1, 64))]
)
def test_a_fixed_size_holds_the_whole_image(size, resized):
    spec = InputSpec("BGR", 64, 128, fixed_height=64, fixed_width=64, pixel_mean=(9.0, 9.0, 9.0))
    pixels, placement = spec.prepare(random_image(*size))
    assert pixels.shape == (3, 64, 64)
    assert (placement.resized_height, placement.resized_width) == resized
    assert (pixels[:, resized[0] :] == 9).all() and (pixels[:, :, resized[1] :] == 9).all()


def test_channel_order():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :, 0] = 200  # blue
    assert SPEC.prepare(image)[0][:, 0, 0].tolist() == [200.0, 0.0, 0.0]
    rgb = InputSpec("RGB", 64, 128)
    assert rgb.prepare(image)[0][:, 0, 0].tolist() == [0.0, 0.0, 200.0]


@pytest.mark.parametrize("arguments", [("L", 64, 128), ("BGR", 64, 128, 10, 0), ("BGR", 64, 128, -1, -1)])
def test_impossible_inputs(arguments):
    with pytest.raises(ValueError, match="INPUT.FORMAT|both sides"):
        InputSpec(*arguments)


@pytest.mark.parametrize("size", [(128, 183), (18, 26), (80, 30), (128, 53), (37, 7), (37, 53), (1, 1)])
def test_resizing_is_detectron2s(size):
    image = random_image(37, 53)
    assert (resize_bilinear(image, *size) == ResizeTransform(37, 53, *size).apply_image(image)).all()


def test_without_pillow_the_error_names_it():
    code = (
        "try:\n"
        "    from qmimic_d2.export import OnnxDetector\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip install Pillow" in run_without(["detectron2", "PIL"], code)


def test_boxes_return_as_detectron2_returns_them():
    boxes = np.array([[1, 2, 30, 40], [-5, 3, 200, 90], [10, 10, 10, 20], [126, 60, 127, 64]], np.float32)
    scores, classes = np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([2, 0, 1, 1])
    found = Placement(50, 37, 64, 47).restore(boxes, scores, classes)
    instances = Instances(
        (64, 47),
        pred_boxes=Boxes(torch.from_numpy(boxes.copy())),
        scores=torch.from_numpy(scores),
        pred_classes=torch.from_numpy(classes),
    )
    expected = detector_postprocess(instances, 50, 37)
    assert found.boxes.tolist() == expected.pred_boxes.tensor.tolist() and len(found) == 2
    assert found.scores.tolist() == expected.scores.tolist()
    assert found.classes.tolist() == [2, 0]


def test_no_box_returns():
    found = Placement(50, 37, 64, 47).restore(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert (found.boxes.shape, found.scores.dtype, found.classes.dtype) == ((0, 4), np.float32, np.int64)


def test_detections_above_a_score():
    found = Detections(np.arange(8.0).reshape(2, 4), np.array([0.9, 0.5]), np.array([1, 0]))
    assert len(found.above(0.5)) == 2 and found.above(0.51).classes.tolist() == [1] and len(found.above(1.0)) == 0


# --------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "image, expected",
    [
        (np.full((2, 3), 7, np.uint8), [7, 7, 7]),
        (np.full((2, 3, 1), 7, np.uint8), [7, 7, 7]),
        (np.full((2, 3), 0x1234, np.uint16), [0x12] * 3),
        (np.full((2, 3, 4), [1, 2, 3, 0], np.uint8), [1, 2, 3]),
        (np.full((2, 3, 3), [0x100, 0x2FF, 0xFFFF], np.uint16), [1, 2, 255]),
    ],
)
def test_every_kind_of_array(image, expected):
    bgr = as_bgr_image(image)
    assert (bgr.shape, bgr.dtype) == ((2, 3, 3), np.uint8)
    assert bgr[1, 1].tolist() == expected


@pytest.mark.parametrize("image", [np.zeros((2, 3, 2), np.uint8), np.zeros((2, 3)), np.zeros((0, 3), np.uint8)])
def test_arrays_that_are_no_images(image):
    with pytest.raises(ValueError, match="give an image of shape"):
        as_bgr_image(image)


@pytest.mark.parametrize(
    "mode, color, expected",
    [("L", 77, [77] * 3), ("RGB", (1, 2, 3), [3, 2, 1]), ("RGBA", (1, 2, 3, 0), [3, 2, 1]), ("1", 1, [255] * 3)],
)
def test_every_mode_is_read_as_bgr(tmp_path, mode, color, expected):
    path = str(tmp_path / "image.png")
    Image.new(mode, (5, 4), color).save(path)
    assert read_bgr_image(path)[2, 2].tolist() == expected


def test_sixteen_bits_photographs_and_files_that_are_no_images(tmp_path):
    Image.fromarray(np.array([[0x1234, 0xFFFF]], np.uint16)).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "none.png").write_text("no image")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "real.tif")
    assert read_bgr_image(str(tmp_path / "deep.png"))[0].tolist() == [[0x12] * 3, [0xFF] * 3]
    assert read_bgr_image(str(tmp_path / "turned.jpg")).shape == (30, 20, 3)
    with pytest.raises(UnusableImageError, match="cannot be read"):
        read_bgr_image(str(tmp_path / "none.png"))
    with pytest.raises(UnusableImageError, match="NaN or infinite"):
        read_bgr_image(str(tmp_path / "real.tif"))


# ------------------------------------------------------------------------------ description


@pytest.mark.parametrize("spec", [SPEC, InputSpec("RGB", 0, 0), InputSpec("RGB", 1, 2, 32, 64)])
def test_a_description_survives_json(spec):
    description = ModelDescription(((3, "cat"), (9, "dog")), spec, 0.05, "a quantizer", {"weights": "w.pth"})
    assert ModelDescription.from_json(description.to_json()) == description
    assert description.names == ["cat", "dog"]
    preprocessing = description.to_dict()["preprocessing"]
    assert preprocessing["pixel_mean"] == list(spec.pixel_mean)
    assert preprocessing["size"] == ("32 x 64" if spec.is_fixed else "any")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99}', '{"version": 1}'])
def test_other_text_is_no_description(text):
    with pytest.raises(ValueError, match="no description of version 1"):
        ModelDescription.from_json(text)
