"""Ground truth and every run's detections on the same images."""

import base64
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import cv2
import numpy as np

from qmimic_d2.report.samples import Box, Sample, match

__all__ = ["GROUND_TRUTH", "Picture", "PictureRow", "detection_picture", "picture_row"]

# Number that stands for the ground truth where others stand for runs.
GROUND_TRUTH = -1

# Pixels of the longer side; larger images are made smaller, for the size of the page.
_LONGEST_SIDE = 512


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
class PictureRow:
    """
    An image and the pictures of it.

    Attributes:
        name: of the image.
        uri: the image itself, as a data URI.
        width, height: in pixels of the boxes.
        pictures: the ground truth first.
    """

    name: str
    uri: str
    width: int
    height: int
    pictures: List[Picture]


def picture_row(name: str, sample: Sample) -> PictureRow:
    """The image with its ground truth alone."""
    height, width = sample.pixels.shape[:2]
    count = len(sample.truth)
    summary = f"{count} object{'' if count == 1 else 's'}"
    truth = Picture(GROUND_TRUTH, [(box, "truth") for box in sample.truth], summary)
    return PictureRow(name, _data_uri(sample.pixels), width, height, [truth])


def detection_picture(number: int, truth: Sequence[Box], found: Sequence[Box]) -> Picture:
    """A run's detections on an image, by falling score; :func:`qmimic_d2.report.samples.match` says which are right."""
    was_found, is_right = match(truth, found)
    boxes = [(box, "missed") for box, known in zip(truth, was_found) if not known]
    boxes += [(box, "right" if right else "wrong") for box, right in zip(found, is_right)]
    summary = f"{sum(was_found)} of {len(truth)} found, {len(found) - sum(is_right)} wrong"
    return Picture(number, boxes, summary)


def _data_uri(pixels: np.ndarray) -> str:
    scale = _LONGEST_SIDE / max(pixels.shape[:2])
    if scale < 1.0:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
