"""
Ground truth and every run's detections on the same images.

Shape letters:
    T: boxes of the ground truth in an image.
    D: detections in an image.
"""

import base64
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from torch import tensor

from qmimic_d2.data.loading import load_dataset
from qmimic_d2.files import read_json
from qmimic_d2.image_file import read_bgr_image
from qmimic_d2.report.metrics import is_number

__all__ = ["GROUND_TRUTH", "Box", "Picture", "Sample", "load_samples", "match", "predicted_boxes", "read_detections"]

# Number that stands for the ground truth where others stand for runs.
GROUND_TRUTH = -1
# Pixels of the longer side; larger images are made smaller, for the size of the page.
_LONGEST_SIDE = 512

# Least overlap at which a detection counts as right: that of AP50.
MATCHING_IOU = 0.5


@dataclass(frozen=True)
class Box:
    """
    Attributes:
        corners: x0, y0, x1, y1 in pixels of the image.
        category: class index.
        label: class name.
        score: of a detection; None in the ground truth.
    """

    corners: Tuple[float, float, float, float]
    category: int
    label: str
    score: Optional[float] = None


@dataclass
class Picture:
    """
    Boxes on an image.

    Attributes:
        number: of the run, or :data:`GROUND_TRUTH`.
        boxes: each with "truth", "right", "wrong", or "missed" (in the ground truth, and not found).
        summary: in words.
    """

    number: int
    boxes: List[Tuple[Box, str]]
    summary: str


@dataclass
class Sample:
    """
    An image and the pictures of it.

    Attributes:
        image_id: in the data set.
        name: of its file, as the page shows it.
        pixels: shape (H, W, 3), BGR, uint8.
        truth: T boxes; crowds are left out.
        height, width: in pixels of the boxes.
        pictures: the ground truth first.
    """

    image_id: Any
    name: str
    pixels: np.ndarray
    truth: List[Box]
    height: int = field(init=False)
    width: int = field(init=False)
    pictures: List[Picture] = field(init=False)

    def __post_init__(self):
        self.height, self.width = self.pixels.shape[:2]
        summary = f"{len(self.truth)} object{'' if len(self.truth) == 1 else 's'}"
        self.pictures = [Picture(GROUND_TRUTH, [(box, "truth") for box in self.truth], summary)]

    @property
    def uri(self) -> str:
        """The image itself, as a data URI."""
        scale, pixels = _LONGEST_SIDE / max(self.pixels.shape[:2]), self.pixels
        if scale < 1.0:
            pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])
        return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")

    def add_detections(self, number: int, found: Sequence[Box]) -> None:
        """Adds the picture of a run's detections, which come by falling score."""
        was_found, is_right = match(self.truth, found)
        boxes = [(box, "missed") for box, known in zip(self.truth, was_found) if not known]
        boxes += [(box, "right" if right else "wrong") for box, right in zip(found, is_right)]
        summary = f"{sum(was_found)} of {len(self.truth)} found, {len(found) - sum(is_right)} wrong"
        self.pictures.append(Picture(number, boxes, summary))


def load_samples(dataset: str, count: int) -> Tuple[List[Sample], int]:
    """
    The first images of a data set: nobody chose them.

    Returns:
        At most ``count`` images, and the number of images in the set.

    Raises:
        KeyError, OSError, ValueError: the data set is not registered, or its files are not there.
    """
    dicts = load_dataset(dataset)
    samples = []
    for each in dicts[:count]:
        truth = []
        for annotation in each.get("annotations", []):
            if not annotation.get("iscrowd", 0):
                box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
                truth.append(_box(box, annotation["category_id"], dataset))
        path = each["file_name"]
        samples.append(Sample(each["image_id"], os.path.basename(path), read_bgr_image(path), truth))
    return samples, len(dicts)


def read_detections(path: str, dataset: str, samples: Sequence[Sample], threshold: float) -> List[List[Box]]:
    """
    Detections of an evaluation, from ``coco_instances_results.json``: for every sample, by falling score.

    Args:
        threshold: least score.

    Raises:
        OSError, ValueError: the file cannot be read, or is of another make; names it.
    """
    classes: Dict[int, int] = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id", None) or {}
    found: Dict[Any, List[Box]] = {sample.image_id: [] for sample in samples}
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path!r} is no list of COCO detections")
    for number, each in enumerate(content):
        if not _is_detection(each):
            raise ValueError(f"{path!r}: entry {number} is no detection with image_id, category_id, bbox and score")
        if each["image_id"] in found and each["score"] >= threshold:
            x0, y0, width, height = each["bbox"]
            category = classes.get(each["category_id"], each["category_id"])
            corners = (x0, y0, x0 + width, y0 + height)
            found[each["image_id"]].append(_box(corners, category, dataset, each["score"]))
    return [_by_score(found[sample.image_id]) for sample in samples]


def predicted_boxes(instances: Instances, dataset: str, threshold: float) -> List[Box]:
    """The same of a predictor's output for one image."""
    corners, categories = instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
    scored = zip(corners, categories, instances.scores.tolist())
    return _by_score([_box(*box, dataset, score) for *box, score in scored if score >= threshold])


def match(truth: Sequence[Box], found: Sequence[Box]) -> Tuple[List[bool], List[bool]]:
    """
    Which detections are right: by falling score, each takes the ground-truth box of its class that it overlaps most
    and that no earlier one took, if their IoU is at least 0.5.

    Args:
        truth: T boxes.
        found: D detections by falling score.

    Returns:
        For each of the T boxes whether it was found, and for each of the D detections whether it is right.
    """
    was_found, is_right = [False] * len(truth), [False] * len(found)
    if truth and found:
        overlaps = pairwise_iou(*(Boxes(tensor([box.corners for box in each])) for each in (found, truth)))
        for index, box in enumerate(found):
            free = [
                other
                for other, each in enumerate(truth)
                if each.category == box.category and not was_found[other] and overlaps[index, other] >= MATCHING_IOU
            ]
            if free:
                best = max(free, key=lambda other: float(overlaps[index, other]))
                was_found[best] = is_right[index] = True
    return was_found, is_right


def _is_detection(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), (int, str)):
        return False
    box = entry.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    return is_box and is_number(entry.get("score")) and type(entry.get("category_id")) is int


def _by_score(boxes: List[Box]) -> List[Box]:
    return sorted(boxes, key=lambda box: -box.score)


def _box(corners: Sequence[float], category: int, dataset: str, score: Optional[float] = None) -> Box:
    names = MetadataCatalog.get(dataset).get("thing_classes", None) or []
    label = str(names[category]) if 0 <= category < len(names) else str(category)
    return Box(tuple(map(float, corners)), int(category), label, None if score is None else float(score))
