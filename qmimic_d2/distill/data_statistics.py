"""What the settings of a training depend on: numbers and sizes of images and boxes."""

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from detectron2.structures import BoxMode

__all__ = ["DataStatistics", "measure_data"]


@dataclass(frozen=True)
class DataStatistics:
    """
    Attributes:
        num_images: of the training set.
        classes: names.
        num_boxes: by class, in their order.
        long_side: median of the images' longer sides, in pixels.
        aspect: median of shorter side / longer side.
        relative_sizes: of every box, sqrt(width * height) / longer side of its image.
        class_sizes: the same by class, for classes with a box.
        class_ratios: height / width of every box, likewise.
        most_boxes: the largest number of boxes in one image.
    """

    num_images: int
    classes: Tuple[str, ...]
    num_boxes: Tuple[int, ...]
    long_side: float
    aspect: float
    relative_sizes: np.ndarray
    class_sizes: Dict[str, np.ndarray]
    class_ratios: Dict[str, np.ndarray]
    most_boxes: int

    def relative_size(self, share: float) -> float:
        """The relative size that this share of the boxes does not exceed."""
        return float(np.quantile(self.relative_sizes, share))

    def balanced_size(self, share: float) -> float:
        """The same where every class counts alike, however many boxes it has."""
        return _balanced(self.class_sizes, share)

    def balanced_ratio(self, share: float) -> float:
        """The height / width that this share of the boxes does not exceed, every class counting alike."""
        return _balanced(self.class_ratios, share)


def measure_data(dicts: Sequence[Dict[str, Any]], classes: Sequence[str]) -> DataStatistics:
    """
    Args:
        dicts: of a data set, as Detectron2 has them, with width and height.
        classes: names, in the order of the labels.

    Raises:
        ValueError: there is no image, or no box with an area.
    """
    if not dicts:
        raise ValueError("the training set has no image")
    sides = np.array([(each["width"], each["height"]) for each in dicts], dtype=float)
    sizes: List[List[float]] = [[] for _ in classes]
    ratios: List[List[float]] = [[] for _ in classes]
    most = 0
    for each in dicts:
        longer = max(each["width"], each["height"])
        boxes = [label for label in each["annotations"] if not label.get("iscrowd", 0)]
        most = max(most, len(boxes))
        for label in boxes:
            x0, y0, x1, y1 = BoxMode.convert(label["bbox"], label["bbox_mode"], BoxMode.XYXY_ABS)
            width, height = x1 - x0, y1 - y0
            if width > 0 and height > 0:
                sizes[label["category_id"]].append(float(np.sqrt(width * height)) / longer)
                ratios[label["category_id"]].append(height / width)
    if not any(sizes):
        raise ValueError("the training set has no box with an area")
    return DataStatistics(
        num_images=len(dicts),
        classes=tuple(classes),
        num_boxes=tuple(map(len, sizes)),
        long_side=float(np.median(sides.max(axis=1))),
        aspect=float(np.median(sides.min(axis=1) / sides.max(axis=1))),
        relative_sizes=np.concatenate([np.asarray(each) for each in sizes]),
        class_sizes={name: np.asarray(each) for name, each in zip(classes, sizes) if each},
        class_ratios={name: np.asarray(each) for name, each in zip(classes, ratios) if each},
        most_boxes=most,
    )


def _balanced(of_class: Dict[str, np.ndarray], share: float) -> float:
    shares = np.linspace(0.0, 1.0, 101)
    return float(np.quantile(np.concatenate([np.quantile(each, shares) for each in of_class.values()]), share))
