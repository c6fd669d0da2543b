"""The student in training: its losses, its regions, its frozen teacher, and what of all this it saves."""

import copy
import gc
import itertools
import logging
import math
import os
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import (
    CASCADE,
    MASK_HEAD,
    RESNET_C4,
    RESNET_FPN,
    batch,
    calls_of_mimic_loss,
    run_two_processes,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.diagnostics.feature_comparison import FIGURES, histogram_codes
from qmimic_d2.engine.trainer import build_checkpointer
from qmimic_d2.modeling import FrozenTeacher, QuantMimicRCNN
from qmimic_d2.modeling.attach import attached_mimic
from qmimic_d2.modeling.mimic.mimic import Mimic

QMIMIC = "MODEL.QMIMIC"
CONFIG_FILE = f"{QMIMIC}.TEACHER.CONFIG_FILE"
WEIGHTS = f"{QMIMIC}.TEACHER.WEIGHTS"
NAME = f"{QMIMIC}.QUANTIZER.NAME"
ON_BACKBONE = f"{QMIMIC}.QUANTIZER.ON_BACKBONE"
LOSS_WEIGHT = f"{QMIMIC}.MIMIC.LOSS_WEIGHT"
ROI_SOURCE = f"{QMIMIC}.MIMIC.ROI_SOURCE"
MAX_ROIS = f"{QMIMIC}.MIMIC.MAX_ROIS_PER_IMAGE"
PERIOD = f"{QMIMIC}.DIAGNOSTICS.PERIOD"
IN_FEATURES = f"{QMIMIC}.MIMIC.IN_FEATURES"
TEACHER_IN_FEATURES = f"{QMIMIC}.MIMIC.TEACHER_IN_FEATURES"
TRAIN_ON_PRED_BOXES = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES"

PLAIN = (NAME, "")

# Faster R-CNN C4: heads that keep their sampled proposals to themselves.
RES5 = (
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 4),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 1),
    *("MODEL.RESNETS.NORM", "BN"),
)


def mimic_cfg(*options) -> CfgNode:
    return tiny_cfg(*options, meta_architecture="QuantMimicRCNN")


def mimic_model(*options, seed=1) -> QuantMimicRCNN:
    return seeded_model(mimic_cfg(*options), seed)


def other_model(meta_architecture, *options, seed=1):
    return seeded_model(tiny_cfg(*options, meta_architecture=meta_architecture), seed)


@pytest.fixture(scope="module")
def vgg_teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("vgg"))


@pytest.fixture(scope="module")
def fpn_teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("fpn"), *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 12)


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def assert_near(first, second):
    """Equal to what another order of summation leaves."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def without(prefix, entries):
    return {name: each for name, each in entries.items() if not name.startswith(prefix)}


def detections_of(model, inputs):
    model.eval()
    with torch.no_grad():
        found = [each["instances"] for each in model([{"image": each["image"]} for each in inputs])]
    return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]


# ----------------------------------------------------------------------------------------- mimic off


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


# --------------------------------------------------------------------------------------- the mimic loss


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


# ------------------------------------------------------------------------------- maps, levels, scales


def test_several_levels_have_a_loss_each(fpn_teacher):
    model = mimic_model(*RESNET_FPN, *fpn_teacher.options)
    step = training_step(model, batch())
    names = ["loss_mimic_p3", "loss_mimic_p4", "loss_mimic_p5"]
    assert [name for name in step.losses if "mimic" in name] == names
    # no region of a 64 x 64 image is large enough for p4 and p5; their adapters are reached all the same
    values = [step.losses[name].item() for name in names]
    assert values[0] > 0.0 and values[1:] == [0.0, 0.0]
    assert all(f"mimic.adapters.{name}.weight" in step.gradients for name in ("p3", "p4", "p5"))
    assert "qmimic/match_ratio_p3" in step.storage.latest()


def test_one_level_of_several(fpn_teacher):
    model = mimic_model(*RESNET_FPN, *fpn_teacher.options, IN_FEATURES, ["p4"])
    losses = training_step(model, batch()).losses
    assert losses["loss_mimic"].item() > 0.0
    assert list(model.mimic.adapters) == ["p4"]


@pytest.mark.parametrize("family", [(), RESNET_C4])
def test_student_and_teacher_may_have_nothing_in_common(fpn_teacher, family):
    model = mimic_model(*family, *fpn_teacher.options, TEACHER_IN_FEATURES, ["p3"], "INPUT.FORMAT", "RGB")
    step = training_step(model, batch((64, 64), (48, 80)))
    assert step.losses["loss_mimic"].item() > 0.0
    (adapter,) = model.mimic.adapters.values()
    assert (adapter.in_channels, adapter.out_channels) == (16, 12)


def test_a_coarser_teacher_meets_the_student_by_its_input_scale(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1])
    with pytest.raises(ValueError) as caught:
        mimic_model(*written.options)
    for word in ("'conv5'", "8", "16", f"{QMIMIC}.TEACHER.INPUT_SCALE"):
        assert word in str(caught.value)
    model = mimic_model(*written.options, f"{QMIMIC}.TEACHER.INPUT_SCALE", 2.0)
    calls = calls_of_mimic_loss(model)
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0
    assert calls[0]["teacher_maps"]["conv5"].shape[-2:] == calls[0]["maps"]["conv5"].shape[-2:] == (8, 8)


# --------------------------------------------------------------------------------------- the regions


@pytest.mark.parametrize(
    "source", ["sampled", "proposals", "teacher_proposals", "ground_truth", "ground_truth+sampled"]
)
@pytest.mark.parametrize("most", [0, 1, 3])
def test_the_regions_are_those_of_the_source(vgg_teacher, source, most):
    model, inputs = mimic_model(*vgg_teacher.options, ROI_SOURCE, source.split("+"), MAX_ROIS, most), batch()
    model.train()
    known = {"ground_truth": [each["instances"].gt_boxes for each in inputs]}
    if source == "teacher_proposals":
        known[source] = model.mimic.teacher.features_and_proposals(inputs)[1]

    def record(module, args, output):
        known["proposals"] = [each.proposal_boxes for each in args[2]]
        known["sampled"] = [each.proposal_boxes for each in output[0]]
        known["ground_truth+sampled"] = [Boxes.cat(each) for each in zip(known["ground_truth"], known["sampled"])]

    model.roi_heads.register_forward_hook(record)
    calls = calls_of_mimic_loss(model)
    assert training_step(model, inputs).losses["loss_mimic"].item() > 0.0
    expected = [each.tensor[: most or None] for each in known[source]]
    assert all(len(each) for each in expected)
    assert_equal([each.tensor for each in calls[0]["boxes"]], expected)


def test_neighbours_change_from_step_to_step_and_not_by_chance(vgg_teacher):
    options = (ROI_SOURCE, ["neighbourhood"], f"{QMIMIC}.MIMIC.NUM_NEIGHBOURS", 2, f"{QMIMIC}.MIMIC.JITTER", 0.1)
    model, inputs = mimic_model(*vgg_teacher.options, *options), batch()
    calls = calls_of_mimic_loss(model)
    for seed, iteration in ((1, 0), (2, 0), (1, 3)):
        training_step(model, inputs, seed=seed, iteration=iteration)
    first, second, third = ([each.tensor for each in call["boxes"]] for call in calls)
    assert [len(each) for each in first] == [3 * len(each["instances"]) for each in inputs]
    assert_equal(first, second)
    assert not torch.equal(first[0], third[0])
    assert_equal(first[0][: len(inputs[0]["instances"])], inputs[0]["instances"].gt_boxes.tensor)


def test_whole_maps(vgg_teacher, fpn_teacher):
    inputs = batch((64, 64), (48, 80))
    step = training_step(mimic_model(*vgg_teacher.options, ROI_SOURCE, ["whole_map"]), inputs)
    assert step.losses["loss_mimic"].item() > 0.0
    assert set(step.gradients) > {"mimic.adapters.conv5.weight"}
    step = training_step(mimic_model(*RESNET_FPN, *fpn_teacher.options, ROI_SOURCE, ["whole_map"]), inputs)
    assert all(step.losses[f"loss_mimic_{name}"].item() > 0.0 for name in ("p3", "p4", "p5"))


@pytest.mark.parametrize("source", ["sampled", "proposals", "teacher_proposals", "ground_truth", "neighbourhood"])
def test_images_without_ground_truth(vgg_teacher, source):
    model = mimic_model(*vgg_teacher.options, ROI_SOURCE, [source])
    step = training_step(model, batch(num_boxes=(0,)))
    assert all(math.isfinite(loss.item()) for loss in step.losses.values())
    assert (step.losses["loss_mimic"].item() > 0.0) == (source not in ("ground_truth", "neighbourhood"))
    assert all(torch.isfinite(gradient).all() for gradient in step.gradients.values())
    # whatever the regions, every parameter takes part in the step
    assert set(step.gradients) == {name for name, _ in model.named_parameters()}


def test_one_image_of_two_without_ground_truth(vgg_teacher):
    model = mimic_model(*vgg_teacher.options, ROI_SOURCE, ["ground_truth"])
    calls = calls_of_mimic_loss(model)
    assert training_step(model, batch(num_boxes=(0, 2))).losses["loss_mimic"].item() > 0.0
    assert [len(each) for each in calls[0]["boxes"]] == [0, 2]


def test_heads_that_keep_their_proposals_are_refused_for_sampled_alone(vgg_teacher):
    with pytest.raises(ValueError) as caught:
        mimic_model(*RES5, *vgg_teacher.options)
    for word in (ROI_SOURCE, "'sampled'", "Res5ROIHeads", "['proposals']", "['ground_truth']"):
        assert word in str(caught.value)
    for source in ("proposals", "ground_truth"):
        step = training_step(mimic_model(*RES5, *vgg_teacher.options, ROI_SOURCE, [source]), batch())
        assert step.losses["loss_mimic"].item() > 0.0


def test_heads_that_return_no_proposals_are_told_what_to_do(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    model.roi_heads.register_forward_hook(lambda module, args, output: ([], output[1]), prepend=True)
    with pytest.raises(ValueError, match="use 'proposals' or 'ground_truth'"):
        training_step(model, batch())
    assert model.mimic.record.maps == {}


# ------------------------------------------------------------------------------ the teacher beside it


def test_the_teacher_is_in_no_list_of_the_model(vgg_teacher):
    model, quant = mimic_model(*vgg_teacher.options).train(), other_model("QuantRCNN")
    assert isinstance(model.mimic.teacher, FrozenTeacher)
    adapter = {"mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"}
    assert set(model.state_dict()) - set(quant.state_dict()) == adapter
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in quant.named_parameters()} == adapter
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in quant.named_buffers()]
    teachers_own = set(map(id, model.mimic.teacher._backbone.modules()))
    assert not teachers_own & set(map(id, model.modules()))


def test_the_optimizer_trains_the_adapter_and_not_the_teacher(vgg_teacher):
    cfg = mimic_cfg(
        *vgg_teacher.options,
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01),
        *("SOLVER.BASE_LR", 0.1),
    )
    model = seeded_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert trained == {id(each) for each in model.parameters()}
    adapter = model.mimic.adapters["conv5"].weight.detach().clone()
    teacher = copy.deepcopy(model.mimic.teacher._backbone.state_dict())
    for iteration in range(3):
        with EventStorage(iteration):
            losses = model(batch(seed=iteration))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    moved = (model.mimic.adapters["conv5"].weight - adapter).norm().item()
    assert 0.0 < moved < 0.01  # three clipped steps of at most 0.1 * 0.01
    assert_equal(dict(model.mimic.teacher._backbone.state_dict()), dict(teacher))


def test_train_and_eval_leave_the_teacher_in_eval_mode(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    for mode in (True, False, True, True, False):
        model.train(mode)
        assert model.training is mode and model.backbone.training is mode
        assert not any(module.training for module in model.mimic.teacher._backbone.modules())
    assert model.train() is model and model.eval() is model


def test_no_statistic_of_the_teacher_changes_in_training(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    before = copy.deepcopy(model.mimic.teacher._backbone.state_dict())
    own = copy.deepcopy(model.backbone.state_dict())
    for seed in range(3):
        training_step(model, batch(seed=seed))
    assert_equal(dict(model.mimic.teacher._backbone.state_dict()), dict(before))
    changed = [name for name, each in model.backbone.state_dict().items() if not torch.equal(each, own[name])]
    assert any(name.endswith("running_mean") for name in changed)


def test_a_copy_shares_the_teacher_and_has_its_own_record(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    copied = copy.deepcopy(model)
    assert copied.mimic.teacher is model.mimic.teacher
    assert copied.mimic.record is not model.mimic.record
    first, second = (training_step(each, batch()) for each in (model, copied))
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)


def test_the_teacher_follows_the_model(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    teacher = model.mimic.teacher
    assert model.to("cpu").mimic.teacher is teacher and teacher.device == model.device
    nn.Sequential(model).to("meta")  # as a wrapper moves it
    assert teacher.device == torch.device("meta")


def test_the_dtype_of_the_student_is_not_the_teachers(vgg_teacher):
    model = mimic_model(*vgg_teacher.options, *PLAIN).train().double()
    assert next(model.backbone.parameters()).dtype == torch.float64
    assert model.mimic.teacher.features(batch())["conv5"].dtype == torch.float32


# --------------------------------------------------------------------------------- seeds, pairing runs


def variants(written):
    scratch = ("GeneralizedRCNN", ())
    quant = ("QuantRCNN", ())
    mimic = ("QuantMimicRCNN", (*written.options, *PLAIN))
    relu = ("QuantMimicRCNN", (*written.options, *PLAIN, f"{QMIMIC}.MIMIC.ADAPTER", "conv1x1_relu"))
    qmimic = ("QuantMimicRCNN", tuple(written.options))
    return [scratch, quant, mimic, relu, qmimic]


def test_variants_of_one_seed_begin_alike_and_draw_alike(vgg_teacher):
    states, generators = [], []
    for meta_architecture, options in variants(vgg_teacher):
        model = other_model(meta_architecture, *options, seed=7).train()
        states.append(without("mimic.", model.state_dict()))
        generators.append(torch.get_rng_state())
    for state, generator in zip(states[1:], generators[1:]):
        assert_equal(dict(state), dict(states[0]))
        assert torch.equal(generator, generators[0])


def test_a_step_of_every_variant_draws_alike(vgg_teacher):
    sampled = []
    for meta_architecture, options in variants(vgg_teacher):
        training_step(other_model(meta_architecture, *options), batch())
        sampled.append(torch.get_rng_state())
    assert all(torch.equal(each, sampled[0]) for each in sampled)


def test_the_same_seed_gives_the_same_adapter(vgg_teacher):
    first, second = (mimic_model(*vgg_teacher.options, seed=3).state_dict() for _ in range(2))
    assert_equal(dict(first), dict(second))


# ---------------------------------------------------------------------- nothing outlives a step, or leaks


def test_nothing_of_a_step_is_kept(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    references, pairs = [], model.mimic.pairs

    def record(maps, teacher_maps, boxes):
        references.extend(weakref.ref(each) for each in (maps["conv5"], teacher_maps["conv5"]))
        return pairs(maps, teacher_maps, boxes)

    model.mimic.pairs = record
    with EventStorage():
        losses = model(batch())
    assert model.mimic.record.maps == {}
    assert model.mimic.record.regions.sampled == [] and not model.mimic.record.is_recording
    sum(losses.values()).backward()
    del losses
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_nothing_of_a_failed_step_is_kept(vgg_teacher, monkeypatch):
    model = mimic_model(*vgg_teacher.options).train()
    monkeypatch.setattr(model.mimic.teacher, "features", lambda inputs: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError), EventStorage():
        model(batch())
    assert model.mimic.record.maps == {} and not model.mimic.record.is_recording


def test_evaluation_records_nothing_and_runs_no_teacher(vgg_teacher, monkeypatch):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    monkeypatch.setattr(FrozenTeacher, "features", lambda *args: pytest.fail("the teacher ran"))
    seen = []
    model.roi_heads.register_forward_hook(lambda *args: seen.append(model.mimic.record.maps))
    detections_of(model, batch())
    assert seen == [{}]


def test_losses_under_no_grad_hold_no_graph(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    with EventStorage(), torch.no_grad():
        losses = model(batch())
    assert losses["loss_mimic"].item() > 0.0
    assert not any(loss.requires_grad for loss in losses.values())


# ----------------------------------------------------------------------------- checkpoints, evaluation


def test_a_checkpoint_holds_the_adapter_and_no_teacher(vgg_teacher, tmp_path):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    build_checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth")["model"]
    assert set(saved) == set(model.state_dict())
    assert sorted(name for name in saved if name.startswith("mimic.")) == [
        "mimic.adapters.conv5.bias",
        "mimic.adapters.conv5.weight",
    ]
    teachers = [each for each in model.mimic.teacher._backbone.state_dict().values() if each.numel() > 1]
    same = [(a, b) for a, b in itertools.product(saved.values(), teachers) if a.shape == b.shape and torch.equal(a, b)]
    assert same == []
    again = mimic_model(*vgg_teacher.options, seed=9)
    build_checkpointer(again, str(tmp_path)).resume_or_load("", resume=True)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


def move_away(written, folder) -> Path:
    """A copy of a teacher's files, to be removed."""
    paths = []
    for source in (written.config_file, written.weights):
        path = folder / Path(source).name
        path.write_bytes(Path(source).read_bytes())
        paths.append(path)
    return paths


@pytest.mark.parametrize("gone", ["both", "weights", "truncated"])
def test_evaluation_runs_with_the_teachers_files_removed(vgg_teacher, tmp_path, gone):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    options = (CONFIG_FILE, str(config_file), WEIGHTS, str(weights))
    model = mimic_model(*options)
    training_step(model, batch())
    expected = detections_of(model, batch())
    build_checkpointer(model, str(tmp_path)).save("model")
    if gone == "truncated":
        weights.write_bytes(b"")
    else:
        weights.unlink()
    if gone == "both":
        config_file.unlink()

    again = mimic_model(*options, seed=9)
    build_checkpointer(again, "").load_for_evaluation(str(tmp_path / "model.pth"))
    # as Detectron2's evaluator does it, which puts the model back into training mode at the end
    with inference_context(again):
        assert_equal(detections_of(again, batch()), expected)
    assert again.training and again.mimic.teacher is None
    with pytest.raises((FileNotFoundError, ValueError)) as caught, EventStorage():
        again(batch())
    assert "MODEL.QMIMIC.TEACHER" in str(caught.value)


@pytest.mark.parametrize("meta_architecture, options", [("QuantRCNN", ()), ("GeneralizedRCNN", ())])
def test_a_student_is_loaded_without_this_class(vgg_teacher, tmp_path, meta_architecture, options):
    quantizer = PLAIN if meta_architecture == "GeneralizedRCNN" else ()
    model = mimic_model(*vgg_teacher.options, *quantizer)
    training_step(model, batch())
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    shipped = other_model(meta_architecture, *options, seed=9)
    DetectionCheckpointer(shipped).load(str(tmp_path / "model.pth"))
    assert_equal(detections_of(shipped, batch()), detections_of(model, batch()))


def test_a_trace_of_the_backbone_in_evaluation(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    model.eval()
    pixels = model.preprocess_image(batch()).tensor
    with torch.no_grad():
        traced = torch.jit.trace(model.backbone, pixels, strict=False)
        assert_equal(dict(traced(pixels.flip(-1))), dict(model.backbone(pixels.flip(-1))))
    assert model.mimic.record.maps == {}


# ------------------------------------------------------------------------- how Detectron2 trains a model


def test_a_cascade_trains_too(vgg_teacher):
    model = mimic_model(*vgg_teacher.options, *CASCADE)
    calls = calls_of_mimic_loss(model)
    sampled = []
    model.roi_heads.register_forward_hook(lambda module, args, output: sampled.extend(output[0]))
    step = training_step(model, batch())
    assert {"loss_cls_stage0", "loss_cls_stage2", "loss_mimic"} <= set(step.losses)
    assert_equal([each.tensor for each in calls[0]["boxes"]], [each.proposal_boxes.tensor for each in sampled])


@pytest.mark.parametrize("options", [(), PLAIN, CASCADE, (NAME, "PowerOfTwo")])
def test_mixed_precision(vgg_teacher, options):
    model = mimic_model(*vgg_teacher.options, *options).train()
    full = training_step(model, batch())
    torch.manual_seed(5)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch((64, 64), (80, 64)))
        same = model(batch())["loss_mimic"]
    sum(losses.values()).backward()
    assert losses["loss_mimic"].dtype == torch.float32
    assert same.item() == pytest.approx(full.losses["loss_mimic"].item(), rel=0.3)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())


def test_detectron2s_trainer_and_hooks(vgg_teacher, tmp_path):
    cfg = mimic_cfg(*vgg_teacher.options, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 2, PERIOD, 2)
    model = seeded_model(cfg)
    assert model.mimic.teacher is None
    optimizer = build_optimizer(cfg, model)
    data = [batch(seed=seed) for seed in range(2)]
    trainer = SimpleTrainer(model, itertools.cycle(data), optimizer)
    assert model.mimic.teacher is not None  # the trainer calls train(): mistakes show before the first iteration
    checkpointer = build_checkpointer(model, str(tmp_path))
    evaluated = []

    def evaluate():
        with inference_context(model):
            evaluated.append(len(detections_of(model, batch())))
        return {}

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            hooks.PreciseBN(4, model, itertools.cycle(data), 2),
            hooks.PeriodicCheckpointer(checkpointer, 2, max_iter=4),
            hooks.EvalHook(2, evaluate),
        ]
    )
    before = copy.deepcopy(model.mimic.teacher._backbone.state_dict())
    trainer.train(0, 4)
    assert evaluated == [2, 2]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
    ]
    history = trainer.storage.histories()
    assert len(history["loss_mimic"].values()) == 4 and len(history["qmimic/match_ratio"].values()) == 2
    assert not any(name.startswith("qmimic/") and "loss" in name for name in history)
    assert_equal(dict(model.mimic.teacher._backbone.state_dict()), dict(before))


def ddp_worker(rank: int, folder: str, options: list) -> None:
    """One of two processes; the second one's images have no annotation."""
    results = {}
    for name, (own_options, iteration) in options.items():
        model = DistributedDataParallel(mimic_model(*own_options).train(), broadcast_buffers=False)
        step = training_step(model, ddp_batch(rank), iteration=iteration)
        teacher = model.module.mimic.teacher._backbone.state_dict()
        results[name] = (step.losses, step.gradients, dict(teacher))
    torch.save(results, os.path.join(folder, f"rank{rank}.pth"))


def ddp_batch(rank):
    return batch(seed=rank, num_boxes=(2,) if rank == 0 else (0,))


def test_two_processes_one_without_regions(vgg_teacher, fpn_teacher, tmp_path):
    warm_up = (f"{QMIMIC}.MIMIC.SCHEDULE", "warmup", f"{QMIMIC}.MIMIC.WARMUP_ITERS", 10)
    source = (ROI_SOURCE, ["ground_truth"])
    # gradients are the mean of the two processes' own, in every process
    runs = {
        "ground truth": ([*vgg_teacher.options, *source], 0),
        "warm-up": ([*vgg_teacher.options, *source, *warm_up], 0),
        "sampled": ([*vgg_teacher.options, *PLAIN], 0),
        "levels": ([*RESNET_FPN, *fpn_teacher.options, *source], 0),
    }
    run_two_processes(ddp_worker, tmp_path, runs)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    for name, (options, iteration) in runs.items():
        alone = [training_step(mimic_model(*options), ddp_batch(rank), iteration=iteration) for rank in range(2)]
        (losses_0, gradients_0, teacher_0), (losses_1, gradients_1, teacher_1) = (each[name] for each in ranks)
        assert_equal(gradients_0, gradients_1)
        assert_equal(teacher_0, teacher_1)
        assert all(torch.isfinite(gradient).all() for gradient in gradients_0.values())
        mean = {
            f"module.{key}": (gradient + alone[1].gradients[key]) / 2
            for key, gradient in alone[0].gradients.items()
        }
        torch.testing.assert_close(gradients_0, mean)
        torch.testing.assert_close(losses_0, alone[0].losses)
        torch.testing.assert_close(losses_1, alone[1].losses)
        assert not any("teacher" in key for key in gradients_0)
    assert ranks[0]["ground truth"][0]["loss_mimic"].item() > 0.0
    assert ranks[1]["ground truth"][0]["loss_mimic"].item() == 0.0


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "key, value, words",
    [
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", -1.0, ["-1.0", ">= 0"]),
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", float("nan"), ["nan", ">= 0"]),
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", float("inf"), ["inf", "finite"]),
        (f"{QMIMIC}.MIMIC.SCHEDULE", "linear", ["'linear'", "'warmup'"]),
        (f"{QMIMIC}.MIMIC.ADAPTER_PLACEMENT", "head", ["'head'", "'trunk'"]),
        (f"{QMIMIC}.DIAGNOSTICS.GRADIENT_PERIOD", -1, ["-1", "0 = never"]),
        (f"{QMIMIC}.MIMIC.ROI_SOURCE", ["anchors"], ["'anchors'", "'sampled'"]),
        (f"{QMIMIC}.MIMIC.MAX_ROIS_PER_IMAGE", -1, ["-1", "0 = all"]),
        (f"{QMIMIC}.MIMIC.JITTER", 1.0, ["1.0", "below 1.0"]),
        (f"{QMIMIC}.MIMIC.NUM_NEIGHBOURS", -1, ["-1", ">= 0"]),
        (f"{QMIMIC}.DIAGNOSTICS.PERIOD", -5, ["-5", "0 = never"]),
        (f"{QMIMIC}.MIMIC.POOLER_TYPE", "Crop", ["'Crop'", "'ROIPool'"]),
        (f"{QMIMIC}.MIMIC.NORMALIZE_BY", "rois", ["'rois'", "'target'"]),
        (f"{QMIMIC}.MIMIC.ADAPTER", "mlp", ["'mlp'", "'conv1x1'"]),
        (f"{QMIMIC}.MIMIC.IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.MIMIC.TEACHER_IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.QUANTIZER.NAME", "Round", ["'Round'", "Uniform"]),
        (f"{QMIMIC}.QUANTIZER.STRIDE", 0.0, ["0.0", "positive"]),
        (f"{QMIMIC}.QUANTIZER.STRIDE", float("nan"), ["nan", "positive"]),
        (f"{QMIMIC}.QUANTIZER.NUM_CODES", -2, ["-2", "unbounded"]),
        (f"{QMIMIC}.QUANTIZER.IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.TEACHER.INPUT_SCALE", -2.0, ["-2.0", "positive"]),
    ],
)
def test_bad_values_stop_the_construction_and_name_key_value_and_fix(vgg_teacher, key, value, words):
    with pytest.raises((ValueError, KeyError)) as caught:
        mimic_model(*vgg_teacher.options, key, value)
    message = str(caught.value.args[0])
    assert all(word in message for word in [key, *words]), message


def test_channels_that_differ_without_an_adapter_stop_the_construction(vgg_teacher):
    with pytest.raises(ValueError) as caught:
        mimic_model(*vgg_teacher.options, f"{QMIMIC}.MIMIC.ADAPTER", "")
    for word in ("'conv5' has 16 channels", "has 32", f"{QMIMIC}.MIMIC.ADAPTER", "'conv1x1'"):
        assert word in str(caught.value)


def test_numbers_of_maps_that_differ_stop_the_construction(fpn_teacher):
    with pytest.raises(ValueError) as caught:
        mimic_model(*RESNET_FPN, *fpn_teacher.options, TEACHER_IN_FEATURES, ["p3"])
    for word in (IN_FEATURES, "TEACHER_IN_FEATURES", "['p3', 'p4', 'p5']"):
        assert word in str(caught.value)


def test_a_teacher_config_that_cannot_be_read_stops_a_training(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text("MODEL: [")
    model = mimic_model(CONFIG_FILE, str(path))
    with pytest.raises(ValueError) as caught:
        model.train()
    assert CONFIG_FILE in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("begin", ["train", "forward"])
@pytest.mark.parametrize("mistake", ["no config", "no weights", "truncated", "empty path", "another architecture"])
def test_mistakes_in_the_teachers_files_stop_before_the_first_iteration(vgg_teacher, tmp_path, begin, mistake):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    options, words = [CONFIG_FILE, str(config_file), WEIGHTS, str(weights)], [WEIGHTS, str(weights)]
    if mistake == "no config":
        config_file.unlink()
        words = [CONFIG_FILE, str(config_file)]
    elif mistake == "no weights":
        weights.unlink()
    elif mistake == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif mistake == "empty path":
        options[-1] = ""
        words = [WEIGHTS, "MODEL.WEIGHTS"]
    else:
        narrow = other_model("GeneralizedRCNN", "MODEL.VGG.WIDTH_DIVISOR", 8)
        torch.save({"model": narrow.state_dict()}, weights)
    model = mimic_model(*options)
    with pytest.raises((FileNotFoundError, ValueError)) as caught, EventStorage():
        model.train() if begin == "train" else model(batch())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_teacher_that_appears_after_construction_does_not_train_without_the_mimic(vgg_teacher, tmp_path):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    text = config_file.read_text()
    config_file.unlink()
    model = mimic_model(CONFIG_FILE, str(config_file), WEIGHTS, str(weights))
    config_file.write_text(text)
    with pytest.raises(ValueError, match="build the model again"):
        model.train()


def test_explicit_construction(vgg_teacher):
    stock = other_model("GeneralizedRCNN")
    parts = {
        "backbone": stock.backbone,
        "proposal_generator": stock.proposal_generator,
        "roi_heads": stock.roi_heads,
        "pixel_mean": [127.5] * 3,
        "pixel_std": [64.0] * 3,
    }
    cfg = mimic_cfg(*vgg_teacher.options, *PLAIN)
    teacher_shapes = vgg_teacher.model.backbone.output_shape()
    shapes = {"student_shapes": stock.backbone.output_shape(), "teacher_shapes": teacher_shapes}
    with pytest.raises(TypeError, match="build_teacher"):
        Mimic(**shapes)
    mimic = Mimic(**shapes, build_teacher=lambda: FrozenTeacher(cfg))
    model = QuantMimicRCNN(**parts, mimic=mimic)
    assert model.mimic is mimic
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_building_the_model_does_not_change_the_config(vgg_teacher):
    cfg = mimic_cfg(*vgg_teacher.options)
    cfg.freeze()
    before = cfg.dump()
    build_model(cfg).train()
    assert cfg.dump() == before


def test_boxes_of_the_regions_carry_no_gradient(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    calls = calls_of_mimic_loss(model)
    training_step(model, batch())
    assert all(isinstance(each, Boxes) and not each.tensor.requires_grad for each in calls[0]["boxes"])
