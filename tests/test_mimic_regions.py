"""The maps and the regions that a student and its teacher are compared on."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from helpers import RESNET_C4, RESNET_FPN, batch, calls_of_mimic_loss, training_step, write_teacher
from mimic_models import IN_FEATURES, QMIMIC, RES5, ROI_SOURCE, TEACHER_IN_FEATURES, assert_equal, mimic_model

MAX_ROIS = f"{QMIMIC}.MIMIC.MAX_ROIS_PER_IMAGE"


# ---------------------------------------------------------------------------------- maps, levels, scales


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


# ------------------------------------------------------------------------------------------- the regions


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


# --------------------------------------------------------------------------------------------- bad input


def test_boxes_of_the_regions_carry_no_gradient(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    calls = calls_of_mimic_loss(model)
    training_step(model, batch())
    assert all(isinstance(each, Boxes) and not each.tensor.requires_grad for each in calls[0]["boxes"])
