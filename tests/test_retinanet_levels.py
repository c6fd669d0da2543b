"""The two levels that Detectron2's RetinaNet adds to its FPN, p6 and p7, on divided backbones."""

import pytest
import torch
from detectron2.modeling import build_backbone
from helpers import batch, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2.modeling.family import named_head_features

RESNET = (
    *("MODEL.BACKBONE.NAME", "build_divided_retinanet_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.WIDTH_DIVISOR", 16, "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.QMIMIC.QUANTIZER.SIGNED", True),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
)
VGG = (
    *("MODEL.BACKBONE.NAME", "build_retinanet_vgg_fpn_backbone", "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 2]),
    *("MODEL.VGG.OUT_FEATURES", ["conv3", "conv4", "conv5"], "MODEL.FPN.IN_FEATURES", ["conv3", "conv4", "conv5"]),
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.QMIMIC.QUANTIZER.SIGNED", True),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
)
LEVELS = ["p3", "p4", "p5", "p6", "p7"]
HEADS = {
    family: (f"MODEL.{family.upper()}.NUM_CLASSES", 3, f"MODEL.{family.upper()}.NUM_CONVS", 1)
    for family in ("RetinaNet", "FCOS")
}


@pytest.mark.parametrize("backbone, network", [(RESNET, "res5"), (VGG, "conv5")], ids=["ResNet", "VGG"])
def test_both_levels_are_convolutions_of_the_networks_last_map(backbone, network):
    torch.manual_seed(0)
    model = build_backbone(tiny_cfg(*backbone)).eval()
    strides = {name: shape.stride for name, shape in model.output_shape().items()}
    assert strides == {name: 2 ** int(name[1]) for name in LEVELS}
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        maps, last = model(images), model.bottom_up(images)[network]
        block = model.top_block
        assert torch.equal(maps["p6"], block.p6(last))
        assert torch.equal(maps["p7"], block.p7(block.p6(last).relu()))
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        name: (1, 8, 128 // stride, 128 // stride) for name, stride in strides.items()
    }


def test_undivided_it_is_detectron2s():
    widths = (
        *(*RESNET, "MODEL.RESNETS.WIDTH_DIVISOR", 1, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    )
    backbones = []
    for name in ("build_divided_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"):
        torch.manual_seed(0)
        backbones.append(build_backbone(tiny_cfg(*widths, "MODEL.BACKBONE.NAME", name)).eval())
    ours, stock = (dict(each.state_dict()) for each in backbones)
    assert list(ours) == list(stock) and all(torch.equal(each, stock[name]) for name, each in ours.items())
    with torch.no_grad():
        first, second = (each(torch.ones(1, 3, 64, 64)) for each in backbones)
    assert list(first) == list(second) == LEVELS and all(torch.equal(first[name], second[name]) for name in LEVELS)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("backbone", [RESNET, VGG], ids=["ResNet", "VGG"])
def test_a_student_with_detectron2s_default_levels_learns_at_all_of_them(tmp_path, backbone, family):
    detector = ("MODEL.META_ARCHITECTURE", f"Quant{family}", *HEADS[family])
    teacher = write_teacher(tmp_path, *backbone, *detector)
    options = (*backbone, *HEADS[family], *teacher.options, "MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["whole_map"])
    model = seeded_model(tiny_cfg(*options, meta_architecture=f"QuantMimic{family}"))
    step = training_step(model, batch((128, 128)))
    assert [name for name in step.losses if "mimic" in name] == [f"loss_mimic_{name}" for name in LEVELS]
    assert all(step.losses[f"loss_mimic_{name}"].item() > 0.0 for name in LEVELS)
    assert "backbone.top_block.p7.weight" in step.gradients


def test_strides_that_do_not_double_are_refused():
    with pytest.raises(ValueError, match="MODEL.VGG.STAGE_STRIDES"):
        build_backbone(tiny_cfg(*VGG, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 1, 1]))


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS", "RCNN"])
def test_a_map_that_the_backbone_does_not_give_is_named_with_its_key(family):
    key = {"RetinaNet": "MODEL.RETINANET", "FCOS": "MODEL.FCOS", "RCNN": "MODEL.RPN"}[family] + ".IN_FEATURES"
    options = (*RESNET, "MODEL.BACKBONE.NAME", "build_divided_resnet_fpn_backbone", key, LEVELS)
    with pytest.raises(ValueError) as error:
        seeded_model(tiny_cfg(*options, meta_architecture=f"Quant{family}"))
    assert key in str(error.value) and "'p7'" in str(error.value)
    if family != "FCOS":
        assert "build_divided_retinanet_resnet_fpn_backbone" in str(error.value)


def test_another_missing_key_stays_what_it_is():
    with pytest.raises(KeyError, match="another"), named_head_features(tiny_cfg(), "RPN"):
        raise KeyError("another")
