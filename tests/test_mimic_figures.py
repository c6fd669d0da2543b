"""What the mimic loss compares of both sides, and the figures that it writes."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from mimic_losses import (
    QUANTIZERS,
    constant_maps,
    level_maps,
    make_level_loss,
    make_loss,
    maps,
    measured,
    no_boxes,
    pooled_by_detectron2,
    set_adapter,
    three_boxes,
)

from qmimic_d2.diagnostics.feature_comparison import compare_features
from qmimic_d2.modeling.quantizer import UniformQuantizer


def compute(loss, *arguments):
    return loss(*arguments)


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def test_pairs_hold_both_sides_pooled_and_the_regions_of_all_levels():
    loss = make_loss(student_quantizer=UniformQuantizer(0.5))
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    student["f"].requires_grad_(True)
    (pair,) = loss.pairs(student, teacher, boxes)
    assert (pair.name, pair.num_regions) == ("f", 3)
    torch.testing.assert_close(pair.student, loss.adapters["f"](pooled_by_detectron2(student["f"], boxes)))
    torch.testing.assert_close(pair.teacher, pooled_by_detectron2(teacher["f"], boxes))
    assert pair.student.requires_grad and not pair.teacher.requires_grad
    assert_same(loss(student, teacher, boxes), loss.loss([pair]))


def test_another_loss_is_a_function_of_a_pair():
    def absolute(pair):
        return (pair.student - pair.teacher).abs().sum() / pair.num_regions

    loss = make_level_loss(distance=absolute)
    assert loss.distance is absolute
    boxes = [Boxes(torch.tensor([[64.0, 64.0, 100.0, 100.0]]))]
    pairs = loss.pairs(level_maps([1.0, 2.0, 3.0], 2), level_maps([3.0, 3.0, 3.0], 1, "teacher_"), boxes)
    losses = loss.loss(pairs)
    assert losses["loss_mimic_p3"].item() == pytest.approx(absolute(pairs[0]).item()) != 0.0
    # without a region it is not called
    assert losses["loss_mimic_p4"].item() == losses["loss_mimic_p5"].item() == 0.0
    assert losses["loss_mimic_p5"].requires_grad and [len(each.student) for each in pairs] == [1, 0, 0]


def test_the_figures_are_written_when_asked_for():
    # r(f_s) = [1.0, 3.0]; the teacher 0.9 everywhere has code 1: half of the entries agree
    loss = make_loss(1, 2, code_quantizer=UniformQuantizer(1.0))
    loss.adapters["f"].weight.data[:, 0, 0, 0] = torch.tensor([0.5, 1.5])
    loss.adapters["f"].bias.data.zero_()
    arguments = (constant_maps(2.0), constant_maps(0.9, channels=2), three_boxes())
    with EventStorage() as storage:
        loss(*arguments)
        assert storage.latest() == {} and storage._histograms == []
        measured(loss, *arguments)
    written = {name: value for name, (value, _) in storage.latest().items()}
    assert written == pytest.approx(
        {
            **{"qmimic/match_ratio": 0.5, "qmimic/match_ratio_nonzero": 0.5},
            **{"qmimic/within_one": 0.5, "qmimic/within_one_nonzero": 0.5},
            "qmimic/cosine": 4.0 / math.sqrt(2 * 10.0),
            "qmimic/relative_error": math.sqrt((0.1**2 + 2.1**2) / (2 * 0.81)),
            **{f"qmimic/{side}_sparsity": 0.0 for side in ("student", "teacher")},
            **{f"qmimic/{side}_saturation": 0.0 for side in ("student", "teacher")},
            **{f"qmimic/{side}_dead_channels": 0.0 for side in ("student", "teacher")},
            "qmimic/student_at_threshold": math.nan,  # nothing lies between 0 and 1
            "qmimic/teacher_rms": 0.9,
        },
        nan_ok=True,
    )
    entries = 3 * 2 * 4
    assert [(each["tag"], each["num"]) for each in storage._histograms] == [
        ("qmimic/student_codes", entries),
        ("qmimic/teacher_codes", entries),
    ]


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_compared_are_adapted_student_and_pooled_teacher_before_any_quantizer(quantizer):
    codes = UniformQuantizer(1.0)
    sides = {"student_quantizer": QUANTIZERS[quantizer], "teacher_quantizer": QUANTIZERS[quantizer]}
    loss = make_loss(**sides, code_quantizer=codes)
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    with EventStorage() as storage:
        measured(loss, student, teacher, boxes)
    with torch.no_grad():
        adapted = loss.adapters["f"](pooled_by_detectron2(student["f"], boxes))
    expected = compare_features(adapted, pooled_by_detectron2(teacher["f"], boxes), codes).figures()
    assert {name: value for name, (value, _) in storage.latest().items()} == pytest.approx(
        {f"qmimic/{name}": value for name, value in expected.items()}, abs=1e-5
    )
    assert loss.compare(loss.pairs(student, teacher, boxes))["f"].figures() == pytest.approx(expected, abs=1e-5)


def test_measuring_leaves_loss_and_gradients_as_they_are():
    quantizer = UniformQuantizer(0.5)
    results = []
    for measure in (False, True):
        loss = make_loss(student_quantizer=quantizer, teacher_quantizer=quantizer, code_quantizer=quantizer)
        student = maps(2, seed=1)
        student["f"].requires_grad_(True)
        state = torch.get_rng_state()
        with EventStorage():
            value = (measured if measure else compute)(loss, student, maps(3, seed=2), three_boxes())["loss_mimic"]
        assert torch.equal(torch.get_rng_state(), state)
        value.backward()
        results.append((value.detach(), student["f"].grad, *(each.grad for each in loss.parameters())))
    assert all(torch.equal(first, second) for first, second in zip(*results))


def test_figures_of_silence_are_nan_and_stop_nothing():
    loss = make_loss(1, 1, code_quantizer=UniformQuantizer(1.0))
    set_adapter(loss, 1.0, 0.0)
    with EventStorage() as storage:
        measured(loss, constant_maps(0.1), constant_maps(0.2), three_boxes())
    assert storage.latest()["qmimic/match_ratio"][0] == 1.0
    assert math.isnan(storage.latest()["qmimic/match_ratio_nonzero"][0])


def test_nothing_is_measured_without_storage_regions_or_dictionary():
    arguments = (maps(2, seed=1), maps(3, seed=2))
    measured(make_loss(code_quantizer=UniformQuantizer(1.0)), *arguments, three_boxes())
    with EventStorage() as storage:
        measured(make_loss(), *arguments, three_boxes())
        measured(make_loss(code_quantizer=UniformQuantizer(1.0)), *arguments, no_boxes())
    assert storage.latest() == {}
    loss = make_loss(code_quantizer=UniformQuantizer(1.0))
    compared = loss.compare(loss.pairs(*arguments, no_boxes()))["f"]
    assert compared.num_rois == 0 and len(compared.student_active) == 3
    with pytest.raises(ValueError, match="code_quantizer"):
        make_loss().compare(loss.pairs(*arguments, three_boxes()))
