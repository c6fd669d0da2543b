"""Frozen teachers, and a backbone to read preprocessing from."""

import torch
from helpers import tiny_cfg
from torch import nn

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

CONFIG_FILE = "MODEL.QMIMIC.TEACHER.CONFIG_FILE"
OPTS = "MODEL.QMIMIC.TEACHER.OPTS"
INPUT_SCALE = "MODEL.QMIMIC.TEACHER.INPUT_SCALE"
NO_QUANTIZER = ("MODEL.QMIMIC.QUANTIZER.NAME", "")
P3_TO_P5 = ("MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["p3", "p4", "p5"])


def inputs(*images):
    return [{"image": each} for each in images]


def preprocessed(pixels, mean, std):
    column = (-1, 1, 1)
    return (pixels.float() - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)


def plain_teacher(written, *options):
    """The written teacher without a quantizer."""
    return FrozenTeacher(tiny_cfg(*written.options, *NO_QUANTIZER, *options))


class Brightness(nn.Module):
    """A backbone whose map is the preprocessed image itself, to read preprocessing and padding from."""

    size_divisibility = 0
    padding_constraints = {}

    def __init__(self, size_divisibility=0, padding_constraints=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)
        self.size_divisibility = size_divisibility
        self.padding_constraints = padding_constraints or {}

    def forward(self, x):
        return {"pixels": x * self.weight}

    def output_shape(self):
        return {"pixels": None}


def brightness_teacher(backbone=None, **arguments):
    arguments = {
        "pixel_mean": [0.0, 0.0, 0.0],
        "pixel_std": [1.0, 1.0, 1.0],
        "input_format": "BGR",
        "student_input_format": "BGR",
        **arguments,
    }
    return FrozenTeacher(backbone=backbone or Brightness(), features=["pixels"], **arguments)
