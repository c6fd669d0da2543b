"""The student in training: what it is without a mimic, its losses and its figures."""

import copy
import itertools
import logging
import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import inference_context
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers import (
    CASCADE,
    MASK_HEAD,
    RESNET_C4,
    RESNET_FPN,
    batch,
    calls_of_mimic_loss,
    seeded_model,
    training_step,
    write_teacher,
)
from mimic_models import (
    CONFIG_FILE,
    NAME,
    PERIOD,
    PLAIN,
    QMIMIC,
    RES5,
    assert_equal,
    detections_of,
    mimic_cfg,
    mimic_model,
    other_model,
    without,
)

from qmimic_d2.diagnostics.feature_comparison import FIGURES, histogram_codes
from qmimic_d2.modeling import FrozenTeacher
from qmimic_d2.modeling.attach import attached_mimic

ON_BACKBONE = f"{QMIMIC}.QUANTIZER.ON_BACKBONE"
LOSS_WEIGHT = f"{QMIMIC}.MIMIC.LOSS_WEIGHT"


# --------------------------------------------------------------------------------------------- mimic off


@pytest.mark.parametrize("family", [(), RESNET_C4, RESNET_FPN, RES5, MASK_HEAD, CASCADE])
def test_switched_off_it_is_generalized_rcnn(family):
    off, stock = mimic_model(*PLAIN, *family), other_model("GeneralizedRCNN", *family)
    assert_equal(dict(off.state_dict()), dict(stock.state_dict()))
    first, second = (training_step(model, batch((64, 64), (48, 80))) for model in (off, stock))
    assert list(first.losses) == list(second.losses)
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)
    assert_equal(detections_of(off, batch()), detections_of(stock, batch()))


def test_without_a_teacher_it_is_quant_rcnn():
    off, quant = mimic_model(), other_model("QuantRCNN")
    first, second = (training_step(model, batch()) for model in (off, quant))
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)
    assert off.mimic.teacher is None and attached_mimic(off) is None


def test_training_without_a_teacher_warns_once(caplog):
    with caplog.at_level(logging.WARNING):
        model = mimic_model()
        assert "the mimic is off" not in caplog.text
        for _ in range(2):
            training_step(model, batch())
    warnings = [record for record in caplog.records if "the mimic is off" in record.message]
    assert len(warnings) == 1 and CONFIG_FILE in warnings[0].message


def test_evaluating_without_a_teacher_does_not_warn(caplog):
    model = mimic_model()
    with caplog.at_level(logging.WARNING), inference_context(model):
        detections_of(model, batch())
    assert "the mimic is off" not in caplog.text


# ---------------------------------------------------------------------------------------- the mimic loss


@pytest.mark.parametrize("quantizer", [PLAIN, (), (ON_BACKBONE, False), (NAME, "Clamp"), (NAME, "PowerOfTwo")])
def test_loss_mimic_compares_unquantized_map_teacher_and_sampled_regions(vgg_teacher, quantizer):
    weight = (LOSS_WEIGHT, 3.0)
    cfg = mimic_cfg(*vgg_teacher.options, *quantizer, *weight)
    model, inputs = seeded_model(cfg), batch()
    calls = calls_of_mimic_loss(model)
    sampled = []
    model.roi_heads.register_forward_hook(lambda module, args, output: sampled.extend(output[0]))
    step = training_step(model, inputs)

    (call,) = calls
    stock = other_model("GeneralizedRCNN").train()
    plain = stock.backbone(stock.preprocess_image(inputs).tensor)["conv5"]
    assert torch.equal(call["maps"]["conv5"], plain)
    assert_equal(call["teacher_maps"], FrozenTeacher(cfg).features(inputs))
    assert_equal([each.tensor for each in call["boxes"]], [each.proposal_boxes.tensor for each in sampled])
    value = model.mimic(call["maps"], call["teacher_maps"], call["boxes"])["loss_mimic"]
    torch.testing.assert_close(step.losses["loss_mimic"], 3.0 * value.detach())


@pytest.mark.parametrize("quantizer", [PLAIN, ()])
def test_the_detection_losses_are_those_without_the_mimic(vgg_teacher, quantizer):
    mimic = training_step(mimic_model(*vgg_teacher.options, *quantizer), batch((64, 64), (48, 80)))
    quant = training_step(other_model("QuantRCNN", *quantizer), batch((64, 64), (48, 80)))
    assert_equal(without("loss_mimic", mimic.losses), quant.losses)


def test_gradients_of_the_mimic_reach_backbone_and_adapter_alone(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    model.train()
    with EventStorage():
        model(batch())["loss_mimic"].backward()
    touched = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in touched} == {"backbone", "mimic"}
    assert {"mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"} <= touched
    # plain VGG and BN: every convolution of the backbone learns from it
    assert all(name in touched for name, _ in model.backbone.named_parameters(prefix="backbone"))


def test_lambda_scales_the_loss_and_its_gradient(vgg_teacher):
    steps = [training_step(mimic_model(*vgg_teacher.options, LOSS_WEIGHT, weight), batch()) for weight in (1.0, 4.0)]
    torch.testing.assert_close(steps[1].losses["loss_mimic"], 4.0 * steps[0].losses["loss_mimic"])
    name = "mimic.adapters.conv5.weight"
    torch.testing.assert_close(steps[1].gradients[name], 4.0 * steps[0].gradients[name])


def test_warm_up_rises_from_a_zero_that_reaches_the_adapter(vgg_teacher):
    schedule = (f"{QMIMIC}.MIMIC.SCHEDULE", "warmup", f"{QMIMIC}.MIMIC.WARMUP_ITERS", 10)
    model = mimic_model(*vgg_teacher.options, *schedule)
    state = copy.deepcopy(model.state_dict())
    steps = {}
    for iteration in (0, 5, 10, 11):
        model.load_state_dict(state)
        steps[iteration] = training_step(model, batch(), iteration=iteration)
    losses = {iteration: step.losses["loss_mimic"].item() for iteration, step in steps.items()}
    full = training_step(mimic_model(*vgg_teacher.options), batch()).losses["loss_mimic"].item()
    assert losses == pytest.approx({0: 0.0, 5: full / 2, 10: full, 11: full})
    for name in ("mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"):
        assert torch.equal(steps[0].gradients[name], torch.zeros_like(steps[0].gradients[name]))


def test_weight_zero_measures_and_trains_as_without_the_mimic(vgg_teacher):
    step = training_step(mimic_model(*vgg_teacher.options, LOSS_WEIGHT, 0.0), batch())
    quant = training_step(other_model("QuantRCNN"), batch())
    assert step.losses["loss_mimic"].item() == 0.0
    assert_equal(without("mimic.", step.gradients), quant.gradients)
    assert 0.0 < step.storage.latest()["qmimic/match_ratio"][0] < 1.0


@pytest.mark.parametrize("period, measured", [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (20, [0])])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_student_and_teacher_are_compared_every_period(vgg_teacher, monkeypatch, period, measured, weight):
    model = mimic_model(*vgg_teacher.options, PERIOD, period, LOSS_WEIGHT, weight)
    model.train()
    runs = []
    features = FrozenTeacher.features
    monkeypatch.setattr(FrozenTeacher, "features", lambda *args: runs.append(1) or features(*args))
    found = []
    for iteration in range(5):
        step = training_step(model, batch(), iteration=iteration)
        if "qmimic/match_ratio" in step.storage.latest():
            found.append(iteration)
    assert found == measured
    # a teacher whose features nobody asks for does not run
    assert len(runs) == (5 if weight else len(measured))


@pytest.mark.parametrize("options", [PLAIN, (f"{QMIMIC}.MIMIC.POOLER_TYPE", "ROIPool")])
def test_a_student_that_equals_its_teacher_has_no_loss_and_full_match(tmp_path, options):
    fixed = ("MODEL.VGG.WIDTH_DIVISOR", 32, "MODEL.VGG.NORM", "FrozenBN")
    written = write_teacher(tmp_path, *fixed)
    model = mimic_model(*written.options, *fixed, *options, f"{QMIMIC}.MIMIC.ADAPTER", "")
    model.load_state_dict(written.model.state_dict())
    step = training_step(model, batch())
    latest = {name: value for name, (value, _) in step.storage.latest().items()}
    assert step.losses["loss_mimic"].item() == pytest.approx(0.0, abs=1e-6)
    assert latest["qmimic/match_ratio"] == latest["qmimic/match_ratio_nonzero"] == 1.0
    assert latest["qmimic/within_one_nonzero"] == 1.0
    assert latest["qmimic/grad_norm_mimic_map"] == pytest.approx(0.0, abs=1e-6)
    # the teacher's map was quantized before it was pooled, the student's was not
    error = latest["qmimic/relative_error"]
    assert error == pytest.approx(0.0, abs=1e-6) if options == PLAIN else error > 1e-3


VARIANTS = {
    "uniform": (),
    "plain": PLAIN,
    "clamp": (NAME, "Clamp"),
    "power of two": (NAME, "PowerOfTwo"),
    "signed": (f"{QMIMIC}.QUANTIZER.SIGNED", True),
    "bounded": (f"{QMIMIC}.QUANTIZER.NUM_CODES", 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_compared_on_a_common_dictionary(vgg_teacher, variant):
    model = mimic_model(*vgg_teacher.options, *VARIANTS[variant])
    step = training_step(model, batch())
    latest = {name: value for name, (value, _) in step.storage.latest().items()}
    assert {f"qmimic/{name}" for name in FIGURES} <= set(latest)
    assert all(math.isfinite(latest[f"qmimic/{name}"]) for name in FIGURES)
    assert [len(each["bucket_counts"]) for each in step.storage._histograms] == [
        len(histogram_codes(model.mimic.code_quantizer))
    ] * 2
    is_bounded = variant == "bounded"
    assert (latest["qmimic/teacher_saturation"] > 0.0) == is_bounded


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_diagnostics_change_no_bit_of_a_training(vgg_teacher, weight):
    def losses_and_weights(period):
        gradients = (f"{QMIMIC}.DIAGNOSTICS.GRADIENT_PERIOD", period)
        cfg = mimic_cfg(*vgg_teacher.options, LOSS_WEIGHT, weight, PERIOD, period, *gradients)
        model = seeded_model(cfg)
        data = itertools.cycle([batch(seed=seed) for seed in range(2)])
        trainer = SimpleTrainer(model, data, build_optimizer(cfg, model))
        torch.manual_seed(9)  # and drawn on from step to step
        with EventStorage() as trainer.storage:
            for trainer.iter in range(6):
                trainer.storage.iter = trainer.iter
                trainer.run_step()
        figures = "qmimic/match_ratio" in trainer.storage.histories()
        names = [name for name in trainer.storage.histories() if "loss" in name]
        return {name: trainer.storage.history(name).values() for name in names}, dict(model.state_dict()), figures

    (losses, trained, measured), (expected, weights, not_measured) = losses_and_weights(1), losses_and_weights(0)
    assert measured and not not_measured
    assert len(expected["total_loss"]) == 6 and losses == expected
    assert_equal(trained, weights)


def test_compare_gives_what_the_mimic_compares(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    with pytest.raises(ValueError, match="no teacher"):
        model.mimic.compare_on(batch(), [])
    model.train()
    inputs, calls = batch((64, 64), (48, 80)), calls_of_mimic_loss(model)
    state = copy.deepcopy(model.state_dict())
    step = training_step(model, inputs)
    model.load_state_dict(state)  # BatchNorm's running statistics
    comparison = model.mimic.compare_on(inputs, calls[0]["boxes"])["conv5"]
    figures = {f"qmimic/{name}": value for name, value in comparison.figures().items()}
    written = {name: value for name, (value, _) in step.storage.latest().items()}
    assert {name: written[name] for name in figures} == pytest.approx(figures, abs=1e-4)
    assert model.mimic.record.maps == {}  # no graph, no map outlives it
