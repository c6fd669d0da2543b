"""The RoI mimic loss against the equation written out in loops, and what it compares of both sides."""

import itertools
import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import tiny_cfg
from torch import nn

from qmimic_d2.diagnostics.feature_comparison import FIGURES, compare_features
from qmimic_d2.modeling.mimic.adapter import ADAPTERS
from qmimic_d2.modeling.mimic.loss import NORMALIZERS, RoIMimicLoss
from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer

# Shape letters: N images, M regions, C and T channels, P bins.

QUANTIZERS = {
    "none": None,
    "uniform": UniformQuantizer(0.5),
    "bounded": UniformQuantizer(0.5, num_codes=3),
    "signed": UniformQuantizer(0.5, signed=True),
    "power_of_two": PowerOfTwoQuantizer(0.25),
    "clamp": ClampQuantizer(0.5),
}

# The codes of the same quantizers, written down.
DICTIONARIES = {
    "uniform": [0.5 * k for k in range(40)],
    "bounded": [0.0, 0.5, 1.0],
    "signed": [0.5 * k for k in range(-40, 41)],
    "power_of_two": [0.0, *(0.25 * 2**k for k in range(10))],
}


def spec(channels, stride=8):
    return ShapeSpec(channels=channels, stride=stride)


def measured_pairs(loss, pairs):
    loss.write_diagnostics(pairs)
    return loss.loss(pairs)


def measured(loss, *arguments):
    return measured_pairs(loss, loss.pairs(*arguments))


def compute(loss, *arguments):
    return loss(*arguments)


def whole_maps(loss, *arguments):
    return loss.loss(loss.whole_map_pairs(*arguments))


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def make_loss(student=2, teacher=3, **arguments):
    """A loss over one map "f" of stride 8, 2 x 2 bins, its adapter drawn from a fixed seed."""
    torch.manual_seed(0)
    arguments = {"pooler_resolution": 2, "pooler_sampling_ratio": 2, **arguments}
    loss = RoIMimicLoss(
        student_shapes={"f": spec(student)}, teacher_shapes={"f": spec(teacher)}, **arguments
    )
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.7)
    return loss


def maps(channels, seed, images=2, size=6, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return {"f": torch.randn(images, channels, size, size, generator=generator) * scale}


def three_boxes():
    return [
        Boxes(torch.tensor([[4.0, 4.0, 30.0, 20.0], [10.0, 0.0, 44.0, 44.0]])),
        Boxes(torch.tensor([[0.0, 8.0, 16.0, 40.0]])),
    ]


def no_boxes():
    return [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))]


def constant_maps(value, channels=1, images=2, size=6):
    return {"f": torch.full((images, channels, size, size), value)}


def set_adapter(loss, weight, bias, name="f"):
    nn.init.constant_(loss.adapters[name].weight, weight)
    nn.init.constant_(loss.adapters[name].bias, bias)


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


def pooled_by_detectron2(feature, boxes, pooler_type="ROIAlignV2"):
    pooler = ROIPooler(output_size=2, scales=[1 / 8], sampling_ratio=2, pooler_type=pooler_type)
    return pooler([feature], boxes)


# ------------------------------------------------------------------------- the loss by the equation


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


# --------------------------------------------------------------------------------------- gradients


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


# ---------------------------------------------------------------------------------------- the limits


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


# ------------------------------------------------------------------------------------ several levels

LEVELS = ("p3", "p4", "p5")


def make_level_loss(**arguments):
    torch.manual_seed(0)
    shapes = {name: spec(2, 2 ** int(name[1])) for name in LEVELS}
    teacher_shapes = {f"teacher_{name}": spec(1, 2 ** int(name[1])) for name in LEVELS}
    arguments = {"pooler_resolution": 2, "pooler_sampling_ratio": 2, **arguments}
    loss = RoIMimicLoss(student_shapes=shapes, teacher_shapes=teacher_shapes, **arguments)
    for name in LEVELS:
        set_adapter(loss, 0.5, 0.0, name)
    return loss


def level_maps(values, channels, prefix=""):
    return {
        f"{prefix}{name}": torch.full((1, channels, 1024 // 2 ** int(name[1]), 1024 // 2 ** int(name[1])), value)
        for name, value in zip(LEVELS, values)
    }


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


# ------------------------------------------------------------------------- pooled elsewhere, storage


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


# -------------------------------------------------------------------------- construction and config


def test_state_dict_holds_the_adapters_alone():
    loss = make_loss(student_quantizer=UniformQuantizer(1.0), code_quantizer=UniformQuantizer(1.0))
    assert sorted(loss.state_dict()) == ["adapters.f.bias", "adapters.f.weight"]


def from_config(*options, **shapes) -> RoIMimicLoss:
    cfg: CfgNode = tiny_cfg(*options)
    return RoIMimicLoss(cfg, shapes.get("student", {"f": spec(2)}), shapes.get("teacher", {"f": spec(3)}))


QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
MIMIC = "MODEL.QMIMIC.MIMIC"


@pytest.mark.parametrize("of_student", [False, True])
@pytest.mark.parametrize("of_teacher", [False, True])
@pytest.mark.parametrize("name", ["", "Clamp", "Uniform", "PowerOfTwo"])
def test_the_config_puts_quantizers_where_it_says(name, of_teacher, of_student):
    loss = from_config(
        *(f"{QUANTIZER}.NAME", name),
        *(f"{MIMIC}.QUANTIZE_STUDENT", of_student),
        *(f"{MIMIC}.QUANTIZE_TEACHER", of_teacher),
    )
    assert (loss.student_quantizer is not None) == (bool(name) and of_student)
    assert (loss.teacher_quantizer is not None) == (bool(name) and of_teacher)
    for quantizer in (loss.student_quantizer, loss.teacher_quantizer):
        assert quantizer is None or type(quantizer).__name__ == f"{name}Quantizer"
    expected = PowerOfTwoQuantizer if name == "PowerOfTwo" else UniformQuantizer
    assert type(loss.code_quantizer) is expected
    assert loss.code_quantizer.stride == 0.25


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_config_sets_every_option(adapter):
    loss = from_config(
        *(f"{MIMIC}.ADAPTER", adapter),
        *(f"{MIMIC}.NORMALIZE_BY", "element"),
        *(f"{MIMIC}.POOLER_TYPE", "ROIAlign"),
        *(f"{MIMIC}.POOLER_RESOLUTION", 5),
        *(f"{MIMIC}.POOLER_SAMPLING_RATIO", 3),
        teacher={"f": spec(2)},
    )
    assert loss.normalize_by == "element"
    pooler = loss.pooler
    assert (pooler.pooler_type, pooler.resolution, pooler.sampling_ratio) == ("ROIAlign", 5, 3)
    kinds = {"": nn.Identity, "conv1x1": nn.Conv2d, "conv1x1_relu": nn.Sequential}
    assert type(loss.adapters["f"]) is kinds[adapter]


def test_teacher_strides_may_be_fractions_that_match():
    loss = from_config(student={"f": spec(2, stride=8)}, teacher={"g": spec(3, stride=8.0)})
    assert (loss.student_features, loss.teacher_features) == (["f"], ["g"])


@pytest.mark.parametrize(
    "options, words",
    [
        ((f"{MIMIC}.ADAPTER", "conv3x3"), [f"{MIMIC}.ADAPTER", "'conv3x3'", "conv1x1_relu"]),
        ((f"{MIMIC}.NORMALIZE_BY", "rois"), [f"{MIMIC}.NORMALIZE_BY", "'rois'", "'element'"]),
        ((f"{MIMIC}.POOLER_TYPE", "Bilinear"), [f"{MIMIC}.POOLER_TYPE", "'Bilinear'", "ROIPool"]),
        ((f"{MIMIC}.POOLER_RESOLUTION", 0), [f"{MIMIC}.POOLER_RESOLUTION", "0", "1 or more"]),
        ((f"{MIMIC}.POOLER_SAMPLING_RATIO", -1), [f"{MIMIC}.POOLER_SAMPLING_RATIO", "-1", "or more"]),
    ],
)
def test_unknown_options_name_key_value_and_fix(options, words):
    with pytest.raises(ValueError) as caught:
        from_config(*options)
    assert all(word in str(caught.value) for word in words)


def test_a_stride_that_differs_names_maps_strides_and_fix():
    with pytest.raises(ValueError) as caught:
        from_config(student={"conv5": spec(2, 8)}, teacher={"res4": spec(3, 16.0)})
    for word in ("'conv5'", "8", "'res4'", "16", "MODEL.QMIMIC.TEACHER.INPUT_SCALE"):
        assert word in str(caught.value)


def test_channels_that_differ_without_an_adapter_name_maps_counts_and_fix():
    with pytest.raises(ValueError) as caught:
        from_config(f"{MIMIC}.ADAPTER", "", student={"conv5": spec(2)}, teacher={"res4": spec(3)})
    for word in ("'conv5'", "2 channels", "'res4'", "has 3", f"{MIMIC}.ADAPTER", "'conv1x1'"):
        assert word in str(caught.value)


@pytest.mark.parametrize("teacher", [{}, {"p3": spec(3, 8)}])
def test_numbers_of_maps_that_differ_name_both_lists(teacher):
    student = {"p3": spec(2, 8), "p4": spec(2, 16)}
    with pytest.raises(ValueError) as caught:
        from_config(student=student, teacher=teacher)
    for word in (f"{MIMIC}.IN_FEATURES", "TEACHER_IN_FEATURES", "2 student maps", str(list(teacher))):
        assert word in str(caught.value)


def test_no_maps_at_all_is_an_error():
    with pytest.raises(ValueError, match="0 student maps"):
        from_config(student={}, teacher={})


def test_levels_whose_strides_do_not_double_are_refused():
    shapes = {"p3": spec(2, 8), "p5": spec(2, 32)}
    with pytest.raises(ValueError, match="double from"):
        from_config(student=shapes, teacher=shapes)


# ------------------------------------------------------------------------------------------- whole maps


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
