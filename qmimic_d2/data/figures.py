"""Numbers and sizes of the images and boxes of a data set."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from detectron2.structures import BoxMode

__all__ = ["DataFigures", "measure_dataset"]


@dataclass(frozen=True)
class DataFigures:
    """
    N images and B boxes that are no crowd; pixels are those of the images in their files.

    Attributes:
        classes: names, in the order of the labels.
        image_sizes: (N, 2) width and height; NaN where the data set does not give them.
        boxes_of_images: (N,) number of boxes.
        labels: (B,) numbers of the classes.
        box_sizes: (B, 2) width and height.
        longer_sides: (B,) the longer side of the box's image.
        num_crowds: boxes with ``iscrowd`` 1.
    """

    classes: Tuple[str, ...]
    image_sizes: np.ndarray
    boxes_of_images: np.ndarray
    labels: np.ndarray
    box_sizes: np.ndarray
    longer_sides: np.ndarray
    num_crowds: int

    def class_counts(self) -> Dict[str, int]:
        """Number of boxes by class, in the order of the labels."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist()))

    def sizes(self) -> np.ndarray:
        """(B,) sqrt(width * height) in pixels."""
        return np.sqrt(self.box_sizes.prod(axis=1))

    def relative_sizes(self) -> np.ndarray:
        """(B,) the same, divided by the longer side of the image."""
        return self.sizes() / self.longer_sides


def measure_dataset(dicts: Sequence[Dict[str, Any]], classes: Sequence[str]) -> DataFigures:
    """
    Args:
        dicts: of a data set, as Detectron2 has them.
        classes: names, in the order of the labels.
    """
    images: List[Tuple[float, float]] = []
    counts: List[int] = []
    labels: List[int] = []
    sides: List[Tuple[float, float]] = []
    longer: List[float] = []
    crowds = 0
    for each in dicts:
        size = float(each.get("width", math.nan)), float(each.get("height", math.nan))
        boxes = [label for label in each.get("annotations", ()) if not label.get("iscrowd", 0)]
        crowds += len(each.get("annotations", ())) - len(boxes)
        images.append(size)
        counts.append(len(boxes))
        for label in boxes:
            labels.append(label["category_id"])
            sides.append(_sides(label["bbox"], label["bbox_mode"]))
            longer.append(max(size))
    return DataFigures(
        classes=tuple(classes),
        image_sizes=np.array(images, dtype=float).reshape(-1, 2),
        boxes_of_images=np.array(counts, dtype=int),
        labels=np.array(labels, dtype=int),
        box_sizes=np.maximum(np.array(sides, dtype=float).reshape(-1, 2), 0.0),
        longer_sides=np.array(longer, dtype=float),
        num_crowds=crowds,
    )


def _sides(box: Sequence[float], mode: BoxMode) -> Tuple[float, float]:
    if mode == BoxMode.XYWH_ABS:  # BoxMode.convert makes tensors, which takes long for each box
        return box[2], box[3]
    x0, y0, x1, y1 = box if mode == BoxMode.XYXY_ABS else BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS)
    return x1 - x0, y1 - y0
