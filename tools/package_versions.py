"""Versions of what computed a result, to be kept beside it."""

import platform
from typing import Dict

import cv2
import detectron2
import numpy as np
import torch
import torchvision

import qmimic_d2

__all__ = ["package_versions"]


def package_versions() -> Dict[str, str]:
    """By name of the package."""
    return {
        "qmimic_d2": qmimic_d2.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
