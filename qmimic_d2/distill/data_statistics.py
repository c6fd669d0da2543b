"""What the settings of a training depend on: numbers and sizes of images and boxes."""

from dataclasses import dataclass
from typing import Any, Dict, Sequence, Tuple

import numpy as np

from qmimic_d2.data.figures import measure_dataset

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
    found = measure_dataset(dicts, classes)
    has_area = (found.box_sizes > 0).all(axis=1)
    if not has_area.any():
        raise ValueError("the training set has no box with an area")
    labels, sizes = found.labels[has_area], found.relative_sizes()[has_area]
    ratios = found.box_sizes[has_area, 1] / found.box_sizes[has_area, 0]
    of_class = {name: labels == label for label, name in enumerate(classes) if (labels == label).any()}
    sides = found.image_sizes
    return DataStatistics(
        num_images=len(dicts),
        classes=tuple(classes),
        num_boxes=tuple(np.bincount(labels, minlength=len(classes)).tolist()),
        long_side=float(np.median(sides.max(axis=1))),
        aspect=float(np.median(sides.min(axis=1) / sides.max(axis=1))),
        relative_sizes=sizes,
        class_sizes={name: sizes[is_class] for name, is_class in of_class.items()},
        class_ratios={name: ratios[is_class] for name, is_class in of_class.items()},
        most_boxes=int(found.boxes_of_images.max()),
    )


def _balanced(of_class: Dict[str, np.ndarray], share: float) -> float:
    shares = np.linspace(0.0, 1.0, 101)
    return float(np.quantile(np.concatenate([np.quantile(each, shares) for each in of_class.values()]), share))
