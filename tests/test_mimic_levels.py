"""The mimic loss of several levels and of whole maps."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from mimic_losses import (
    LEVELS,
    constant_maps,
    level_maps,
    make_level_loss,
    make_loss,
    measured,
    measured_pairs,
    set_adapter,
    spec,
)

from qmimic_d2.diagnostics.feature_comparison import FIGURES
from qmimic_d2.modeling.mimic.loss import RoIMimicLoss
from qmimic_d2.modeling.quantizer import UniformQuantizer


def whole_maps(loss, *arguments):
    return loss.loss(loss.whole_map_pairs(*arguments))


# ---------------------------------------------------------------------------------------- several levels


def test_every_level_has_its_regions_and_all_share_the_divisor():
    # FPN: a region of 224 x 224 pixels belongs to p4, of half the side to p3, of twice the side to p5
    boxes = [Boxes(torch.tensor([[64.0, 64.0, 64 + side, 64 + side] for side in (80.0, 120.0, 300.0, 500.0)]))]
    loss = make_level_loss()
    losses = loss(level_maps([1.0, 2.0, 3.0], 2), level_maps([3.0, 3.0, 3.0], 1, "teacher_"), boxes)
    # r = 0.5 * 2 channels * value; 4 bins; (3 - 1)^2, (3 - 2)^2, (3 - 3)^2; 4 regions in all
    expected = {
        "loss_mimic_p3": 2 * 4 * 4.0 / 8,
        "loss_mimic_p4": 1 * 4 * 1.0 / 8,
        "loss_mimic_p5": 0.0,
    }
    assert {name: each.item() for name, each in losses.items()} == pytest.approx(expected)


def test_a_level_without_regions_gives_a_zero_that_reaches_its_adapter():
    boxes = [Boxes(torch.tensor([[64.0, 64.0, 100.0, 100.0]]))]
    student = {name: each.requires_grad_(True) for name, each in level_maps([1.0, 2.0, 3.0], 2).items()}
    loss = make_level_loss(student_quantizer=UniformQuantizer(0.5))
    losses = loss(student, level_maps([3.0, 3.0, 3.0], 1, "teacher_"), boxes)
    sum(losses.values()).backward()
    assert losses["loss_mimic_p3"].item() == pytest.approx(4 * 4.0 / 2)
    assert losses["loss_mimic_p4"].item() == losses["loss_mimic_p5"].item() == 0.0
    for name in LEVELS:
        gradients = [student[name].grad, *(each.grad for each in loss.adapters[name].parameters())]
        assert all((gradient.abs().sum() > 0) == (name == "p3") for gradient in gradients)


def test_levels_without_any_region():
    losses = make_level_loss()(
        level_maps([1.0, 2.0, 3.0], 2), level_maps([3.0, 3.0, 3.0], 1, "teacher_"), [Boxes(torch.zeros(0, 4))]
    )
    assert {name: each.item() for name, each in losses.items()} == {f"loss_mimic_{name}": 0.0 for name in LEVELS}


def test_every_level_with_regions_is_measured():
    boxes = [Boxes(torch.tensor([[64.0, 64.0, 100.0, 100.0], [64.0, 64.0, 300.0, 300.0]]))]
    loss = make_level_loss(code_quantizer=UniformQuantizer(1.0))
    arguments = (level_maps([1.0, 2.0, 3.0], 2), level_maps([1.2, 3.0, 3.0], 1, "teacher_"), boxes)
    with EventStorage() as storage:
        measured(loss, *arguments)
    written = {name: value for name, (value, _) in storage.latest().items()}
    assert set(written) == {f"qmimic/{name}_{level}" for name in FIGURES for level in ("p3", "p4")}
    assert (written["qmimic/match_ratio_p3"], written["qmimic/match_ratio_nonzero_p3"]) == (1.0, 1.0)
    assert (written["qmimic/match_ratio_p4"], written["qmimic/within_one_p4"]) == (0.0, 1.0)
    assert written["qmimic/relative_error_p3"] == pytest.approx(0.2 / 1.2)
    tags = [each["tag"] for each in storage._histograms]
    assert tags == [f"qmimic/{side}_codes_{level}" for level in ("p3", "p4") for side in ("student", "teacher")]
    # apart from a training, levels without regions are there, too
    compared = loss.compare(loss.pairs(*arguments))
    assert {name: each.num_rois for name, each in compared.items()} == {"p3": 1, "p4": 1, "p5": 0}
    assert {f"qmimic/{name}_p4": value for name, value in compared["p4"].figures().items()}.items() <= written.items()


# -------------------------------------------------------------------------------------------- whole maps


def test_whole_maps_compare_the_cells_inside_the_images():
    loss = make_loss(student=1, teacher=1)
    set_adapter(loss, 2.0, 0.0)
    student, teacher = constant_maps(1.0, size=3), constant_maps(5.0, size=3)
    # stride 8: 9 x 16 pixels are 2 x 2 cells, 24 x 1 pixels are 3 x 1
    value = whole_maps(loss, student, teacher, [(9, 16), (24, 1)])["loss_mimic"]
    # each of the 7 cells contributes (2 - 5)^2, divided by 2 * 7
    assert value.item() == pytest.approx(4.5)
    teacher["f"][0, :, 2] = 99.0  # the padding below the first image
    teacher["f"][1, :, :, 1:] = -99.0
    assert whole_maps(loss, student, teacher, [(9, 16), (24, 1)])["loss_mimic"].item() == pytest.approx(4.5)
    teacher["f"][1, :, 2, 0] = 7.0
    # six cells of 9 and one of 25
    assert whole_maps(loss, student, teacher, [(9, 16), (24, 1)])["loss_mimic"].item() == pytest.approx(79 / 14)


def test_whole_maps_of_several_levels_and_of_a_smaller_teacher():
    torch.manual_seed(0)
    shapes = {"fine": spec(1, stride=4), "coarse": spec(1, stride=8)}
    loss = RoIMimicLoss(student_shapes=shapes, teacher_shapes=shapes, adapter="")
    student = {"fine": torch.ones(1, 1, 4, 4), "coarse": torch.ones(1, 1, 2, 2)}
    teacher = {"fine": torch.zeros(1, 1, 4, 3), "coarse": torch.zeros(1, 1, 2, 2)}
    losses = whole_maps(loss, student, teacher, [(16, 16)])
    # 12 cells and 4: divided by twice all of them
    assert {name: value.item() for name, value in losses.items()} == {
        "loss_mimic_fine": pytest.approx(12 / 32),
        "loss_mimic_coarse": pytest.approx(4 / 32),
    }


def test_whole_maps_are_quantized_measured_and_have_a_gradient():
    quantizer = UniformQuantizer(1.0)
    loss = make_loss(
        student=1, teacher=1, student_quantizer=quantizer, teacher_quantizer=quantizer, code_quantizer=quantizer
    )
    set_adapter(loss, 1.0, 0.0)
    student, teacher = constant_maps(1.2), constant_maps(2.9)
    student["f"].requires_grad_()
    with EventStorage() as storage:
        value = measured_pairs(loss, loss.whole_map_pairs(student, teacher, [(48, 48)] * 2))["loss_mimic"]
    assert value.item() == pytest.approx(2.0)
    assert storage.latest()["qmimic/match_ratio"][0] == 0.0
    value.backward()
    assert student["f"].grad.abs().min() > 0.0
