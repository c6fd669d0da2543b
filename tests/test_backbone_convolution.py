"""Group and depthwise separable convolutions in the backbones: counts by hand, values, gradients, bad input."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from helpers import batch, seeded_model, tiny_cfg, training_step
from torch import nn
from torch.nn import functional as F

from qmimic_d2.analysis import measure_cost
from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.backbone import VGG, make_divided_resnet
from qmimic_d2.modeling.backbone.convolution import DepthwiseSeparableConv, build_conv3x3

VGG_CONV = "MODEL.VGG.CONV"
VGG_GROUPS = "MODEL.VGG.CONV_GROUPS"


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def conv3x3(conv, **options):
    arguments = {"node": "MODEL.VGG", "groups": 2, "in_channels": 4, "out_channels": 6}
    return build_conv3x3(conv=conv, **{**arguments, **options})


# ------------------------------------------------------------------------------------ parameters and FLOPs


def test_parameters_of_vgg_by_hand():
    # VGG-11 over 32: 2, 4, 8, 16, 16 channels. The first convolution stays plain: 3*2*9 = 54, BN 2*2.
    # Depthwise separable, C to D channels: 9*C + 2*C and C*D + 2*D.
    #   conv1 58
    #   conv2 18+4 + 8+8 = 38
    #   conv3 36+8 + 32+16 = 92;    72+16 + 64+16 = 168
    #   conv4 72+16 + 128+32 = 248; 144+32 + 256+32 = 464
    #   conv5 464, twice
    arguments = {"depth": 11, "width_divisor": 32, "norm": "BN"}
    assert num_parameters(VGG(conv="depthwise", **arguments)) == 58 + 38 + 92 + 168 + 248 + 464 + 2 * 464
    # Two groups halve every 3x3 convolution but the first: 9*C*D/2 + 2*D.
    #   conv2 36+8; conv3 144+16, 288+16; conv4 576+32, 1152+32; conv5 1152+32, twice
    groups = num_parameters(VGG(conv="group", conv_groups=2, **arguments))
    assert groups == 58 + 44 + 160 + 304 + 608 + 1184 + 2 * 1184
    # Without norm a bias takes its place, in the depthwise convolution too; without the last norm only there.
    plain = {"depth": 11, "width_divisor": 32}
    num_outputs = 2 + (2 + 4) + (4 + 8) + (8 + 8) + (8 + 16) + 3 * (16 + 16)
    with_norm = num_parameters(VGG(conv="depthwise", **arguments))
    assert num_parameters(VGG(conv="depthwise", **plain)) == with_norm - num_outputs
    assert num_parameters(VGG(conv="depthwise", last_norm=False, **arguments)) == with_norm - 16


def test_parameters_of_resnet_by_hand():
    # ResNet-18 over 16: 4 channels in stem and res2, then 8, 16, 32; see test_backbone_resnet.py for "plain".
    #   stem 596
    #   res2 4 * (36+8 + 16+8 = 68)
    #   res3 (36+8 + 32+16 = 92) + 3 * (72+16 + 64+16 = 168), shortcut 32+16
    #   res4 (72+16 + 128+32 = 248) + 3 * (144+32 + 256+32 = 464), shortcut 128+32
    #   res5 (144+32 + 512+64 = 752) + 3 * (288+64 + 1024+64 = 1440), shortcut 512+64
    expected = 596 + 4 * 68 + (92 + 3 * 168 + 48) + (248 + 3 * 464 + 160) + (752 + 3 * 1440 + 576)
    assert num_parameters(make_divided_resnet(width_divisor=16, conv="depthwise")) == expected
    # Two groups save half the weights of the 3x3 convolutions: 576 + 2,016 + 8,064 + 32,256 = 42,912.
    assert num_parameters(make_divided_resnet(width_divisor=16, conv="group")) == 44772 - 42912 // 2


@pytest.mark.parametrize(
    "conv, per_layer",
    [
        ("depthwise", lambda c, d: 9 * c + c * d + 2 * (c + d)),
        ("group", lambda c, d: 9 * c * d // 2 + 2 * d),
    ],
)
def test_flops_by_hand(conv, per_layer):
    # The tiny detector on 64 x 64 pixels; a norm has two per value.
    flops = 32 * 32 * (9 * 3 * 2 + 2 * 2) + 16 * 16 * per_layer(2, 4)
    flops += 8 * 8 * sum(per_layer(c, d) for c, d in [(4, 8), (8, 8), (8, 16), (16, 16), (16, 16), (16, 16)])
    assert measure_cost(tiny_cfg(VGG_CONV, conv), 64, 64).parts["backbone"].flops == flops


# ------------------------------------------------------------------------------------------------- values


def test_depthwise_separable_convolution_is_its_two_convolutions():
    layer = conv3x3("depthwise", stride=2, activation=nn.ReLU())
    weight, bias = layer.depthwise.weight, layer.depthwise.bias
    x = torch.randn(2, 4, 7, 9)
    channels = [
        F.conv2d(x[:, i : i + 1], weight[i : i + 1], bias[i : i + 1], stride=2, padding=1) for i in range(4)
    ]
    mixed = torch.einsum("dc,nchw->ndhw", layer.pointwise.weight[:, :, 0, 0], torch.cat(channels, dim=1).relu())
    expected = (mixed + layer.pointwise.bias[None, :, None, None]).relu()
    assert expected.shape == (2, 6, 4, 5)
    torch.testing.assert_close(layer(x), expected)


def test_group_convolution_keeps_its_groups_apart():
    layer = conv3x3("group", dilation=2)
    x = torch.randn(1, 4, 8, 8)
    first = F.conv2d(x[:, :2], layer.weight[:3], layer.bias[:3], padding=2, dilation=2)
    second = F.conv2d(x[:, 2:], layer.weight[3:], layer.bias[3:], padding=2, dilation=2)
    torch.testing.assert_close(layer(x), torch.cat([first, second], dim=1))


def test_plain_convolution_reads_no_groups():
    assert conv3x3("plain", in_channels=3, out_channels=5).groups == 1


@pytest.mark.parametrize("conv, groups", [("plain", 1), ("group", 4), ("depthwise", 256)])
def test_initial_weights_keep_the_scale_of_the_gradient(conv, groups):
    """He et al.'s initialization for the readers that an input really has: 9 * channels / groups."""
    layer = conv3x3(conv, groups=groups, in_channels=256, out_channels=256)
    weight = (layer.depthwise if conv == "depthwise" else layer).weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256 / groups)) ** 0.5, rel=0.05)


# ----------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("conv", ["group", "depthwise"])
def test_only_the_convolution_of_the_image_stays_plain(conv):
    model = VGG(depth=13, width_divisor=16, conv=conv)
    kinds = {name: module for name, module in model.named_modules() if name.count(".") == 1}
    assert len(kinds) == 10
    for name, module in kinds.items():
        is_depthwise = isinstance(module, DepthwiseSeparableConv)
        if name == "conv1.conv1":
            assert not is_depthwise and module.groups == 1
        else:
            assert is_depthwise if conv == "depthwise" else module.groups == 2


@pytest.mark.parametrize("conv", ["group", "depthwise"])
@pytest.mark.parametrize("network", ["vgg", 18, 50])
def test_shapes_and_gradients(network, conv):
    def make(kind):
        if network == "vgg":
            return VGG(width_divisor=16, norm="BN", conv=kind, out_features=["conv3", "conv5"])
        return make_divided_resnet(depth=network, width_divisor=16, conv=kind, out_features=["res3", "res5"])

    plain, model = make("plain"), make(conv)
    assert model.output_shape() == plain.output_shape()
    assert num_parameters(model) < num_parameters(plain)
    image = torch.rand(2, 3, 64, 96)
    features = model(image)
    assert {k: v.shape for k, v in features.items()} == {k: v.shape for k, v in plain(image).items()}
    sum((feature * torch.randn_like(feature)).sum() for feature in features.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_blocks_of_a_resnet_have_one_relu_behind_each_convolution():
    """The block itself applies the ReLU behind conv1, and adds the shortcut before the one behind conv2."""
    block = make_divided_resnet(width_divisor=16, conv="depthwise").eval().res3[0]
    x = torch.randn(1, 4, 8, 8)
    assert block.conv1.pointwise.activation is None and block.conv2.pointwise.activation is None
    with torch.no_grad():
        expected = (block.conv2(block.conv1(x).relu()) + block.shortcut(x)).relu()
        assert torch.equal(block(x), expected)
    assert block.conv1.depthwise.stride == (2, 2) and block.conv2.depthwise.stride == (1, 1)


def test_only_3x3_convolutions_of_a_bottleneck_are_replaced():
    block = make_divided_resnet(depth=50, width_divisor=16, conv="group", res5_dilation=2).res5[0]
    assert [each.groups for each in (block.conv1, block.conv2, block.conv3, block.shortcut)] == [1, 2, 1, 1]
    assert block.conv2.dilation == (2, 2) and block.conv2.padding == (2, 2)


def test_frozen_stages():
    model = VGG(width_divisor=32, norm="BN", conv="depthwise", freeze_at=2)
    assert isinstance(model.conv2.conv2.depthwise.norm, FrozenBatchNorm2d)
    assert isinstance(model.conv2.conv2.pointwise.norm, FrozenBatchNorm2d)
    assert {name[:5] for name, p in model.named_parameters() if p.requires_grad} == {"conv3", "conv4", "conv5"}


@pytest.mark.parametrize("conv", ["group", "depthwise"])
def test_a_quantized_detector_of_it_trains(conv):
    model = seeded_model(tiny_cfg(VGG_CONV, conv, meta_architecture="QuantRCNN"))
    step = training_step(model, batch())
    assert all(torch.isfinite(loss) for loss in step.losses.values())
    assert all(name in step.gradients for name, _ in model.named_parameters())


def test_traced_module_works_at_another_size():
    model = VGG(width_divisor=32, norm="BN", conv="depthwise").eval()
    traced = torch.jit.trace(model, torch.rand(1, 3, 32, 32), strict=False)
    image = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(traced(image)["conv5"], model(image)["conv5"])


# -------------------------------------------------------------------------------------------------- config


def make_cfg(*options):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.VGG.WIDTH_DIVISOR = cfg.MODEL.RESNETS.WIDTH_DIVISOR = 16
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    "builder, node", [("build_vgg_backbone", "MODEL.VGG"), ("build_divided_resnet_backbone", "MODEL.RESNETS")]
)
def test_keys_are_read(builder, node):
    def count(*options):
        return num_parameters(build_backbone(make_cfg("MODEL.BACKBONE.NAME", builder, *options)))

    by_kind = [
        count(),
        count(f"{node}.CONV", "group"),
        count(f"{node}.CONV", "group", f"{node}.CONV_GROUPS", 4),
        count(f"{node}.CONV", "depthwise"),
    ]
    assert by_kind == sorted(by_kind, reverse=True) and len(set(by_kind)) == 4
    assert count(f"{node}.CONV_GROUPS", 4) == by_kind[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"conv": "shuffle"}, ["CONV is 'shuffle'", "'plain'", "'group'", "'depthwise'"]),
        ({"conv": "group", "conv_groups": 1}, ["CONV_GROUPS is 1", "at least 2", "'plain'"]),
        ({"conv": "group", "conv_groups": 0}, ["CONV_GROUPS is 0", "at least 2"]),
        ({"conv": "group", "conv_groups": 8}, ["CONV_GROUPS is 8", "does not divide", "WIDTH_DIVISOR"]),
        ({"conv": "group", "conv_groups": 3}, ["CONV_GROUPS is 3", "4 channels in"]),
    ],
)
@pytest.mark.parametrize("make, node", [(VGG, "MODEL.VGG."), (make_divided_resnet, "MODEL.RESNETS.")])
def test_wrong_settings_name_key_value_and_fix(make, node, options, words):
    with pytest.raises(ValueError) as error:
        make(width_divisor=16, **options)
    assert node in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("conv", ["group", "depthwise"])
def test_groups_of_resnext_do_not_mix_with_it(conv):
    with pytest.raises(ValueError, match=f"With MODEL.RESNETS.CONV '{conv}', MODEL.RESNETS.NUM_GROUPS is 32"):
        make_divided_resnet(depth=50, num_groups=32, width_per_group=4, conv=conv)
