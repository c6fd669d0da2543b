"""The loss of many regions, image by image and without its pooled sides, against the loss of the sides."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from mimic_losses import QUANTIZERS, make_loss, maps, measured

from qmimic_d2.modeling.mimic import pair as pair_module
from qmimic_d2.modeling.mimic.loss import NORMALIZERS
from qmimic_d2.modeling.mimic.pair import MapPair, Pair, sum_of_squares
from qmimic_d2.modeling.quantizer import UniformQuantizer

IMAGES = 4


def many_boxes(images=IMAGES, count=20):
    """More bins than cells: none in the second image, some partly or wholly outside of a map of 48 x 48 pixels."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(images, count, 2, generator=generator) * 60 - 12
    sides = torch.rand(images, count, 2, generator=generator) * 30 + 1
    boxes = [Boxes(each) for each in torch.cat([corners, corners + sides], dim=2)]
    return [Boxes(torch.zeros(0, 4)) if index == 1 else each for index, each in enumerate(boxes)]


def inputs(student=2, teacher=3, teacher_size=6, dtype=torch.float64):
    sides = maps(student, 1, IMAGES), maps(teacher, 2, IMAGES, teacher_size)
    student_maps, teacher_maps = ({"f": side["f"].to(dtype)} for side in sides)
    student_maps["f"].requires_grad_()
    return student_maps, teacher_maps, many_boxes()


def value_and_gradients(loss, arguments):
    (value,) = loss(*arguments).values()
    wanted = [arguments[0]["f"], *loss.parameters()]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def of_the_sides(loss, arguments, monkeypatch):
    """The same, of pairs that hold both sides."""
    with monkeypatch.context() as patch:
        patch.setattr(MapPair, "fits", lambda *_: False)
        assert type(loss.pairs(*arguments)[0]) is Pair
        return value_and_gradients(loss, arguments)


def assert_close(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs):
        scale = float(other.abs().max())
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("normalize_by", NORMALIZERS)
@pytest.mark.parametrize("student_q", sorted(QUANTIZERS))
@pytest.mark.parametrize("teacher_q", sorted(QUANTIZERS))
def test_equals_the_loss_of_the_sides_for_all_quantizers(student_q, teacher_q, normalize_by, monkeypatch):
    quantizers = {"student_quantizer": QUANTIZERS[student_q], "teacher_quantizer": QUANTIZERS[teacher_q]}
    loss = make_loss(normalize_by=normalize_by, **quantizers).double()
    ours = value_and_gradients(loss, inputs())
    assert float(ours[0]) > 0.0 and all(each.abs().sum() > 0.0 for each in ours[1:])
    assert_close(ours, of_the_sides(loss, inputs(), monkeypatch))


@pytest.mark.parametrize("part", [1, 2**9, 2**30])
@pytest.mark.parametrize("teacher_size", [6, 7])
@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("adapter", ["conv1x1", ""])
def test_equals_the_loss_of_the_sides_for_all_maps_and_parts(adapter, pooler_type, teacher_size, part, monkeypatch):
    quantizer = QUANTIZERS["bounded"]
    settings = {"pooler_type": pooler_type, "pooler_resolution": 3, "pooler_sampling_ratio": 0, "adapter": adapter}
    sides = {"student_quantizer": quantizer, "teacher_quantizer": quantizer}
    loss = make_loss(3, 3, **settings, **sides).double()
    monkeypatch.setattr(pair_module, "_PART", part)
    arguments = inputs(3, 3, teacher_size)
    assert type(loss.pairs(*arguments)[0]) is MapPair
    assert_close(value_and_gradients(loss, arguments), of_the_sides(loss, arguments, monkeypatch))


def test_single_precision(monkeypatch):
    loss = make_loss(student_quantizer=QUANTIZERS["uniform"], teacher_quantizer=QUANTIZERS["uniform"])
    arguments = inputs(dtype=torch.float32)
    ours = value_and_gradients(loss, arguments)
    assert {each.dtype for each in ours} == {torch.float32}
    assert_close(ours, of_the_sides(loss, arguments, monkeypatch))


def test_gradient_is_the_derivative_without_quantizers():
    loss = make_loss().double()
    student, teacher, boxes = inputs()
    assert torch.autograd.gradcheck(lambda x: loss({"f": x}, teacher, boxes)["loss_mimic"], student["f"])


def test_gradients_can_be_taken_more_than_once():
    loss, arguments = make_loss(), inputs(dtype=torch.float32)
    value = loss(*arguments)["loss_mimic"]
    first, again = (torch.autograd.grad(value, arguments[0]["f"], retain_graph=True)[0] for _ in range(2))
    (3.0 * value).backward()
    assert torch.equal(first, again)
    torch.testing.assert_close(arguments[0]["f"].grad, 3.0 * first)


def test_a_frozen_map_still_trains_the_adapter():
    loss, (student, teacher, boxes) = make_loss(), inputs(dtype=torch.float32)
    student["f"].requires_grad_(False)
    loss(student, teacher, boxes)["loss_mimic"].backward()
    assert all(each.grad.abs().sum() > 0.0 for each in loss.parameters())
    with torch.no_grad():
        assert not loss(student, teacher, boxes)["loss_mimic"].requires_grad


def test_a_quantizer_with_a_gradient_of_its_own_keeps_it():
    class Doubled(UniformQuantizer):
        def forward(self, x):
            return super().forward(x) + 2.0 * (x - x.detach())

    arguments = inputs(dtype=torch.float32)
    gradients = []
    for kind in (UniformQuantizer, Doubled):
        loss = make_loss(student_quantizer=kind(0.5, signed=True))  # its own gradient is 1, the other's 3
        gradients.append(torch.autograd.grad(loss(*arguments)["loss_mimic"], arguments[0]["f"])[0])
    torch.testing.assert_close(gradients[1], 3.0 * gradients[0])


def test_sides_are_pooled_when_they_are_read():
    quantizer = QUANTIZERS["uniform"]
    loss = make_loss(student_quantizer=quantizer, code_quantizer=quantizer)
    arguments = inputs(dtype=torch.float32)
    (pair,) = loss.pairs(*arguments)
    loss.loss([pair])
    assert not {"student", "teacher"} & set(vars(pair)), "the loss needs none of them"
    with torch.no_grad():
        assert pair.student.requires_grad and not pair.teacher.requires_grad
    num_rois = 20 * (IMAGES - 1)
    assert pair.student.shape == pair.teacher.shape == (num_rois, 3, 2, 2) and pair.num_regions == num_rois
    assert pair.student.is_contiguous() and pair.teacher.is_contiguous()
    with EventStorage():
        assert torch.equal(measured(loss, *arguments)["loss_mimic"], loss(*arguments)["loss_mimic"])


def test_another_loss_reads_the_sides():
    loss = make_loss(distance=lambda pair: (pair.student - pair.teacher).abs().sum() / pair.num_regions)
    arguments = inputs(dtype=torch.float32)
    (pair,) = loss.pairs(*arguments)
    expected = (pair.student - pair.teacher).abs().sum() / pair.num_regions
    assert isinstance(pair, MapPair)
    value = loss(*arguments)["loss_mimic"]
    torch.testing.assert_close(value, expected)
    assert torch.autograd.grad(value, arguments[0]["f"])[0].abs().sum() > 0.0


def few_boxes():
    return [Boxes(torch.tensor([[0.0, 0.0, 20.0, 20.0]])) for _ in range(IMAGES)]


@pytest.mark.parametrize(
    "settings, boxes, dtype, hooks",
    [
        ({}, few_boxes, torch.float32, False),  # the adapter is cheaper on these bins than on the map
        ({"adapter": "conv1x1_relu"}, many_boxes, torch.float32, False),
        ({"pooler_type": "ROIPool"}, many_boxes, torch.float32, False),
        ({}, many_boxes, torch.float32, True),
        ({}, many_boxes, torch.float16, False),
    ],
)
def test_pairs_that_hold_their_sides(settings, boxes, dtype, hooks):
    loss = make_loss(**settings).to(dtype)
    if hooks:
        loss.adapters["f"].register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    student, teacher, _ = inputs(dtype=dtype)
    (pair,) = loss.pairs(student, teacher, boxes())
    assert type(pair) is Pair and pair.student.dtype == dtype


def test_autocast_keeps_the_sides():
    with torch.autocast("cpu", torch.bfloat16):
        (pair,) = make_loss().pairs(*inputs(dtype=torch.float32))
    assert type(pair) is Pair


def test_sum_of_squares_is_exact_where_one_long_sum_is_not():
    x = torch.randn(500, 8, 7, 7).mul_(2.0).round_().mul_(0.3)
    exact = x.double().square().sum().item()
    assert sum_of_squares(x).item() == pytest.approx(exact, rel=1e-6)
