"""Mimic losses over small maps, and the equation written out in loops."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from qmimic_d2.modeling.mimic.loss import RoIMimicLoss
from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer

# Shape letters: N images, M regions, C and T channels, P bins.

QUANTIZERS = {
    "none": None,
    "uniform": UniformQuantizer(0.5),
    "bounded": UniformQuantizer(0.5, num_codes=3),
    "signed": UniformQuantizer(0.5, signed=True),
    "power_of_two": PowerOfTwoQuantizer(0.25),
    "clamp": ClampQuantizer(0.5),
}


def spec(channels, stride=8):
    return ShapeSpec(channels=channels, stride=stride)


def measured_pairs(loss, pairs):
    loss.write_diagnostics(pairs)
    return loss.loss(pairs)


def measured(loss, *arguments):
    return measured_pairs(loss, loss.pairs(*arguments))


def make_loss(student=2, teacher=3, **arguments):
    """A loss over one map "f" of stride 8, 2 x 2 bins, its adapter drawn from a fixed seed."""
    torch.manual_seed(0)
    arguments = {"pooler_resolution": 2, "pooler_sampling_ratio": 2, **arguments}
    loss = RoIMimicLoss(
        student_shapes={"f": spec(student)}, teacher_shapes={"f": spec(teacher)}, **arguments
    )
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.7)
    return loss


def maps(channels, seed, images=2, size=6, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return {"f": torch.randn(images, channels, size, size, generator=generator) * scale}


def three_boxes():
    return [
        Boxes(torch.tensor([[4.0, 4.0, 30.0, 20.0], [10.0, 0.0, 44.0, 44.0]])),
        Boxes(torch.tensor([[0.0, 8.0, 16.0, 40.0]])),
    ]


def no_boxes():
    return [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))]


def constant_maps(value, channels=1, images=2, size=6):
    return {"f": torch.full((images, channels, size, size), value)}


def set_adapter(loss, weight, bias, name="f"):
    nn.init.constant_(loss.adapters[name].weight, weight)
    nn.init.constant_(loss.adapters[name].bias, bias)


def pooled_by_detectron2(feature, boxes, pooler_type="ROIAlignV2"):
    pooler = ROIPooler(output_size=2, scales=[1 / 8], sampling_ratio=2, pooler_type=pooler_type)
    return pooler([feature], boxes)


LEVELS = ("p3", "p4", "p5")


def make_level_loss(**arguments):
    torch.manual_seed(0)
    shapes = {name: spec(2, 2 ** int(name[1])) for name in LEVELS}
    teacher_shapes = {f"teacher_{name}": spec(1, 2 ** int(name[1])) for name in LEVELS}
    arguments = {"pooler_resolution": 2, "pooler_sampling_ratio": 2, **arguments}
    loss = RoIMimicLoss(student_shapes=shapes, teacher_shapes=teacher_shapes, **arguments)
    for name in LEVELS:
        set_adapter(loss, 0.5, 0.0, name)
    return loss


def level_maps(values, channels, prefix=""):
    return {
        f"{prefix}{name}": torch.full((1, channels, 1024 // 2 ** int(name[1]), 1024 // 2 ** int(name[1])), value)
        for name, value in zip(LEVELS, values)
    }
