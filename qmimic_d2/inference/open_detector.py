"""A detector that is ready for images, in whatever it runs."""

from dataclasses import dataclass
from typing import Callable, List

import numpy as np

from qmimic_d2.export import Detections
from qmimic_d2.inference.categories import Category

__all__ = ["OpenDetector"]


@dataclass(frozen=True)
class OpenDetector:
    """
    Attributes:
        detect: from an image (H, W, 3), BGR, uint8, to its :class:`Detections`.
        categories: in the order of the class indices.
        config_file, weights: where it came from; one file has no weights apart.
        note: what the user should know about it; "" for nothing.
    """

    detect: Callable[[np.ndarray], Detections]
    categories: List[Category]
    config_file: str
    weights: str
    note: str = ""
