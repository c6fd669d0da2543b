"""The R-CNN whose features are quantized: codes where the config says so, stock Detectron2 otherwise."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from helpers import RESNET_C4, RESNET_FPN, batch, seeded_model, tiny_cfg, training_step

from qmimic_d2.modeling import QuantRCNN
from qmimic_d2.modeling.quantizer import PowerOfTwoQuantizer, UniformQuantizer
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

NAME = "MODEL.QMIMIC.QUANTIZER.NAME"
STRIDE = "MODEL.QMIMIC.QUANTIZER.STRIDE"
NUM_CODES = "MODEL.QMIMIC.QUANTIZER.NUM_CODES"
IN_FEATURES = "MODEL.QMIMIC.QUANTIZER.IN_FEATURES"
ON_BACKBONE = "MODEL.QMIMIC.QUANTIZER.ON_BACKBONE"


def quant_model(*options, seed=1):
    return seeded_model(tiny_cfg(*options, meta_architecture="QuantRCNN"), seed)


def stock_model(*options, seed=1):
    return seeded_model(tiny_cfg(*options), seed)


def images(*sizes):
    return [{"image": each["image"]} for each in batch(*sizes)]


def features_of(model, inputs):
    model.eval()
    with torch.no_grad():
        return model.backbone(model.preprocess_image(inputs).tensor)


def detections_of(model, inputs):
    model.eval()
    with torch.no_grad():
        found = [each["instances"] for each in model(inputs)]
    return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]


def inputs_of(module, call):
    """Positional inputs that a module gets while ``call`` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    call()
    handle.remove()
    return seen


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


# ----------------------------------------------------------------------- off: Detectron2, bit by bit


@pytest.mark.parametrize("off", [(NAME, ""), (ON_BACKBONE, False)])
@pytest.mark.parametrize("family", [(), RESNET_C4, RESNET_FPN])
def test_without_a_quantizer_it_is_generalized_rcnn(off, family):
    quant, stock = quant_model(*family, *off), stock_model(*family)
    assert_equal(dict(quant.state_dict()), dict(stock.state_dict()))
    first, second = (training_step(model, batch((64, 64), (48, 80))) for model in (quant, stock))
    assert list(first.losses) == list(second.losses)
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)
    assert_equal(detections_of(quant, images()), detections_of(stock, images()))


# --------------------------------------------------------------------------------- on: codes, by name


@pytest.mark.parametrize("name, kind", [("Uniform", UniformQuantizer), ("PowerOfTwo", PowerOfTwoQuantizer)])
def test_features_are_the_codes_of_stock_features(name, kind):
    quant, stock = quant_model(NAME, name), stock_model()
    codes, plain = features_of(quant, images())["conv5"], features_of(stock, images())["conv5"]
    assert torch.equal(codes, kind(0.25).quantize(plain))
    assert not torch.equal(codes, plain)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_proposal_generator_and_heads_read_codes(mode):
    model = quant_model()

    def run():
        if mode == "training":
            training_step(model, batch())
        else:
            detections_of(model, images())

    for module in (model.proposal_generator, model.roi_heads):
        ((_, features, *_),) = inputs_of(module, run)
        codes = features["conv5"].detach()
        assert torch.equal(codes, UniformQuantizer(0.25).quantize(codes)) and (codes > 0).any()


def test_the_bound_of_the_dictionary_saturates():
    codes = features_of(quant_model(STRIDE, 0.125, NUM_CODES, 3), images())["conv5"]
    assert set(codes.unique().tolist()) == {0.0, 0.125, 0.25}


def test_only_the_named_features_are_quantized():
    names = ("MODEL.VGG.OUT_FEATURES", ["conv4", "conv5"])
    features = features_of(quant_model(*names, IN_FEATURES, ["conv4"]), images())
    stock = features_of(stock_model(*names), images())
    assert torch.equal(features["conv5"], stock["conv5"])
    assert torch.equal(features["conv4"], UniformQuantizer(0.25).quantize(stock["conv4"]))


def test_by_default_the_features_that_the_heads_read_are_quantized():
    model = quant_model(*RESNET_FPN)
    assert attached_quantizer(model.backbone).features == ["p3", "p4", "p5"]
    features, stock = features_of(model, images()), features_of(stock_model(*RESNET_FPN), images())
    for name in ("p3", "p4", "p5"):
        codes = UniformQuantizer(0.25, signed=True).quantize(stock[name])
        assert torch.equal(features[name], codes) and (codes < 0).any()
    assert torch.equal(features["p6"], stock["p6"])


def test_every_parameter_of_the_backbone_gets_its_straight_through_gradient():
    model = quant_model()
    step = training_step(model, batch())
    assert all(name in step.gradients for name, _ in model.named_parameters())
    assert all(torch.isfinite(gradient).all() for gradient in step.gradients.values())
    assert all(
        gradient.abs().sum() > 0
        for name, gradient in step.gradients.items()
        if name.startswith("backbone.conv5") and name.endswith("weight")
    )


# ------------------------------------------------------------------------ checkpoints, copies, traces


def test_names_of_its_state_are_detectron2s():
    assert list(quant_model().state_dict()) == list(stock_model().state_dict())


def test_a_checkpoint_is_loaded_by_detectron2_and_back(tmp_path):
    quant = quant_model(seed=3)
    DetectionCheckpointer(quant, str(tmp_path)).save("quant")
    stock = stock_model(seed=4)
    DetectionCheckpointer(stock).load(str(tmp_path / "quant.pth"))
    assert_equal(dict(stock.state_dict()), dict(quant.state_dict()))
    again = quant_model(seed=5)
    again.load_state_dict(stock.state_dict())
    assert_equal(detections_of(again, images()), detections_of(quant, images()))


def test_a_copy_is_quantized_too():
    model = quant_model()
    copied = copy.deepcopy(model)
    assert_equal(features_of(copied, images()), features_of(model, images()))
    attached_quantizer(copied.backbone).remove()
    assert attached_quantizer(model.backbone) is not None
    assert not torch.equal(features_of(copied, images())["conv5"], features_of(model, images())["conv5"])


@pytest.mark.parametrize("family", [(), RESNET_FPN])
def test_a_trace_of_the_backbone_holds_the_quantizer(family):
    model = quant_model(*family).eval()
    pixels = model.preprocess_image(images()).tensor
    with torch.no_grad():
        traced = torch.jit.trace(model.backbone, pixels, strict=False)
        other = model.preprocess_image(images((64, 96), (64, 96))).tensor
        assert_equal(dict(traced(other)), dict(model.backbone(other)))


def test_half_precision_codes_are_the_codes_of_the_exact_values():
    model = quant_model()
    with torch.autocast("cpu", torch.bfloat16):
        codes = features_of(model, images())["conv5"]
    assert torch.equal(codes, UniformQuantizer(0.25).quantize(codes))


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("on_backbone", [True, False])
def test_an_unknown_quantizer_names_key_value_and_choice_wherever_it_is_used(on_backbone):
    with pytest.raises(KeyError) as caught:
        quant_model(NAME, "Lattice", ON_BACKBONE, on_backbone)
    for word in (NAME, "'Lattice'", "Uniform", "PowerOfTwo", "Clamp"):
        assert word in caught.value.args[0]


@pytest.mark.parametrize("stride", [0.0, -0.5, float("nan"), float("inf")])
def test_a_senseless_stride_names_key_value_and_fix(stride):
    with pytest.raises(ValueError) as caught:
        quant_model(STRIDE, stride)
    for word in (STRIDE, repr(stride), "positive finite"):
        assert word in str(caught.value)


@pytest.mark.parametrize("num_codes", [-1, -7, 1])
def test_a_senseless_dictionary_names_key_value_and_fix(num_codes):
    with pytest.raises(ValueError) as caught:
        quant_model(NUM_CODES, num_codes)
    for word in (NUM_CODES, str(num_codes), "0 for an unbounded"):
        assert word in str(caught.value)


def test_a_feature_that_the_backbone_lacks_names_key_value_and_choice():
    with pytest.raises(ValueError) as caught:
        quant_model(IN_FEATURES, ["conv5", "res4"])
    for word in (IN_FEATURES, "res4", "conv5"):
        assert word in str(caught.value)


def test_explicit_construction():
    stock = stock_model()
    model = QuantRCNN(
        backbone=stock.backbone,
        proposal_generator=stock.proposal_generator,
        roi_heads=stock.roi_heads,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        quantizer=UniformQuantizer(0.5),
        quantized_features=["conv5"],
    )
    codes = features_of(model, images())["conv5"]
    assert torch.equal(codes, UniformQuantizer(0.5).quantize(codes))
