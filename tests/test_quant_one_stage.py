"""RetinaNet and FCOS whose features are quantized: codes where the config says so, stock Detectron2 otherwise."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from helpers import NUM_CLASSES, ONE_STAGE, ONE_STAGE_FPN, RESNET_FPN, batch, seeded_model, tiny_cfg, training_step

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling import QuantFCOS, QuantRetinaNet, UniformQuantizer
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

NAME = "MODEL.QMIMIC.QUANTIZER.NAME"
ON_BACKBONE = "MODEL.QMIMIC.QUANTIZER.ON_BACKBONE"
FAMILIES = list(ONE_STAGE)

# A threshold that lets untrained scores through: what is compared are boxes.
LOW = {
    "RetinaNet": ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.001),
    "FCOS": ("MODEL.FCOS.SCORE_THRESH_TEST", 0.001, "MODEL.FCOS.NORM", ""),
}


def quant_model(family, *options, seed=1, kind="Quant", levels=ONE_STAGE):
    return seeded_model(tiny_cfg(*levels[family], *options, meta_architecture=f"{kind}{family}"), seed)


def stock_fcos(cfg):
    """As Detectron2's configs/common/models/fcos.py builds it, with every number of this project's config."""
    backbone, node = build_backbone(cfg), cfg.MODEL.FCOS
    shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
    head = FCOSHead(
        input_shape=shapes,
        num_classes=node.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * node.NUM_CONVS,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
    )
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=node.IN_FEATURES,
        num_classes=node.NUM_CLASSES,
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def stock_model(family, *options, seed=1, levels=ONE_STAGE):
    torch.manual_seed(seed)
    cfg = tiny_cfg(*levels[family], *options, meta_architecture="RetinaNet")
    return build_model(cfg) if family == "RetinaNet" else stock_fcos(cfg)


def detections_of(model, inputs):
    model.eval()
    with torch.no_grad():
        found = [each["instances"] for each in model([{"image": each["image"]} for each in inputs])]
    return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]


@pytest.fixture(scope="module", autouse=True)
def compiled_focal_loss():
    """TorchScript runs Detectron2's focal loss for the first time in another way than ever after, to the last bit."""
    for family in FAMILIES:
        for levels in (ONE_STAGE, ONE_STAGE_FPN):
            training_step(stock_model(family, *LOW[family], levels=levels), batch())


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", ["Quant", "QuantMimic"])
@pytest.mark.parametrize("off", [(NAME, ""), (ON_BACKBONE, False)])
@pytest.mark.parametrize("levels", [ONE_STAGE, ONE_STAGE_FPN], ids=["one level", "four levels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_detectron2s(family, levels, off, kind):
    quant = quant_model(family, *LOW[family], *off, kind=kind, levels=levels)
    stock = stock_model(family, *LOW[family], levels=levels)
    assert_equal(dict(quant.state_dict()), dict(stock.state_dict()))
    for seed in range(2):  # the second step is divided by a running mean of the first's positive cells
        first, second = (training_step(model, batch((64, 64), (48, 80), seed=seed)) for model in (quant, stock))
        assert list(first.losses) == list(second.losses)
        assert_equal(first.losses, second.losses)
        assert_equal(first.gradients, second.gradients)
    found = detections_of(quant, batch())
    assert all(len(scores) for _, scores, _ in found)
    assert_equal(found, detections_of(stock, batch()))


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_every_key_of_fcos_is_read(norm):
    options = (
        *("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.FCOS.NORM", norm, "MODEL.FCOS.NUM_CONVS", 2),
        *("MODEL.FCOS.CENTER_SAMPLING_RADIUS", 2.5, "MODEL.FCOS.FOCAL_LOSS_ALPHA", 0.5),
        *("MODEL.FCOS.FOCAL_LOSS_GAMMA", 1.0, "MODEL.FCOS.PRIOR_PROB", 0.3, "MODEL.FCOS.SCORE_THRESH_TEST", 0.3),
        *("MODEL.FCOS.TOPK_CANDIDATES_TEST", 40, "MODEL.FCOS.NMS_THRESH_TEST", 0.9),
        *("TEST.DETECTIONS_PER_IMAGE", 3, NAME, ""),
    )
    quant = quant_model("FCOS", *options, levels=ONE_STAGE_FPN)
    stock = stock_model("FCOS", *options, levels=ONE_STAGE_FPN)
    assert repr(quant.head) == repr(stock.head)
    assert_equal(training_step(quant, batch()).losses, training_step(stock, batch()).losses)
    assert_equal(detections_of(quant, batch()), detections_of(stock, batch()))
    numbers = (quant.center_sampling_radius, quant.focal_loss_alpha, quant.focal_loss_gamma)
    assert numbers == (2.5, 0.5, 1.0)
    limits = (quant.test_score_thresh, quant.test_topk_candidates, quant.test_nms_thresh)
    assert (*limits, quant.max_detections_per_image) == (0.3, 40, 0.9, 3)
    torch.testing.assert_close(quant.head.cls_score.bias.sigmoid(), torch.full((NUM_CLASSES,), 0.3))


def test_groups_fit_a_narrow_fcos_head():
    # Detectron2's 32 groups do not divide 8 channels
    step = training_step(quant_model("FCOS", levels=ONE_STAGE_FPN), batch())
    assert all(torch.isfinite(loss) for loss in step.losses.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_codes(family):
    model = quant_model(family)
    assert attached_quantizer(model.backbone).features == ["conv5"]
    read = []
    model.head.register_forward_pre_hook(lambda module, args: read.append(args[0][0].detach()))
    training_step(model, batch())
    detections_of(model, batch())
    for codes in read:
        assert torch.equal(codes, UniformQuantizer(0.25).quantize(codes)) and (codes > 0).any()
    assert len(read) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_levels_that_the_head_reads_are_quantized(family, caplog):
    with caplog.at_level(logging.WARNING):
        model = quant_model(family, levels=ONE_STAGE_FPN)
        assert "SIGNED" not in caplog.text
        quant_model(family, "MODEL.QMIMIC.QUANTIZER.SIGNED", False, levels=ONE_STAGE_FPN)
        assert "Set MODEL.QMIMIC.QUANTIZER.SIGNED True" in caplog.text
    assert attached_quantizer(model.backbone).features == ["p3", "p4", "p5", "p6"]
    read = []
    model.head.register_forward_pre_hook(lambda module, args: read.extend(args[0]))
    training_step(model, batch())
    for codes in read:
        assert torch.equal(codes, UniformQuantizer(0.25, signed=True).quantize(codes)) and (codes < 0).any()
    assert len(read) == 4


@pytest.mark.parametrize("kind", [QuantRetinaNet, QuantFCOS])
def test_explicit_construction(kind):
    family = kind.__name__[len("Quant") :]
    stock = stock_model(family, *LOW[family])
    names = ("anchor_generator", "box2box_transform", "anchor_matcher") if kind is QuantRetinaNet else ()
    model = kind(
        backbone=stock.backbone,
        head=stock.head,
        head_in_features=["conv5"],
        num_classes=3,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        quantizer=UniformQuantizer(0.5),
        quantized_features=["conv5"],
        **{name: getattr(stock, name) for name in names},
    )
    with torch.no_grad():
        codes = model.backbone(model.preprocess_image(batch()).tensor)["conv5"]
    assert torch.equal(codes, UniformQuantizer(0.5).quantize(codes))


# ------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("IN_FEATURES", ["conv5", "p3"], ["'p3'", "conv5"]),
        ("NUM_CONVS", 0, ["is 0", "1 or more"]),
        ("NORM", "LN", ["'LN'", "'GN'"]),
    ],
)
def test_senseless_values_of_fcos_are_named(key, value, words):
    with pytest.raises(ValueError) as caught:
        quant_model("FCOS", f"MODEL.FCOS.{key}", value)
    for word in (f"MODEL.FCOS.{key}", *words):
        assert word in str(caught.value)


def test_another_projects_fcos_node_is_completed_and_kept():
    cfg = get_cfg()
    cfg.MODEL.FCOS = type(cfg)({"NUM_CLASSES": 7, "TOP_LEVELS": 2})
    add_qmimic_config(cfg)
    assert (cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.FCOS.TOP_LEVELS, cfg.MODEL.FCOS.NUM_CONVS) == (7, 2, 4)


def test_the_default_levels_are_detectron2s():
    cfg = tiny_cfg(*RESNET_FPN)
    assert cfg.MODEL.FCOS.IN_FEATURES == cfg.MODEL.RETINANET.IN_FEATURES == ["p3", "p4", "p5", "p6", "p7"]
