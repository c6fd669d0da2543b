"""One image has one set of pixels: in the loaders, the calibration and predict."""

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg
from PIL import Image
from tiny_coco import registered
from tiny_training import write_coco

from qmimic_d2 import image_file
from qmimic_d2.analysis.calibration import build_calibration_loader
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.mapper import ImageMapper, read_image
from qmimic_d2.data.resumable_loader import build_resumable_train_loader
from qmimic_d2.engine import MimicEvaluator, Trainer
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.image_file import UnusableImageError, as_bgr_image, image_size, read_bgr_image

WIDTH, HEIGHT = 64, 48
_GENERATOR = np.random.default_rng(0)
COLOURS = _GENERATOR.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = _GENERATOR.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
GREY[0, :2] = 0, 255


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(image_file, "_warned", set())


def saved(path, array, orientation=1, mode=None):
    image = Image.fromarray(array)
    image = image.convert(mode) if mode else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return str(path)


# ------------------------------------------------------------------------------------------- rules of scaling

# Values as they are in the file, pixels, and a part of the warning.
SCALED = {
    "8 bits in 16": (np.uint16, [0, 7, 255], [0, 7, 255], "at most 255"),
    "12 bits in 16": (np.uint16, [0, 31, 4095], [0, 1, 255], "at most 4095"),
    "16 bits": (np.uint16, [0, 0x1234, 0xFFFF], [0, 0x12, 0xFF], ""),
    "16 bits in 32": (np.int32, [-5, 0x1234, 0xFFFF], [0, 0x12, 0xFF], "below 0"),
    "12 bits in 32": (np.int32, [0, 31, 4095], [0, 1, 255], "at most 4095"),
    "real 0 to 1": (np.float32, [0.0, 0.5, 1.0], [0, 128, 255], "multiplied by 255"),
    "real 0 to 255": (np.float32, [0.4, 7.6, 255.0], [0, 8, 255], "rounded"),
    "real 0 to 65535": (np.float32, [0.0, 4660.9, 65535.0], [0, 0x12, 255], "divided by 256"),
    "real below 0": (np.float32, [-0.5, 0.2, 1.0], [0, 51, 255], "below 0"),
}


@pytest.mark.parametrize("kind", SCALED)
def test_more_bits_than_eight(tmp_path, caplog, kind):
    dtype, values, pixels, warning = SCALED[kind]
    paths = []
    for number in range(2):
        paths.append(saved(tmp_path / f"{number}.tif", np.array([values], dtype)))
    for path in paths:
        assert read_bgr_image(path)[0].tolist() == [[each] * 3 for each in pixels]
        assert read_image(path, "BGR")[0].tolist() == [[each] * 3 for each in pixels]
    kinds = [record.getMessage() for record in caplog.records if warning in record.getMessage()]
    assert len(kinds) == (1 if warning else 0), "a kind is warned of once"
    assert all(paths[0] in each for each in kinds)
    assert as_bgr_image(np.array([values], dtype))[0, :, 0].tolist() == pixels


@pytest.mark.parametrize(
    "dtype, value, words",
    [
        (np.int32, 70000, "up to 70000"),
        (np.float32, 1e9, "up to"),
        (np.float32, np.nan, "NaN"),
        (np.float32, np.inf, "NaN"),
    ],
)
def test_values_that_no_rule_covers(tmp_path, dtype, value, words):
    path = saved(tmp_path / "image.tif", np.array([[0, value]], dtype))
    with pytest.raises(UnusableImageError, match=words):
        read_bgr_image(path)


def test_colours_of_sixteen_bits_keep_the_upper_eight(tmp_path):
    import cv2

    path = str(tmp_path / "deep.png")
    cv2.imwrite(path, COLOURS.astype(np.uint16) * 256 + 7)
    assert (read_bgr_image(path) == COLOURS).all()


# --------------------------------------------------------------------------------- Detectron2's pixels, and turning


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_pixels_of_eight_bits_are_detectron2s(tmp_path, mode, image_format):
    path = saved(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"), COLOURS, 6, mode)
    ours, detectron2s = read_image(path, image_format), detection_utils.read_image(path, image_format)
    assert ours.shape[:2] == (WIDTH, HEIGHT) and ours.dtype == detectron2s.dtype and (ours == detectron2s).all()
    if image_format == "BGR":
        assert (read_bgr_image(path) == ours).all()


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("ending", ["tif", "png"])
def test_every_orientation_is_turned_once(tmp_path, orientation, ending):
    path = saved(tmp_path / f"image.{ending}", COLOURS, orientation)
    upright = UPRIGHT[orientation](COLOURS)
    assert (read_image(path, "RGB") == upright).all()
    assert (read_bgr_image(path) == upright[:, :, ::-1]).all()
    assert image_size(path) == upright.shape[1::-1]


def test_an_image_that_is_too_large(tmp_path, monkeypatch):
    path = saved(tmp_path / "image.png", COLOURS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are an error
    for read in (read_bgr_image, image_size):
        with pytest.raises(UnusableImageError, match="DecompressionBombError"):
            read(path)


def test_lab_colours_are_detectron2s(tmp_path):
    path = str(tmp_path / "lab.tif")
    Image.fromarray(COLOURS).convert("LAB").save(path)
    assert (read_bgr_image(path) == detection_utils.read_image(path, "BGR")).all()


# ------------------------------------------------------------------------------------------------------ all sides

KINDS = {
    "16 bits": ("png", GREY.astype(np.uint16) * 257, 1),
    "12 bits": ("png", GREY.astype(np.uint16) * 16, 1),
    "real": ("tif", GREY.astype(np.float32) / 255, 1),
    "turned TIFF": ("tif", COLOURS, 3),
    "quarter of a turn": ("tif", COLOURS.transpose(1, 0, 2).copy(), 6),
    "photograph": ("jpg", COLOURS, 3),
}


@pytest.fixture(params=KINDS)
def dataset(request, tmp_path):
    """Four images of a kind, registered, and the path of the first."""
    import json

    ending, array, orientation = KINDS[request.param]
    write_coco(tmp_path / "annotations.json", tmp_path / "images", 4)
    content = json.loads((tmp_path / "annotations.json").read_text())
    for image in content["images"]:
        image.update(file_name=f"{image['id']}.{ending}", width=WIDTH, height=HEIGHT)
        path = saved(tmp_path / "images" / image["file_name"], array, orientation)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with registered(tmp_path, "tiny_pixels"):
        yield path


class FindsNothing(torch.nn.Module):
    """A detector that keeps the first inputs that it gets."""

    inputs = None

    def forward(self, inputs):
        self.inputs = self.inputs or inputs
        found = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.zeros(0, 4)))
        found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        return [{"instances": found}] * len(inputs)


def test_every_side_sees_the_same_pixels(dataset, tmp_path):
    name = "tiny_pixels"
    cfg = tiny_cfg(
        *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.RANDOM_FLIP", "none"),
        *("INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.MIN_SIZE_TEST", HEIGHT, "INPUT.MAX_SIZE_TRAIN", 999),
        *("SOLVER.IMS_PER_BATCH", 1, "INPUT.MAX_SIZE_TEST", 999, "OUTPUT_DIR", str(tmp_path / "output")),
    )
    expected = read_bgr_image(dataset)
    assert expected.shape == (HEIGHT, WIDTH, 3) and len(np.unique(expected)) > 50

    def check(batch, side):
        assert (batch[0]["image"].numpy().transpose(1, 2, 0) == expected).all(), side

    loader, _ = build_resumable_train_loader(cfg, seed=0)
    check(next(iter(loader)), "training")
    check(next(iter(Trainer.build_test_loader(cfg, name))), "evaluation")
    loader, number = build_calibration_loader(cfg, [name], 2)
    assert number == 4
    check(next(iter(loader)), "calibration")
    detector = FindsNothing()
    APEvaluation(cfg, name)(detector)
    check(detector.inputs, "AP")
    mapper = MimicEvaluator.from_config(cfg)["mapper"]
    check([mapper(load_dataset(name)[0])], "student against teacher")
    assert isinstance(mapper, ImageMapper)


def test_labels_of_semantic_segmentation_are_not_scaled(tmp_path):
    labels = (GREY % 3).astype(np.uint8)
    record = {
        "file_name": saved(tmp_path / "image.png", COLOURS),
        "sem_seg_file_name": saved(tmp_path / "labels.png", labels),
    }
    mapper = ImageMapper(is_train=True, augmentations=[], image_format="BGR")
    assert (mapper(record)["sem_seg"].numpy() == labels).all()


def test_masks_keypoints_and_proposals_are_mapped_as_by_detectron2(tmp_path):
    from detectron2.data import DatasetMapper
    from detectron2.structures import BoxMode

    record = {
        "file_name": saved(tmp_path / "image.png", COLOURS),
        "annotations": [
            {
                "bbox": [1, 2, 30, 40],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "segmentation": [[1, 2, 30, 2, 30, 40]],
                "keypoints": [3, 4, 2],
            }
        ],
        "proposal_boxes": np.array([[0.0, 0.0, 9.0, 9.0]]),
        "proposal_objectness_logits": np.array([1.0]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    options = dict(
        augmentations=[], image_format="RGB", use_instance_mask=True, use_keypoint=True, precomputed_proposal_topk=5
    )
    ours, detectron2s = (each(True, **options)(record) for each in (ImageMapper, DatasetMapper))
    assert (ours["image"] == detectron2s["image"]).all() and set(ours) == set(detectron2s)
    assert set(ours["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_masks", "gt_keypoints"}
    assert (ours["instances"].gt_boxes.tensor == detectron2s["instances"].gt_boxes.tensor).all()
    assert (ours["proposals"].proposal_boxes.tensor == detectron2s["proposals"].proposal_boxes.tensor).all()
