"""The prototypes of the search compute what their names say, and the oscillation benchmark what its columns say."""

import json

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

import oscillation
from evidence_lib import prototypes
from qmimic_d2.modeling import RoIMimicLoss, UniformQuantizer

X = torch.tensor([-0.3, 0.2, 0.4, 0.6, 0.9, 5.0])


def at(iteration, quantizer, x=X):
    with EventStorage(iteration):
        return quantizer(x).tolist()


def test_late_quantizer_clamps_first():
    quantizer = prototypes.LateUniformQuantizer(0.5, 4)
    assert at(399, quantizer) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.9, 1.5])
    assert at(400, quantizer) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.5]
    assert quantizer(X).tolist() == at(400, quantizer)  # outside of a training


def test_soft_quantizer_goes_from_clamp_to_codes():
    quantizer = prototypes.SoftUniformQuantizer(0.5, 4)
    assert at(0, quantizer) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.9, 1.5])
    assert at(200, quantizer) == pytest.approx([0.0, 0.1, 0.45, 0.55, 0.95, 1.5])
    assert at(400, quantizer) == at(800, quantizer) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.5]


def test_growing_quantizer_ends_at_the_configs_stride():
    quantizer = prototypes.GrowingUniformQuantizer(0.5, 4)
    assert at(300, quantizer) == UniformQuantizer(0.25, 7)(X).tolist()
    assert at(600, quantizer) == at(800, quantizer) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.5]
    # an unbounded one from a 16th on
    assert at(0, prototypes.GrowingUniformQuantizer(0.5)) == UniformQuantizer(0.5 / 16)(X).tolist()


def test_stride_per_channel_follows_the_teacher():
    quantizer = prototypes.ChannelUniformQuantizer(1.0)
    # root mean squares 1 and 7, 5 over all: strides 0.2 and 1.4
    teacher = torch.tensor([1.0, 7.0]).view(1, 2, 1, 1).expand(3, 2, 2, 2)
    assert quantizer.quantize(teacher)[0, :, 0, 0].tolist() == pytest.approx([1.0, 7.0])
    student = torch.tensor([0.45, 2.0]).view(1, 2, 1, 1).requires_grad_()
    quantized = quantizer(student)
    assert quantized.flatten().tolist() == pytest.approx([0.4, 1.4])
    quantized.sum().backward()
    assert student.grad.flatten().tolist() == [1.0, 1.0]
    # what the student shows changes no stride
    assert quantizer(student).flatten().tolist() == pytest.approx([0.4, 1.4])


SHAPE = {"map": ShapeSpec(channels=1, stride=1)}


def make_loss(kind=None, stride=1.0):
    quantizer = UniformQuantizer(stride)
    loss = RoIMimicLoss(
        student_shapes=SHAPE,
        teacher_shapes=SHAPE,
        pooler_type="ROIPool",
        pooler_resolution=2,
        student_quantizer=quantizer,
        teacher_quantizer=quantizer,
        code_quantizer=quantizer,
    )
    with torch.no_grad():
        loss.adapters["map"].weight.fill_(2.0)
        if loss.adapters["map"].bias is not None:
            loss.adapters["map"].bias.zero_()
    if kind is not None:
        kind.change(loss)
    return loss


def one_region(loss, student, teacher):
    """The loss of one region of four cells, and its gradient at the student's map."""
    student = torch.tensor(student).view(1, 1, 2, 2).requires_grad_()
    teacher = torch.tensor(teacher).view(1, 1, 2, 2)
    value = loss({"map": student}, {"map": teacher}, [Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))])["loss_mimic"]
    value.backward()
    return float(value.detach()), student.grad.flatten().tolist()


def test_gradient_where_codes_differ():
    loss = make_loss(prototypes.CodesDifferRCNN)
    # r = 0.4, 0.6, -3, 1.4 against 0.2, 0.2, 0, 2: codes 0/0, 1/0, 0/0, 1/2
    value, grad = one_region(loss, [0.2, 0.3, -1.5, 0.7], [0.2, 0.2, 0.0, 2.0])
    assert value == pytest.approx((0.4**2 + 0.6**2) / 2)
    assert grad == pytest.approx([0.0, 2 * 0.4, 0.0, -2 * 0.6])


def test_quantized_before_the_adapter():
    value, grad = one_region(make_loss(prototypes.BeforeAdapterRCNN), [0.4, 0.6, -1.0, 1.0], [0.0, 1.0, 0.0, 2.0])
    # Q(f_s) = 0, 1, 0, 1, then doubled
    assert value == pytest.approx((0 + 1 + 0 + 0) / 2)
    assert grad == pytest.approx([0.0, 2.0, 0.0, 0.0])


def test_quantized_before_pooling():
    student, teacher = torch.tensor([[[[0.2, 0.4], [0.3, 0.7]]]]), torch.tensor([[[[1.0, 1.0], [0.0, 2.0]]]])
    loss = make_loss(prototypes.BeforePoolingRCNN)
    found = loss({"map": student}, {"map": teacher}, [Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))])["loss_mimic"]
    # Q(r) = 0, 1, 1, 1 (of 0.4, 0.8, 0.6, 1.4), against 1, 1, 0, 2
    assert float(found) == pytest.approx((1 + 0 + 1 + 1) / 2)


def test_prototype_losses_measure_as_the_products_does():
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))]
    maps = {"map": torch.tensor([[[[0.2, 0.4], [0.3, 0.7]]]])}, {"map": torch.tensor([[[[1.0, 1.0], [0.0, 2.0]]]])}
    for kind in (prototypes.CodesDifferRCNN, prototypes.BeforeAdapterRCNN, prototypes.BeforePoolingRCNN):
        with EventStorage(0) as storage:
            loss = make_loss(kind)
            loss.write_diagnostics(loss.pairs(*maps, boxes))
            assert 0.0 <= storage.latest()["qmimic/match_ratio"][0] <= 1.0


def test_learned_stride_has_the_gradient_of_the_source():
    quantizer = prototypes._LearnedStride(0.5, 3)
    x = torch.tensor([-0.2, 0.3, 0.6, 2.0], requires_grad=True)
    quantized = quantizer(x)
    assert quantized.tolist() == pytest.approx([0.0, 0.5, 0.5, 1.5])
    quantized.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # by the stride: 0, round(x/s) - x/s inside, 3 at the top; times s for its logarithm
    assert float(quantizer.log_stride.grad) == pytest.approx(0.5 * ((1 - 0.6) + (1 - 1.2) + 3))


def test_low_bit_layers():
    weight = torch.tensor([[1.0, 0.4, -0.2], [0.3, 0.3, 0.0]])
    # three levels on either side, per row
    assert prototypes._LowBitWeight(3)(weight).flatten().tolist() == pytest.approx([1, 1 / 3, -1 / 3, 0.3, 0.3, 0.0])
    layer = nn.Linear(3, 1)
    hook = prototypes._LowBitInput(2)
    (codes,) = hook(layer, (torch.tensor([[0.0, 0.9, 3.0]]),))
    assert hook.top == pytest.approx(3.0, abs=0.01) and codes.flatten().tolist() == pytest.approx([0, 1, 3], abs=0.01)
    layer.eval()
    (codes,) = hook(layer, (torch.tensor([[-1.0, 1.6, 100.0]]),))
    assert codes.flatten().tolist() == pytest.approx([0, 2, 3], abs=0.01)  # the range stays


class FakeTrainer:
    max_iter, iter, model = 4, 0, None


def test_figures_of_the_oscillation(monkeypatch):
    states = iter([[0.2, 0.9, middle, 1.2, 0.0, -0.5] for middle in (0.45, 0.55, 0.45, 0.45)])
    monkeypatch.setattr(oscillation, "adapted_features", lambda model, batch: torch.tensor(next(states)))
    places = oscillation.RestingPlaces([], 3, UniformQuantizer(1.0))
    places.trainer = FakeTrainer()
    for places.trainer.iter in range(4):
        places.after_step()
    figures = places.figures()
    # of 0.2, 0.9 and 0.45 or 0.55, the last is near 1/2; 1.2 is beyond s, and a ReLU's 0 at rest
    assert figures["near the threshold, %"] == pytest.approx(100 / 3)
    # one of three, one of three, none of two (its code was 0 before and after)
    assert figures["codes that change in a step, %"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 0) / 3)
    assert figures["movement in a step, % of s"] == pytest.approx(100 * (0.1 / 3 + 0.1 / 3 + 0) / 3, rel=1e-4)
    assert len(figures["histogram"]) == oscillation.BINS and sum(figures["histogram"]) == pytest.approx(1.0)


def test_oscillation_looks_at_the_last_steps_only(monkeypatch):
    looked = []
    monkeypatch.setattr(oscillation, "adapted_features", lambda model, batch: looked.append(1) or torch.tensor([0.7]))
    places = oscillation.RestingPlaces([], 2, UniformQuantizer(1.0))
    places.trainer = FakeTrainer()
    for places.trainer.iter in range(4):
        places.after_step()
    assert len(looked) == 3  # two steps have three ends


def test_oscillation_table(monkeypatch, tmp_path, capsys):
    def measure(name, teacher, output, steps, opts):
        return {"setting": name, "near the threshold, %": 31.5, "histogram": [1.0], "AP": 50.0}

    monkeypatch.setattr(oscillation, "measure", measure)
    path = tmp_path / "oscillation.json"
    names = list(oscillation.SETTINGS)[:2]
    oscillation.main(["--teacher", "t.pth", "--json", str(path), "--only", *names])
    content = json.loads(path.read_text())
    assert [row["setting"] for row in content["rows"]] == names and content["versions"]["torch"] == torch.__version__
    assert "31.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        oscillation.main(["--teacher", "t.pth", "--steps", "1"])
