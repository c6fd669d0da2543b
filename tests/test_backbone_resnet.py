"""Divided ResNet: shapes, counts, Detectron2's names, torchvision's weights, bad input."""

import logging

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.backbone import (
    convert_torchvision_names,
    make_divided_resnet,
)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def make_cfg(*options):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_divided_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.merge_from_list(list(options))
    return cfg


# ------------------------------------------------------------------------------- shapes and numbers


def test_shapes_and_strides_of_every_feature():
    names = ["stem", "res2", "res3", "res4", "res5"]
    model = make_divided_resnet(depth=18, width_divisor=16, out_features=names)
    features = model(torch.rand(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        "stem": (2, 4, 16, 24),
        "res2": (2, 4, 16, 24),
        "res3": (2, 8, 8, 12),
        "res4": (2, 16, 4, 6),
        "res5": (2, 32, 2, 3),
    }
    for name, spec in model.output_shape().items():
        assert features[name].shape[1] == spec.channels
        assert features[name].shape[2] * spec.stride == 64


def test_bottleneck_widths():
    model = make_divided_resnet(depth=50, width_divisor=16, out_features=["res2", "res5"])
    assert {k: v.channels for k, v in model.output_shape().items()} == {"res2": 16, "res5": 128}
    # Every channel count is divided, the narrow ones inside too: 64 / 16 and 512 / 16.
    assert model.res2[0].conv1.out_channels == 4
    assert model.res5[0].conv2.out_channels == 32


@pytest.mark.parametrize(
    "depth, strides, total", [(18, [1, 2, 2, 1], 16), (34, [1, 2, 1, 1], 8), (50, [2, 2, 1, 1], 16)]
)
def test_stage_strides(depth, strides, total):
    model = make_divided_resnet(depth=depth, width_divisor=32, stage_strides=strides)
    assert model.output_shape()["res5"].stride == total
    assert model(torch.rand(2, 3, 64, 64))["res5"].shape[-1] == 64 // total


def test_res5_dilation_takes_the_stride():
    model = make_divided_resnet(depth=50, width_divisor=32, res5_dilation=2)
    assert model.output_shape()["res5"].stride == 16
    assert model.res5[0].conv2.dilation == (2, 2)


def test_parameter_count_of_resnet18_1_16():
    # ResNet-18's widths over 16: stem 4; res2 to res5 4, 8, 16, 32. No convolution has a bias;
    # each has a BN with 2 parameters per channel.
    #   stem: 7*7*3*4 = 588;                                          BN 2*4      ->    596
    #   res2: 4 * (4*4*9 = 144) = 576;                                BN 2*4*4    ->    608
    #   res3: 4*8*9 = 288;    3 * (8*8*9 = 576) = 1,728;    4*8 = 32; BN 2*8*5    ->  2,128
    #   res4: 8*16*9 = 1,152; 3 * (16*16*9 = 2,304) = 6,912;  8*16 = 128; BN 2*16*5 -> 8,352
    #   res5: 16*32*9 = 4,608; 3 * (32*32*9 = 9,216) = 27,648; 16*32 = 512; BN 2*32*5 -> 33,088
    #   sum                                                                           44,772
    assert num_parameters(make_divided_resnet(depth=18, width_divisor=16, norm="BN")) == 44772
    # FrozenBN holds buffers: less 2 * (4 + 16 + 40 + 80 + 160 = 300) = 600.
    assert num_parameters(make_divided_resnet(depth=18, width_divisor=16, norm="FrozenBN")) == 44172
    # ResNet18-1-32 is as regular: BN has half, 300; convolutions a quarter, but for the stem's
    # half: (44,172 - 588) / 4 + 588 / 2 = 10,896 + 294.
    model = make_divided_resnet(depth=18, width_divisor=32, norm="BN")
    assert num_parameters(model) == 300 + 10896 + 294


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STRIDE_IN_1X1", False),
        ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES5_DILATION", 2),
        (
            *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 4),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        ),
        ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.DEPTH", 50),
    ],
)
def test_undivided_network_is_detectron2s(options):
    ours = build_backbone(make_cfg(*options))
    stock = build_backbone(make_cfg(*options, "MODEL.BACKBONE.NAME", "build_resnet_backbone"))
    assert [(n, v.shape) for n, v in ours.state_dict().items()] == [
        (n, v.shape) for n, v in stock.state_dict().items()
    ]
    assert ours.output_shape() == stock.output_shape()
    ours.load_state_dict(stock.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(image)["res5"], stock.eval()(image)["res5"])


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.RESNETS.WIDTH_DIVISOR", 32),
        ("MODEL.RESNETS.STAGE_STRIDES", [1, 2, 2, 1]),
        ("MODEL.RESNETS.DEPTH", 34),
        ("MODEL.RESNETS.NORM", ""),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4"]),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
        ("MODEL.BACKBONE.FREEZE_AT", 2),
    ],
)
def test_every_key_is_read(options):
    def describe(*pairs):
        model = build_backbone(make_cfg("MODEL.RESNETS.WIDTH_DIVISOR", 16, *pairs))
        trained = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
        return trained, model.output_shape()

    assert describe(*options) != describe()


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN"])
def test_norms_train(norm):
    model = make_divided_resnet(depth=18, width_divisor=32, norm=norm)
    model(torch.rand(2, 3, 64, 64))["res5"].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_freeze_at_freezes_the_first_stages():
    model = make_divided_resnet(depth=18, width_divisor=32, freeze_at=2)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}
    assert isinstance(model.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert isinstance(model.res3[0].conv1.norm, nn.BatchNorm2d)


def test_frozen_random_weights_are_warned_of(caplog, monkeypatch):
    # Detectron2's setup_logger turns propagation off, and with it what caplog sees.
    monkeypatch.setattr(logging.getLogger("qmimic_d2"), "propagate", True)

    def warnings(*options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="qmimic_d2"):
            build_backbone(make_cfg(*options))
        return " ".join(record.getMessage() for record in caplog.records)

    divided = ("MODEL.RESNETS.WIDTH_DIVISOR", 32)
    assert "FREEZE_AT is 2" in warnings(*divided, "MODEL.BACKBONE.FREEZE_AT", 2)
    assert "NORM is 'FrozenBN'" in warnings(*divided, "MODEL.RESNETS.NORM", "FrozenBN")
    assert warnings(*divided) == ""
    assert warnings("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "FrozenBN") == ""


def test_traced_module_works_at_another_size():
    model = make_divided_resnet(depth=18, width_divisor=32).eval()
    traced = torch.jit.trace(model, torch.rand(1, 3, 32, 32), strict=False)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(traced(image)["res5"], model(image)["res5"])


def test_fpn():
    model = build_backbone(
        make_cfg(
            *("MODEL.BACKBONE.NAME", "build_divided_resnet_fpn_backbone"),
            *("MODEL.RESNETS.WIDTH_DIVISOR", 16),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.OUT_CHANNELS", 8),
        )
    )
    strides = {name: spec.stride for name, spec in model.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    sizes = {name: tuple(x.shape) for name, x in model(torch.rand(1, 3, 64, 64)).items()}
    assert sizes == {name: (1, 8, 64 // stride, 64 // stride) for name, stride in strides.items()}


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        (("MODEL.RESNETS.DEPTH", 20), ["MODEL.RESNETS.DEPTH", "20", "18, 34, 50"]),
        (("MODEL.RESNETS.NORM", "XX"), ["MODEL.RESNETS.NORM", "'XX'", "'GN'"]),
        (("MODEL.RESNETS.OUT_FEATURES", ["p2"]), ["MODEL.RESNETS.OUT_FEATURES", "'p2'", "'res5'"]),
        (("MODEL.RESNETS.STAGE_STRIDES", [1, 2]), ["MODEL.RESNETS.STAGE_STRIDES", "4 integers"]),
        (("MODEL.RESNETS.STAGE_STRIDES", [1, 2, 2, -2]), ["STAGE_STRIDES", "-2", "at least 1"]),
        (("MODEL.RESNETS.STAGE_STRIDES", [2, 2, 2, 2]), ["STAGE_STRIDES", "res2", "Set that"]),
        (("MODEL.RESNETS.WIDTH_DIVISOR", 5), ["MODEL.RESNETS.WIDTH_DIVISOR", "5", "64"]),
        (("MODEL.RESNETS.WIDTH_DIVISOR", 0), ["MODEL.RESNETS.WIDTH_DIVISOR", "0", "at least 1"]),
        (("MODEL.RESNETS.WIDTH_DIVISOR", 128), ["MODEL.RESNETS.WIDTH_DIVISOR", "128", "64"]),
        (("MODEL.RESNETS.NUM_GROUPS", 2), ["DEPTH 18", "MODEL.RESNETS.NUM_GROUPS", "2"]),
        (("MODEL.RESNETS.RES5_DILATION", 2), ["DEPTH 18", "MODEL.RESNETS.RES5_DILATION"]),
        (("MODEL.RESNETS.RES5_DILATION", 3), ["MODEL.RESNETS.RES5_DILATION", "3"]),
        (("MODEL.RESNETS.RES2_OUT_CHANNELS", 32), ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "64"]),
        (
            ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]),
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "True", "False"],
        ),
        (
            # 32 groups of 4, divided by 16, are 8 channels in res2.
            (
                *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.WIDTH_DIVISOR", 16),
                *("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            ),
            ["MODEL.RESNETS.NUM_GROUPS", "32", "8 channels", "MODEL.RESNETS.WIDTH_DIVISOR 16"],
        ),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError) as error:
        build_backbone(make_cfg(*options))
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------------------- torchvision's weights


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_weights_give_torchvision_features(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = theirs.state_dict()

    ours = build_backbone(make_cfg("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False))
    assert convert_torchvision_names(ours.state_dict()) is None
    ours.load_state_dict(convert_torchvision_names(state))

    theirs.fc = theirs.avgpool = nn.Identity()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.eval()(image).reshape(1, -1, 2, 3)
        got = ours.eval()(image)["res5"]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_torchvision_weights_fit_frozen_bn():
    state = torchvision.models.resnet18(weights=None).state_dict()
    ours = make_divided_resnet(depth=18, norm="FrozenBN")
    ours.load_state_dict(convert_torchvision_names(state, ours.state_dict().keys()))
    assert torch.equal(ours.res5[0].shortcut.weight, state["layer4.0.downsample.0.weight"])


def test_a_checkpointer_fills_the_bottom_up_of_a_detector_by_name(tmp_path):
    """The names lack the detector's prefix; Detectron2's suffix matching must find their only place."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = str(tmp_path / "resnet18.pth")
    torch.save({"model": convert_torchvision_names(state), "matching_heuristics": True}, path)
    model = build_model(
        make_cfg(
            *("MODEL.BACKBONE.NAME", "build_divided_resnet_fpn_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res4", "res5"]),
            *("MODEL.RPN.IN_FEATURES", ["p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4", "p5"]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.FPN.OUT_CHANNELS", 8),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
            *("MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8),
        )
    )
    DetectionCheckpointer(model).load(path)
    filled = model.backbone.bottom_up.state_dict()
    for name, tensor in convert_torchvision_names(state).items():
        assert torch.equal(filled[name], tensor), name
    assert convert_torchvision_names(model.state_dict()) is None


def test_unknown_name_is_refused():
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.se.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="layer1.0.se.weight"):
        convert_torchvision_names(state)


# ------------------------------------------------------------------------------ inside Detectron2


@pytest.mark.parametrize(
    "name, bottom_up, levels",
    [
        ("build_vgg_backbone", ["conv5"], ["conv5"]),
        ("build_vgg_fpn_backbone", ["conv3", "conv4", "conv5"], ["p2", "p3", "p4"]),
        ("build_retinanet_vgg_fpn_backbone", ["conv4", "conv5"], ["p3", "p4", "p5", "p6"]),
        ("build_divided_resnet_backbone", ["res4"], ["res4"]),
        ("build_divided_resnet_fpn_backbone", ["res3", "res4", "res5"], ["p3", "p4", "p5"]),
        ("build_divided_retinanet_resnet_fpn_backbone", ["res4", "res5"], ["p4", "p5", "p6", "p7"]),
    ],
)
def test_generalized_rcnn_trains_and_infers(name, bottom_up, levels):
    torch.manual_seed(0)
    cfg = make_cfg(
        *("MODEL.BACKBONE.NAME", name),
        *("MODEL.VGG.WIDTH_DIVISOR", 16, "MODEL.RESNETS.WIDTH_DIVISOR", 16),
        *("MODEL.VGG.NORM", "BN"),
        *(f"MODEL.{'VGG' if 'vgg' in name else 'RESNETS'}.OUT_FEATURES", bottom_up),
        *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.FPN.IN_FEATURES", bottom_up),
        *("MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    )
    model = build_model(cfg)
    assert isinstance(model, GeneralizedRCNN)
    truth = Instances((70, 90))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 50.0]]))
    truth.gt_classes = torch.tensor([1])
    # 70 x 90 is a multiple of no stride, so that padding is exercised.
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    # SGD without weight decay, which would move parameters that no loss reaches.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    with EventStorage():
        losses = model([{"image": image, "instances": truth}])
        total = sum(losses.values())
        total.backward()
    optimizer.step()
    assert torch.isfinite(total), losses
    unmoved = [n for n, p in model.backbone.named_parameters() if torch.equal(p, before[n])]
    # FPN's output convolutions may sit on a level that got no sampled anchor and no proposal.
    assert [n for n in unmoved if not n.startswith("fpn_")] == []

    with torch.no_grad():
        result = model.eval()([{"image": image, "height": 70, "width": 90}])
    assert result[0]["instances"].image_size == (70, 90)
