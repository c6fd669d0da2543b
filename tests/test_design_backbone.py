"""A project's own backbone: Detectron2's registry, and nothing of this package."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from helpers import batch, seeded_model, tiny_cfg, training_step, write_teacher
from torch import nn


class Stem(Backbone):
    """One convolution of stride 8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, stride=8)

    def output_shape(self):
        return {"stem": ShapeSpec(channels=5, stride=8)}

    def forward(self, x):
        return {"stem": self.conv(x).relu()}


def build_stem_backbone(cfg, input_shape):
    return Stem()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    # a project writes @BACKBONE_REGISTRY.register() above the function; the test forgets it afterwards
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_stem_backbone", build_stem_backbone)


def test_a_backbone_of_ones_own_is_quantized_and_taught(tmp_path):
    teacher = write_teacher(tmp_path)
    own = ("MODEL.BACKBONE.NAME", "build_stem_backbone", "MODEL.RPN.IN_FEATURES", ["stem"])
    maps = ("MODEL.ROI_HEADS.IN_FEATURES", ["stem"], "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["conv5"])
    cfg = tiny_cfg(*teacher.options, *own, *maps, meta_architecture="QuantMimicRCNN")
    model = seeded_model(cfg)
    assert training_step(model, batch()).losses["loss_mimic"] > 0.0
    codes = model.backbone(torch.rand(1, 3, 64, 64) * 255.0)["stem"] / cfg.MODEL.QMIMIC.QUANTIZER.STRIDE
    assert torch.equal(codes, codes.round()) and codes.max() > 0.0
