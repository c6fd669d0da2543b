"""VGG backbone: shapes, parameter counts, norms, torchvision's weights, bad input."""


import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.backbone import (
    VGG,
    convert_torchvision_names,
)
from qmimic_d2.modeling.backbone.build import divide_width, num_norm_groups

ALL_FEATURES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def make_cfg(*options):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
    cfg.merge_from_list(list(options))
    return cfg


def flatten(node, prefix=""):
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def randomize_norms(model):
    """Random statistics and affine parameters: the initial ones would hide a mapping error."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.2)


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.VGG.DEPTH", 11),
        ("MODEL.VGG.WIDTH_DIVISOR", 32),
        ("MODEL.VGG.NORM", "GN"),
        ("MODEL.VGG.OUT_FEATURES", ["conv3"]),
        ("MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 1, 1]),
        ("MODEL.VGG.LAST_NORM", False, "MODEL.VGG.NORM", "BN"),
        ("MODEL.VGG.FREEZE_AT", 2),
    ],
)
def test_every_key_is_read(options):
    def describe(*pairs):
        # Divided by 16 to be quick; the pair behind it wins.
        model = build_backbone(make_cfg("MODEL.VGG.WIDTH_DIVISOR", 16, *pairs))
        trained = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
        return trained, model.output_shape()

    reference = options[2:]
    assert describe(*options) != describe(*reference)


def test_registered_builder_gives_the_default_network():
    model = build_backbone(make_cfg("MODEL.VGG.WIDTH_DIVISOR", 8))
    assert isinstance(model, VGG)
    assert model.output_shape() == {"conv5": ShapeSpec(channels=64, stride=16)}


# ------------------------------------------------------------------------------- shapes and numbers


def test_shapes_and_strides_of_every_feature():
    model = VGG(width_divisor=16, out_features=ALL_FEATURES)
    features = model(torch.rand(2, 3, 64, 96))
    assert list(features) == ALL_FEATURES
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        "conv1": (2, 4, 64, 96),
        "conv2": (2, 8, 32, 48),
        "conv3": (2, 16, 16, 24),
        "conv4": (2, 32, 8, 12),
        "conv5": (2, 32, 4, 6),
    }
    for name, spec in model.output_shape().items():
        assert features[name].shape[1] == spec.channels
        assert features[name].shape[2] * spec.stride == 64


@pytest.mark.parametrize(
    "strides, total", [([2, 2, 2, 1, 1], 8), ([2, 2, 2, 2, 2], 32), ([1, 4, 1, 2, 1], 8)]
)
def test_stage_strides(strides, total):
    model = VGG(width_divisor=16, stage_strides=strides)
    assert model.output_shape()["conv5"].stride == total
    assert model(torch.rand(1, 3, 64, 64))["conv5"].shape[-2:] == (64 // total, 64 // total)


def test_sizes_that_the_stride_does_not_divide_round_down():
    model = VGG(width_divisor=16)
    assert model(torch.rand(1, 3, 47, 33))["conv5"].shape[-2:] == (2, 2)


def test_stages_behind_the_last_feature_are_not_built():
    model = VGG(width_divisor=16, out_features=["conv3", "conv2"])
    assert [name for name, _ in model.named_children()] == ["conv1", "conv2", "conv3"]
    assert set(model(torch.rand(1, 3, 16, 16))) == {"conv2", "conv3"}


def test_parameter_count_of_vgg_1_32():
    # VGG-16's widths over 32: 2, 4, 8, 16, 16. A 3x3 convolution has in * out * 9 weights and,
    # without norm, out biases.
    #   conv1:  3*2*9 + 2 =   56;    2*2*9 + 2 =   38               ->    94
    #   conv2:  2*4*9 + 4 =   76;    4*4*9 + 4 =  148               ->   224
    #   conv3:  4*8*9 + 8 =  296;    8*8*9 + 8 =  584, twice        -> 1,464
    #   conv4: 8*16*9 + 16 = 1,168; 16*16*9 + 16 = 2,320, twice     -> 5,808
    #   conv5:                      16*16*9 + 16 = 2,320, 3 times   -> 6,960
    #   sum                                                           14,550
    assert num_parameters(VGG(width_divisor=32)) == 14550
    # BN puts 2 parameters per channel in the place of 1 bias. Channels of all convolutions:
    # 2*2 + 2*4 + 3*8 + 3*16 + 3*16 = 132, so 132 more.
    assert num_parameters(VGG(width_divisor=32, norm="BN")) == 14550 + 132
    # The last convolution, 16 channels wide, goes back to a bias.
    assert num_parameters(VGG(width_divisor=32, norm="BN", last_norm=False)) == 14550 + 132 - 16


def test_parameter_count_of_vgg_1_16():
    # Widths 4, 8, 16, 32, 32.
    #   conv1:   3*4*9 + 4 =    112;   4*4*9 + 4 =   148              ->    260
    #   conv2:   4*8*9 + 8 =    296;   8*8*9 + 8 =   584              ->    880
    #   conv3:  8*16*9 + 16 = 1,168; 16*16*9 + 16 = 2,320, twice      ->  5,808
    #   conv4: 16*32*9 + 32 = 4,640; 32*32*9 + 32 = 9,248, twice      -> 23,136
    #   conv5:                       32*32*9 + 32 = 9,248, 3 times    -> 27,744
    #   sum                                                             57,828
    assert num_parameters(VGG(width_divisor=16)) == 57828


def test_strides_and_last_norm_leave_other_names_alone():
    plain = set(VGG(width_divisor=32, norm="BN").state_dict())
    strided = VGG(width_divisor=32, norm="BN", stage_strides=[2, 2, 2, 1, 1])
    assert set(strided.state_dict()) == plain
    free = set(VGG(width_divisor=32, norm="BN", last_norm=False).state_dict())
    assert free - plain == {"conv5.conv3.bias"}
    assert all(name.startswith("conv5.conv3.norm.") for name in plain - free)


# -------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(
    "norm, module", [("BN", nn.BatchNorm2d), ("FrozenBN", FrozenBatchNorm2d), ("GN", nn.GroupNorm)]
)
def test_norms_train(norm, module):
    model = VGG(width_divisor=32, norm=norm)
    norms = [m for m in model.modules() if isinstance(m, module)]
    assert len(norms) == 13
    assert model.conv1.conv1.bias is None
    features = model(torch.rand(2, 3, 32, 32))["conv5"]
    assert features.shape == (2, 16, 2, 2)
    features.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sync_bn_is_built():
    model = VGG(width_divisor=32, norm="SyncBN").eval()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 13
    assert model(torch.rand(1, 3, 32, 32))["conv5"].shape == (1, 16, 2, 2)


def test_num_norm_groups():
    # 32 as in Detectron2 where it fits, never one channel per group unless there is one in all.
    widths = (1, 2, 4, 6, 9, 16, 32, 64, 96, 512)
    assert [num_norm_groups(c) for c in widths] == [1, 1, 2, 2, 1, 8, 16, 32, 32, 32]
    assert all(c % num_norm_groups(c) == 0 for c in range(1, 513))


# ------------------------------------------------------------------------------- freezing, tracing


def test_freeze_at_freezes_the_first_stages():
    model = VGG(width_divisor=32, norm="BN", freeze_at=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name[:5] in ("conv3", "conv4", "conv5") for name in trained)
    assert isinstance(model.conv2.conv2.norm, FrozenBatchNorm2d)
    assert isinstance(model.conv3.conv1.norm, nn.BatchNorm2d)
    model.train()
    before = model.conv1.conv1.norm.running_mean.clone()
    model(torch.rand(2, 3, 32, 32))["conv5"].sum().backward()
    assert torch.equal(model.conv1.conv1.norm.running_mean, before)
    assert model.conv1.conv1.weight.grad is None
    assert all(p.requires_grad for p in VGG(width_divisor=32, norm="BN").parameters())


def test_traced_module_works_at_another_size():
    model = VGG(width_divisor=32, norm="BN", out_features=["conv4", "conv5"]).eval()
    traced = torch.jit.trace(model, torch.rand(1, 3, 32, 32), strict=False)
    image = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        expected, got = model(image), traced(image)
    for name in ("conv4", "conv5"):
        torch.testing.assert_close(got[name], expected[name])


# ---------------------------------------------------------------------------------------------- FPN


def make_fpn_cfg(*options):
    return make_cfg(
        *("MODEL.BACKBONE.NAME", "build_vgg_fpn_backbone"),
        *("MODEL.VGG.WIDTH_DIVISOR", 16),
        *("MODEL.VGG.OUT_FEATURES", ["conv2", "conv3", "conv4", "conv5"]),
        *("MODEL.FPN.IN_FEATURES", ["conv3", "conv4", "conv5"]),
        *("MODEL.FPN.OUT_CHANNELS", 8),
        *options,
    )


def test_fpn_levels_are_named_after_their_stride():
    model = build_backbone(make_fpn_cfg())
    assert {k: (v.channels, v.stride) for k, v in model.output_shape().items()} == {
        "p2": (8, 4),
        "p3": (8, 8),
        "p4": (8, 16),
        "p5": (8, 32),
    }
    assert model.size_divisibility == 16
    features = model(torch.rand(1, 3, 64, 32))
    sizes = {name: tuple(feature.shape[-2:]) for name, feature in features.items()}
    assert sizes == {"p2": (16, 8), "p3": (8, 4), "p4": (4, 2), "p5": (2, 1)}
    # The added level is the coarsest one, subsampled.
    torch.testing.assert_close(features["p5"], features["p4"][:, :, ::2, ::2])


def test_fpn_with_a_strided_first_convolution_and_group_norm():
    model = build_backbone(make_fpn_cfg("MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 2], "MODEL.FPN.NORM", "GN"))
    assert list(model.output_shape()) == ["p3", "p4", "p5", "p6"]
    assert model.fpn_output5.norm.num_groups == 4


@pytest.mark.parametrize(
    "options, words",
    [
        (("MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 1, 1]), ["MODEL.VGG.STAGE_STRIDES", "[8, 8, 8]"]),
        (("MODEL.VGG.STAGE_STRIDES", [3, 2, 2, 2, 2]), ["powers of two", "[12, 24, 48]"]),
        (("MODEL.FPN.IN_FEATURES", ["conv1"]), ["MODEL.FPN.IN_FEATURES", "'conv1'"]),
        (("MODEL.FPN.IN_FEATURES", []), ["MODEL.FPN.IN_FEATURES", "[]"]),
        (("MODEL.FPN.NORM", "XX"), ["MODEL.FPN.NORM", "'XX'", "'GN'"]),
        (("MODEL.FPN.FUSE_TYPE", "max"), ["MODEL.FPN.FUSE_TYPE", "'max'", "'avg'"]),
    ],
)
def test_fpn_bad_input(options, words):
    with pytest.raises(ValueError) as error:
        build_backbone(make_fpn_cfg(*options))
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"depth": 19}, ["MODEL.VGG.DEPTH", "19", "11, 13, 16"]),
        ({"norm": "LN"}, ["MODEL.VGG.NORM", "'LN'", "'FrozenBN'"]),
        ({"out_features": ["conv6"]}, ["MODEL.VGG.OUT_FEATURES", "'conv6'", "'conv5'"]),
        ({"out_features": []}, ["MODEL.VGG.OUT_FEATURES", "[]", "'conv5'"]),
        ({"out_features": "conv5"}, ["MODEL.VGG.OUT_FEATURES", "'conv5'"]),
        ({"stage_strides": [1, 2, 2, 2]}, ["MODEL.VGG.STAGE_STRIDES", "[1, 2, 2, 2]", "5 int"]),
        ({"stage_strides": [1, 2, 2, 2, 0]}, ["MODEL.VGG.STAGE_STRIDES", "at least 1"]),
        ({"stage_strides": [1, 2, 2, 2, 2.0]}, ["MODEL.VGG.STAGE_STRIDES", "2.0"]),
        ({"stage_strides": [1, 2, 2, 2, True]}, ["MODEL.VGG.STAGE_STRIDES", "True"]),
        ({"stage_strides": 2}, ["MODEL.VGG.STAGE_STRIDES", "5 int"]),
        ({"width_divisor": 3}, ["MODEL.VGG.WIDTH_DIVISOR", "3", "64"]),
        ({"width_divisor": 128}, ["MODEL.VGG.WIDTH_DIVISOR", "128", "64"]),
        ({"width_divisor": 0}, ["MODEL.VGG.WIDTH_DIVISOR", "0", "at least 1"]),
        ({"freeze_at": 6}, ["MODEL.VGG.FREEZE_AT", "6", "5"]),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError) as error:
        VGG(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_divide_width():
    assert [divide_width(64, d, key="K") for d in (1, 16, 64)] == [64, 4, 1]
    with pytest.raises(ValueError, match="K is 7"):
        divide_width(64, 7, key="K")


def test_input_must_be_a_batch():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).*3, 32, 32"):
        VGG(width_divisor=32)(torch.rand(3, 32, 32))


# ---------------------------------------------------------------------------- torchvision's weights


@pytest.mark.slow
@pytest.mark.parametrize("name, norm", [("vgg11", ""), ("vgg13", ""), ("vgg16_bn", "BN")])
def test_torchvision_weights_give_torchvision_features(name, norm):
    torch.manual_seed(0)
    features = getattr(torchvision.models, name)(weights=None).features
    randomize_norms(features)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(1)
    before = dict(state)

    model = VGG(depth=int(name[3:5]), norm=norm)
    model.load_state_dict(convert_torchvision_names(state))
    assert state == before, "the caller's dict must stay as it was"

    image = torch.rand(1, 3, 48, 32)
    with torch.no_grad():
        # Without the last pooling.
        expected = features[:-1].eval()(image)
        got = model.eval()(image)["conv5"]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{"norm": ""}, {"norm": "BN", "last_norm": False}, {"norm": "FrozenBN"}]
)
def test_torchvision_weights_are_fitted_to_the_model(arguments):
    torch.manual_seed(0)
    features = torchvision.models.vgg11_bn(weights=None).features
    randomize_norms(features)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    model = VGG(depth=11, **arguments)
    model.load_state_dict(convert_torchvision_names(state, model.state_dict().keys()))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = features[:-1].eval()(image)
        got = model.eval()(image)["conv5"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_other_checkpoints_are_not_taken_for_torchvision():
    assert convert_torchvision_names({}) is None
    assert convert_torchvision_names(VGG(width_divisor=32).state_dict()) is None
    # AlexNet's names are VGG's, its first kernel is not; MobileNet has a block at features.0.
    assert convert_torchvision_names({"features.0.weight": torch.zeros(64, 3, 11, 11)}) is None
    assert convert_torchvision_names({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}) is None
    with pytest.raises(ValueError, match="'head.weight' is not a parameter"):
        vgg = {"features.0.weight": torch.zeros(64, 3, 3, 3), "head.weight": torch.zeros(1)}
        convert_torchvision_names(vgg)
