"""The RoI mimic loss against the equation written out in loops: values, gradients and limits."""

import itertools

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from mimic_losses import (
    QUANTIZERS,
    constant_maps,
    make_loss,
    maps,
    measured,
    no_boxes,
    pooled_by_detectron2,
    set_adapter,
    three_boxes,
)

from qmimic_d2.modeling.mimic.loss import NORMALIZERS
from qmimic_d2.modeling.quantizer import UniformQuantizer

# The codes of the same quantizers, written down.
DICTIONARIES = {
    "uniform": [0.5 * k for k in range(40)],
    "bounded": [0.0, 0.5, 1.0],
    "signed": [0.5 * k for k in range(-40, 41)],
    "power_of_two": [0.0, *(0.25 * 2**k for k in range(10))],
}


def nearest_code(value, name):
    """The equation's Q: the nearest code, the lower one (in a mirrored dictionary: towards 0) of two."""
    if name == "none":
        return value
    if name == "clamp":
        return max(value, 0.0)
    return min(DICTIONARIES[name], key=lambda code: (abs(value - code), abs(code)))


def loss_by_loops(student, teacher, adapter, student_q, teacher_q, normalize_by):
    """L_m of pooled features (M, C, P, P) and (M, T, P, P), entry by entry."""
    student, teacher = student.tolist(), teacher.tolist()
    weight, bias, has_relu = adapter
    squares = energy = 0.0
    size = range(len(teacher[0][0]))
    for f_s, f_t in zip(student, teacher):
        for t in range(len(f_t)):
            for y, x in itertools.product(size, size):
                r = bias[t] + sum(weight[t][c] * f_s[c][y][x] for c in range(len(f_s)))
                r = max(r, 0.0) if has_relu else r
                target = nearest_code(f_t[t][y][x], teacher_q)
                squares += (target - nearest_code(r, student_q)) ** 2
                energy += target**2
    regions = len(teacher)
    elements = len(teacher[0]) * len(size) ** 2
    divisor = {"roi": 2 * regions, "element": 2 * regions * elements, "target": 2 * energy}
    return squares / divisor[normalize_by]


# ------------------------------------------------------------------------------ the loss by the equation


@pytest.mark.parametrize("normalize_by", NORMALIZERS)
@pytest.mark.parametrize("student_q", sorted(QUANTIZERS))
@pytest.mark.parametrize("teacher_q", sorted(QUANTIZERS))
def test_loss_is_the_equation_for_every_pair_of_quantizers(student_q, teacher_q, normalize_by):
    loss = make_loss(
        normalize_by=normalize_by,
        student_quantizer=QUANTIZERS[student_q],
        teacher_quantizer=QUANTIZERS[teacher_q],
    )
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    adapter = (loss.adapters["f"].weight[:, :, 0, 0].tolist(), loss.adapters["f"].bias.tolist(), False)
    expected = loss_by_loops(
        pooled_by_detectron2(student["f"], boxes),
        pooled_by_detectron2(teacher["f"], boxes),
        adapter,
        student_q,
        teacher_q,
        normalize_by,
    )
    losses = loss(student, teacher, boxes)
    assert list(losses) == ["loss_mimic"]
    assert losses["loss_mimic"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("adapter", ["conv1x1", "conv1x1_relu"])
@pytest.mark.parametrize("quantizer", ["none", "uniform"])
def test_loss_is_the_equation_for_every_pooler_and_adapter(pooler_type, adapter, quantizer):
    loss = make_loss(
        pooler_type=pooler_type,
        adapter=adapter,
        student_quantizer=QUANTIZERS[quantizer],
        teacher_quantizer=QUANTIZERS[quantizer],
    )
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    has_relu = adapter == "conv1x1_relu"
    convolution = loss.adapters["f"][0] if has_relu else loss.adapters["f"]
    expected = loss_by_loops(
        pooled_by_detectron2(student["f"], boxes, pooler_type),
        pooled_by_detectron2(teacher["f"], boxes, pooler_type),
        (convolution.weight[:, :, 0, 0].tolist(), convolution.bias.tolist(), has_relu),
        quantizer,
        quantizer,
        "roi",
    )
    assert loss(student, teacher, boxes)["loss_mimic"].item() == pytest.approx(expected, rel=1e-4)


def test_without_an_adapter_the_maps_are_compared_as_they_are():
    loss = make_loss(student=3, adapter="")
    student, teacher, boxes = maps(3, seed=1), maps(3, seed=2), three_boxes()
    identity = (torch.eye(3).tolist(), [0.0] * 3, False)
    expected = loss_by_loops(
        pooled_by_detectron2(student["f"], boxes),
        pooled_by_detectron2(teacher["f"], boxes),
        identity,
        "none",
        "none",
        "roi",
    )
    assert list(loss.parameters()) == []
    assert loss(student, teacher, boxes)["loss_mimic"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "normalize_by, expected",
    [
        # 3 regions of 2 x 2 bins and 1 channel: Q(5.4) = 5 and Q(1.5 * 2 + 0.25) = 3, so 12 entries differ by 2
        ("roi", 12 * 4 / (2 * 3)),
        ("element", 12 * 4 / (2 * 3 * 4)),
        ("target", 12 * 4 / (2 * 12 * 25)),
    ],
)
def test_loss_of_constant_maps_by_hand(normalize_by, expected):
    quantizer = UniformQuantizer(1.0)
    loss = make_loss(
        1, 1, normalize_by=normalize_by, student_quantizer=quantizer, teacher_quantizer=quantizer
    )
    set_adapter(loss, 1.5, 0.25)
    boxes = [Boxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]] * 2)), Boxes(torch.tensor([[8.0, 8.0, 16.0, 24.0]]))]
    losses = loss(constant_maps(2.0), constant_maps(5.4), boxes)
    assert losses["loss_mimic"].item() == pytest.approx(expected)


def test_adapting_after_pooling_equals_adapting_before_it():
    loss = make_loss()
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    plain = make_loss(student=3, adapter="")
    with torch.no_grad():
        adapted = {"f": loss.adapters["f"](student["f"])}
    torch.testing.assert_close(
        loss(student, teacher, boxes)["loss_mimic"], plain(adapted, teacher, boxes)["loss_mimic"]
    )


def test_max_pooled_codes_are_not_quantized_away():
    quantizer = UniformQuantizer(0.5)
    codes = {"f": quantizer.quantize(maps(3, seed=2)["f"])}
    student, boxes = maps(2, seed=1), three_boxes()
    again = make_loss(pooler_type="ROIPool", teacher_quantizer=quantizer)(student, codes, boxes)
    once = make_loss(pooler_type="ROIPool")(student, codes, boxes)
    assert torch.equal(again["loss_mimic"], once["loss_mimic"])


def test_aligned_codes_are_put_back_on_the_dictionary():
    quantizer = UniformQuantizer(0.5)
    codes, boxes = {"f": quantizer.quantize(maps(3, seed=2)["f"])}, three_boxes()
    pooled = pooled_by_detectron2(codes["f"], boxes)
    assert not torch.allclose(pooled, quantizer.quantize(pooled))
    loss = make_loss(teacher_quantizer=quantizer)
    set_adapter(loss, 0.0, 0.0)  # so that the loss is the teacher's energy
    value = loss(maps(2, seed=1), codes, boxes)["loss_mimic"].item()
    assert value == pytest.approx(quantizer.quantize(pooled).square().sum().item() / (2 * 3), rel=1e-5)


# --------------------------------------------------------------------------------------------- gradients


def test_gradients_by_hand_straight_through():
    # r(f_s) = [-0.5, 0.8, 3.4] with codes [0, 1, 3] and teacher codes [2, 2, 2]; one region of 1 bin
    quantizer = UniformQuantizer(1.0)
    loss = make_loss(
        1, 3, pooler_resolution=1, student_quantizer=quantizer, teacher_quantizer=quantizer
    )
    loss.adapters["f"].weight.data[:, 0, 0, 0] = torch.tensor([-0.25, 0.4, 1.7])
    loss.adapters["f"].bias.data.zero_()
    student = constant_maps(2.0, images=1)
    student["f"].requires_grad_(True)
    boxes = [Boxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]]))]
    loss(student, constant_maps(2.2, channels=3, images=1), boxes)["loss_mimic"].backward()
    # d L / d r = (Q(r) - Q(t)) / M where r > 0, else 0
    by_adapted = torch.tensor([0.0, -1.0, 1.0])
    torch.testing.assert_close(loss.adapters["f"].bias.grad, by_adapted)
    torch.testing.assert_close(loss.adapters["f"].weight.grad[:, 0, 0, 0], 2.0 * by_adapted)
    expected = (by_adapted * torch.tensor([-0.25, 0.4, 1.7])).sum()
    torch.testing.assert_close(student["f"].grad.sum(), expected)


def test_gradient_of_the_plain_mimic_is_numerically_right():
    loss = make_loss(normalize_by="element", pooler_resolution=1)
    student = maps(2, seed=1, images=1, size=3)["f"].requires_grad_(True)
    teacher = maps(3, seed=2, images=1, size=3)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 24.0, 20.0]]))]
    loss({"f": student}, teacher, boxes)["loss_mimic"].backward()
    step = 1e-2
    for index in [(0, 0, 1, 1), (0, 1, 2, 0)]:
        values = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[index] += sign * step
            values.append(loss({"f": moved}, teacher, boxes)["loss_mimic"].item())
        assert student.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("adapter", ["conv1x1", "conv1x1_relu"])
@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_gradients_reach_student_and_adapter_and_never_the_teacher(adapter, quantizer):
    loss = make_loss(
        adapter=adapter,
        student_quantizer=QUANTIZERS[quantizer],
        teacher_quantizer=QUANTIZERS[quantizer],
    )
    student, teacher = maps(2, seed=1), maps(3, seed=2)
    student["f"].requires_grad_(True)
    teacher["f"].requires_grad_(True)
    loss(student, teacher, three_boxes())["loss_mimic"].backward()
    assert teacher["f"].grad is None
    for tensor in (student["f"], *loss.parameters()):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_teacher_maps_may_be_inference_tensors():
    loss = make_loss(student_quantizer=UniformQuantizer(0.5), teacher_quantizer=UniformQuantizer(0.5))
    student = maps(2, seed=1)
    student["f"].requires_grad_(True)
    with torch.inference_mode():
        teacher = maps(3, seed=2)
    loss(student, teacher, three_boxes())["loss_mimic"].backward()
    assert student["f"].grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("normalize_by", NORMALIZERS)
def test_without_regions_the_loss_is_a_zero_that_reaches_every_parameter(normalize_by):
    loss = make_loss(normalize_by=normalize_by, student_quantizer=UniformQuantizer(0.5))
    student = maps(2, seed=1)
    student["f"].requires_grad_(True)
    value = measured(loss, student, maps(3, seed=2), no_boxes())["loss_mimic"]
    assert value.shape == () and value.item() == 0.0
    value.backward()
    for tensor in (student["f"], *loss.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_an_image_without_regions_adds_nothing():
    loss = make_loss()
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    boxes[1] = Boxes(torch.zeros(0, 4))
    alone = loss({"f": student["f"][:1]}, {"f": teacher["f"][:1]}, boxes[:1])
    torch.testing.assert_close(loss(student, teacher, boxes), alone)


@pytest.mark.parametrize("normalize_by", NORMALIZERS)
def test_silent_maps_give_zero(normalize_by):
    quantizer = UniformQuantizer(0.5)
    loss = make_loss(normalize_by=normalize_by, student_quantizer=quantizer, teacher_quantizer=quantizer)
    set_adapter(loss, 1.0, 0.0)
    student, teacher = constant_maps(0.0, channels=2), constant_maps(0.0, channels=3)
    student["f"].requires_grad_(True)
    value = loss(student, teacher, three_boxes())["loss_mimic"]
    value.backward()
    assert value.item() == 0.0
    assert all(torch.isfinite(each.grad).all() for each in (student["f"], *loss.parameters()))


def test_relative_to_a_silent_teacher_there_is_no_loss():
    loss = make_loss(normalize_by="target", teacher_quantizer=UniformQuantizer(0.5))
    student = maps(2, seed=1)
    student["f"].requires_grad_(True)
    value = loss(student, constant_maps(0.2, channels=3), three_boxes())["loss_mimic"]
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(student["f"].grad, torch.zeros_like(student["f"]))


def test_relative_loss_does_not_depend_on_the_scale():
    loss = make_loss(student=3, adapter="", normalize_by="target")
    student, teacher, boxes = maps(3, seed=1), maps(3, seed=2), three_boxes()
    small = loss(student, teacher, boxes)["loss_mimic"]
    large = loss({"f": 100 * student["f"]}, {"f": 100 * teacher["f"]}, boxes)["loss_mimic"]
    torch.testing.assert_close(small, large)


def test_large_16_bit_features_do_not_overflow():
    loss = make_loss(student=3, adapter="")
    student, teacher = constant_maps(-300.0, channels=3), constant_maps(300.0, channels=3)
    boxes = [Boxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]])), Boxes(torch.zeros(0, 4))]
    half = {name: each.half() for name, each in student.items()}
    value = loss(half, teacher, boxes)["loss_mimic"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(12 * 600.0**2 / 2, rel=1e-5)  # beyond the 65504 of float16


def test_autocast():
    quantizer = UniformQuantizer(0.5)
    loss = make_loss(student_quantizer=quantizer, teacher_quantizer=quantizer, code_quantizer=quantizer)
    student, teacher, boxes = maps(2, seed=1), maps(3, seed=2), three_boxes()
    student["f"].requires_grad_(True)
    with EventStorage() as storage, torch.autocast("cpu", torch.bfloat16):
        value = measured(loss, student, teacher, boxes)["loss_mimic"]
        empty = loss(student, teacher, no_boxes())["loss_mimic"]
    (value + empty).backward()
    assert value.dtype == torch.float32
    full = loss(student, teacher, boxes)["loss_mimic"].item()
    assert value.item() == pytest.approx(full, rel=0.1)
    assert all(torch.isfinite(each.grad).all() for each in (student["f"], *loss.parameters()))
    assert 0.0 <= storage.latest()["qmimic/match_ratio"][0] <= 1.0


def test_zeros_reach_every_parameter():
    loss = make_loss(adapter="conv1x1_relu")
    student = maps(2, seed=1)
    student["f"].requires_grad_(True)
    losses = loss.zeros(student)
    assert {name: each.item() for name, each in losses.items()} == {"loss_mimic": 0.0}
    losses["loss_mimic"].backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in (student["f"], *loss.parameters()))


def test_no_gradient_mode_builds_no_graph():
    with torch.no_grad():
        value = make_loss()(maps(2, seed=1), maps(3, seed=2), three_boxes())["loss_mimic"]
    assert not value.requires_grad and value.item() > 0.0
