"""Numbers that would fill a model and make nothing of it: other kinds of number, NaN and infinite values."""

import pytest
import torch
from module_state import assert_same, randomized, snapshot
from torch import nn

from qmimic_d2.checkpoint import DivergedError, SafeCheckpointer, load_audited

NAN, INF = float("nan"), float("inf")


class Detector(nn.Module):
    """A convolution with a norm, and a mask of zeros and minus infinity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("mask", torch.tensor([0.0, -INF]))
        self.register_buffer("index", torch.tensor([0, 1]))


def detector(seed=0):
    model = randomized(Detector(), seed)
    model.mask.copy_(torch.tensor([0.0, -INF]))
    return model


def state_with(name, value):
    return {**detector().state_dict(), name: value}


def loaders(folder):
    """The ways into a model: a teacher's, initial weights, an evaluation, a resumed training."""

    def teacher(model, state):
        load_audited(model, state, prefix="", source="model.pth", key="THE.KEY")

    def saved(model, state):
        torch.save({"model": state}, folder / "model.pth")
        (folder / "last_checkpoint").write_text("model.pth")
        return SafeCheckpointer(model, str(folder))

    return {
        "teacher": teacher,
        "initial": lambda model, state: saved(model, state).load(str(folder / "model.pth"), key="THE.KEY"),
        "evaluation": lambda model, state: saved(model, state).load_for_evaluation(str(folder / "model.pth")),
        "resumed": lambda model, state: saved(model, state).resume_or_load("", resume=True),
    }


WAYS = sorted(loaders(None))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, value",
    [
        ("conv.weight", torch.ones(2, 1, 1, 1, dtype=torch.int8)),
        ("conv.weight", torch.ones(2, 1, 1, 1, dtype=torch.bool)),
        ("conv.weight", torch.ones(2, 1, 1, 1, dtype=torch.complex64)),
        ("conv.weight", torch.ones(2, 1, 1, 1).to(torch.float8_e4m3fn)),
        ("norm.running_var", torch.ones(2, dtype=torch.int64)),
        ("index", torch.ones(2)),
        ("norm.num_batches_tracked", torch.tensor(1j)),
    ],
)
def test_another_kind_of_number_is_refused(tmp_path, way, name, value):
    model = detector(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        loaders(tmp_path)[way](model, state_with(name, value))
    message = str(error.value)
    assert "model.pth" in message and "floating-point numbers, before they were quantized" in message
    needed = Detector().state_dict()[name].dtype
    line = f"{name}: {value.dtype} in the checkpoint, {needed} in the model"
    assert f"1 of another kind of number:\n    {line}" in message
    assert_same(model, before)


@pytest.mark.parametrize("way", WAYS)
def test_floating_dtypes_of_any_width_are_taken(tmp_path, way):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = detector(seed=1)
        loaders(tmp_path)[way](model, state_with("conv.weight", torch.full((2, 1, 1, 1), 0.5, dtype=dtype)))
        assert model.conv.weight.flatten().tolist() == [0.5, 0.5] and model.conv.weight.dtype == torch.float32
    for count in (torch.tensor(3, dtype=torch.int32), torch.tensor(3.0), torch.tensor(True)):
        loaders(tmp_path)[way](detector(), state_with("norm.num_batches_tracked", count))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, value",
    [
        ("conv.weight", torch.full((2, 1, 1, 1), NAN)),
        ("norm.running_var", torch.tensor([1.0, INF])),
        ("norm.bias", torch.tensor([1.0, 1e300], dtype=torch.float64)),  # infinite in the model's float32
        ("mask", torch.tensor([-INF, -INF])),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path, way, name, value):
    model = detector(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        loaders(tmp_path)[way](model, state_with(name, value))
    message = str(error.value)
    assert f"1 with NaN or infinite values:\n    {name}" in message
    assert "diverged: give an earlier checkpoint, or train again with a smaller SOLVER.BASE_LR" in message
    assert_same(model, before)


@pytest.mark.parametrize("way", WAYS)
def test_a_models_own_infinite_constant_is_no_divergence(tmp_path, way):
    model = detector(seed=1)
    loaders(tmp_path)[way](model, detector().state_dict())
    assert model.mask.tolist() == [0.0, -INF]
    SafeCheckpointer(model, str(tmp_path)).save("model_1")
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


# ---- saving, and the state of a training


def training(folder, seed=0):
    model = detector(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.norm(model.conv(torch.ones(2, 1, 1, 1))).sum().backward()
    optimizer.step()
    return model, optimizer, SafeCheckpointer(model, str(folder), optimizer=optimizer)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_diverged_training_is_never_tagged(tmp_path, part):
    model, optimizer, checkpointer = training(tmp_path)
    first = {"model": "conv.weight", "optimizer": "optimizer.state.0.momentum_buffer"}[part]
    broken = model.conv.weight if part == "model" else optimizer.state[model.conv.weight]["momentum_buffer"]
    whole = broken.detach().clone()
    with torch.no_grad():
        broken.fill_(INF)
    with pytest.raises(DivergedError) as error:
        checkpointer.save("model_0")
    assert f"1 of its tensors have NaN or infinite values, {first}. There is no earlier checkpoint" in str(error.value)
    assert list(tmp_path.iterdir()) == []

    with torch.no_grad():
        broken.copy_(whole)
    checkpointer.save("model_1")
    with torch.no_grad():
        broken.fill_(NAN)
    with pytest.raises(DivergedError) as error:
        checkpointer.save("model_2")
    message = str(error.value)
    assert "model_2.pth is not written: the training has diverged" in message
    assert f"The last finite checkpoint is {str(tmp_path / 'model_1.pth')!r}: go on with --resume and a" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    model, _, checkpointer = training(tmp_path, seed=1)
    checkpointer.resume_or_load("", resume=True)
    assert torch.isfinite(model.conv.weight).all()


def test_a_diverged_optimizer_is_not_resumed(tmp_path):
    model, optimizer, checkpointer = training(tmp_path)
    checkpointer.save("model_1")
    content = torch.load(tmp_path / "model_1.pth", weights_only=True)
    content["optimizer"]["state"][0]["momentum_buffer"][0] = NAN
    torch.save(content, tmp_path / "model_1.pth")
    model, _, checkpointer = training(tmp_path, seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="1 with NaN or infinite values:\n    optimizer.state.0.momentum_buffer"):
        checkpointer.resume_or_load("", resume=True)
    assert_same(model, before)
    checkpointer.load_for_evaluation(str(tmp_path / "model_1.pth"))  # which needs the model alone


@pytest.mark.parametrize("optimizer", [None, 3, "left out"])
def test_weights_alone_are_not_resumed(tmp_path, optimizer):
    model, _, checkpointer = training(tmp_path)
    content = {"model": model.state_dict(), "optimizer": optimizer}
    if optimizer == "left out":
        del content["optimizer"]
    torch.save(content, tmp_path / "model_1.pth")
    (tmp_path / "last_checkpoint").write_text("model_1.pth")
    with pytest.raises(ValueError, match="holds weights without the state of a training .optimizer.*without --resume"):
        checkpointer.resume_or_load("", resume=True)
    SafeCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe", b"../model_1.pth", b"/etc/passwd", b"model\x1b.pth", "folder"]
)
def test_a_damaged_tag_names_itself_and_what_could_stand_in_it(tmp_path, content):
    _, _, checkpointer = training(tmp_path)
    checkpointer.save("model_1")
    tag = tmp_path / "last_checkpoint"
    tag.unlink()
    if content == "folder":
        tag.mkdir()
    else:
        tag.write_bytes(content)
    with pytest.raises(ValueError) as error:
        checkpointer.resume_or_load("", resume=True)
    message = str(error.value)
    assert message.startswith(repr(str(tag))) and "Write one of ['model_1.pth'] into it" in message
    assert message.isprintable()
