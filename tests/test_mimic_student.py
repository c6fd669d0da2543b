"""Gradients that the student in training measures, and the weight that is balanced by them."""

import os

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import (
    RESNET_FPN,
    batch,
    randomize,
    run_two_processes,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)
from torch.nn.parallel import DistributedDataParallel

MIMIC = "MODEL.QMIMIC.MIMIC"
GRADIENT_PERIOD = "MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD"
BALANCED = (f"{MIMIC}.SCHEDULE", "balanced", f"{MIMIC}.BALANCE_PERIOD", 2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def student(teacher, *options, seed=1):
    return seeded_model(tiny_cfg(*teacher.options, *options, meta_architecture="QuantMimicRCNN"), seed)


def measured(step):
    return {name: value for name, (value, _) in step.storage.latest().items() if name.startswith("qmimic/grad")}


# --------------------------------------------------------------------------------------------- gradients


def test_the_shares_are_those_of_two_backward_passes(teacher):
    model = student(teacher, GRADIENT_PERIOD, 1, f"{MIMIC}.LOSS_WEIGHT", 3.0)
    step = training_step(model, batch())
    gradients = {}
    for name, keeps in (("mimic", lambda key: key == "loss_mimic"), ("detection", lambda key: key != "loss_mimic")):
        model.train()
        maps = []
        handle = model.backbone.register_forward_hook(lambda module, args, out: maps.append(out["conv5"]), prepend=True)
        torch.manual_seed(5)
        with EventStorage(0):
            losses = model(batch())
        handle.remove()
        maps[0].retain_grad()
        sum(loss for key, loss in losses.items() if keeps(key)).backward()
        rows = [parameter.grad.flatten() for parameter in model.backbone.parameters() if parameter.grad is not None]
        gradients[name] = {"map": maps[0].grad.flatten(), "backbone": torch.cat(rows)}
        model.zero_grad()
    found = measured(step)
    assert len(found) == 10
    for place in ("map", "backbone"):
        mimic, detection = gradients["mimic"][place].double(), gradients["detection"][place].double()
        assert mimic.norm() > 0.0 and detection.norm() > 0.0
        expected = {
            "norm_mimic": mimic.norm(),
            "norm_detection": detection.norm(),
            "ratio": mimic.norm() / detection.norm(),
            "share": mimic.norm() / (mimic.norm() + detection.norm()),
            "cosine": torch.nn.functional.cosine_similarity(mimic, detection, dim=0),
        }
        for name, value in expected.items():
            assert found[f"qmimic/grad_{name}_{place}"] == pytest.approx(value.item(), rel=1e-4), (place, name)


@pytest.mark.parametrize("options", [(), RESNET_FPN], ids=["one level", "several levels"])
def test_measuring_changes_no_loss_and_no_gradient(teacher, tmp_path, options):
    written = write_teacher(tmp_path, *options) if options else teacher
    steps = [training_step(student(written, *options, GRADIENT_PERIOD, period), batch()) for period in (0, 1)]
    assert not measured(steps[0]) and len(measured(steps[1])) == 10
    for name, loss in steps[0].losses.items():
        assert torch.equal(loss, steps[1].losses[name])
    assert list(steps[0].gradients) == list(steps[1].gradients)
    for name, gradient in steps[0].gradients.items():
        assert torch.equal(gradient, steps[1].gradients[name])


def test_gradients_are_measured_every_period(teacher):
    model = student(teacher, GRADIENT_PERIOD, 3)
    found = [bool(measured(training_step(model, batch(), iteration=iteration))) for iteration in range(7)]
    assert found == [True, False, False, True, False, False, True]


def test_without_a_weight_there_is_nothing_to_measure(teacher):
    step = training_step(student(teacher, GRADIENT_PERIOD, 1, f"{MIMIC}.LOSS_WEIGHT", 0.0), batch())
    assert not measured(step)
    assert step.storage.latest()["qmimic/weight"][0] == 0.0


def test_a_mimic_loss_of_another_order_is_warned_of_once(teacher, caplog):
    def warnings_of(*options, steps=2):
        caplog.clear()
        model = student(teacher, *options)
        for iteration in range(steps):
            training_step(model, batch(), iteration=iteration)
        return [each.message for each in caplog.records if "does not fit NORMALIZE_BY" in each.message]

    relative = (f"{MIMIC}.NORMALIZE_BY", "target", f"{MIMIC}.LOSS_WEIGHT")
    assert warnings_of(*relative, 20.0) == []
    (message,) = warnings_of(*relative, 20000.0)
    assert "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT" in message and "SCHEDULE 'balanced'" in message
    assert warnings_of(*relative, 0.0) == []
    assert warnings_of(*relative, 20000.0, *BALANCED) == []
    assert "NORMALIZE_BY 'target'" not in message.split("set ")[1]  # it is set already
    (message,) = warnings_of(f"{MIMIC}.LOSS_WEIGHT", 20000.0)
    assert "NORMALIZE_BY 'target'" in message and "SCHEDULE 'balanced'" in message
    # a warm-up hides the size of the first losses, and not what they are multiplied by in the end
    warmup = (f"{MIMIC}.SCHEDULE", "warmup", f"{MIMIC}.WARMUP_ITERS", 100000)
    (message,) = warnings_of(*relative, 20000.0, *warmup)
    assert "full weight of 2e+04" in message
    assert warnings_of(*relative, 20.0, *warmup) == []


@pytest.mark.slow
def test_without_a_region_the_mimic_has_no_share(teacher):
    source = (f"{MIMIC}.ROI_SOURCE", ["ground_truth"])
    step = training_step(student(teacher, GRADIENT_PERIOD, 1, *source), batch(num_boxes=(0, 0)))
    assert measured(step)["qmimic/grad_share_map"] == 0.0
    assert measured(step)["qmimic/grad_norm_detection_map"] > 0.0


# ---------------------------------------------------------------------------------------------- balanced


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_balanced_keeps_the_share_from_the_first_iteration_on(teacher, start):
    options = (*BALANCED, f"{MIMIC}.BALANCE_SHARE", 0.25, f"{MIMIC}.LOSS_WEIGHT", start, GRADIENT_PERIOD, 0)
    step = training_step(student(teacher, *options), batch())
    found = measured(step)
    assert found["qmimic/grad_share_map"] == pytest.approx(0.25, rel=1e-6)
    # balancing alone needs no gradient of the backbone's parameters
    assert "qmimic/grad_share_backbone" not in found
    # and the loss carries the weight that is written
    plain = training_step(student(teacher, f"{MIMIC}.LOSS_WEIGHT", 1.0), batch())
    weight = step.storage.latest()["qmimic/weight"][0]
    torch.testing.assert_close(step.losses["loss_mimic"], plain.losses["loss_mimic"] * weight)


def test_the_weight_rests_between_two_measurements(teacher):
    model = student(teacher, *BALANCED, GRADIENT_PERIOD, 0)
    steps = [training_step(model, batch(seed=iteration), iteration=iteration) for iteration in range(4)]
    weights = [step.storage.latest()["qmimic/weight"][0] for step in steps]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert [bool(measured(step)) for step in steps] == [True, False, True, False]


def test_a_resumed_student_goes_on_with_its_balance(teacher):
    first = student(teacher, *BALANCED)
    for iteration in range(3):
        training_step(first, batch(seed=iteration), iteration=iteration)
    second = student(teacher, *BALANCED, f"{MIMIC}.LOSS_WEIGHT", 7.0)
    second.load_state_dict(first.state_dict())
    steps = [training_step(model, batch(seed=9), iteration=4) for model in (first, second)]
    assert steps[0].storage.latest()["qmimic/weight"] == steps[1].storage.latest()["qmimic/weight"]
    assert torch.equal(steps[0].losses["loss_mimic"], steps[1].losses["loss_mimic"])


def test_only_a_balanced_student_saves_a_weight(teacher):
    own = set(student(teacher, *BALANCED).state_dict()) - set(student(teacher).state_dict())
    assert own == {"mimic.weight._extra_state"}


def balanced_worker(rank, folder, options):
    model = seeded_model(tiny_cfg(*options, meta_architecture="QuantMimicRCNN"))
    wrapped = DistributedDataParallel(model.train(), broadcast_buffers=False)
    step = training_step(wrapped, batch(seed=rank, num_boxes=(2 - rank,)))
    torch.save(step.storage.latest()["qmimic/weight"][0], os.path.join(folder, f"rank{rank}.pth"))


@pytest.mark.slow
@pytest.mark.ddp
def test_all_processes_balance_alike(teacher, tmp_path):
    options = [*teacher.options, *BALANCED]
    run_two_processes(balanced_worker, tmp_path, options)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    alone = training_step(student(teacher, *BALANCED), batch(seed=0, num_boxes=(2,)))
    assert first == second != alone.storage.latest()["qmimic/weight"][0]


# ------------------------------------------------------------------------------------ the teacher's heads

# Student and teacher of one width: heads of one shape.
ALIKE = ("MODEL.VGG.WIDTH_DIVISOR", 32)
INIT_HEADS = (f"{MIMIC}.INIT_HEADS_FROM_TEACHER", True)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("twin"), *ALIKE)


def heads_of(state):
    return {name: each for name, each in state.items() if name.startswith(("proposal_generator.", "roi_heads."))}


def teacher_heads(written):
    return heads_of(torch.load(written.weights)["model"])


def test_heads_begin_with_the_teachers_weights(twin):
    model = student(twin, *ALIKE, *INIT_HEADS)
    before = heads_of(model.state_dict())
    taken = teacher_heads(twin)
    assert before.keys() == taken.keys()
    assert any(not torch.equal(before[name], taken[name]) for name in before)
    model.train()
    for name, each in heads_of(model.state_dict()).items():
        assert torch.equal(each, taken[name]), name


def test_training_goes_on_from_there(twin):
    model = student(twin, *ALIKE, *INIT_HEADS).train()
    randomize(model.roi_heads)
    changed = {name: each.clone() for name, each in heads_of(model.state_dict()).items()}
    model.eval()
    model.train()
    assert all(torch.equal(each, changed[name]) for name, each in heads_of(model.state_dict()).items())


def test_weights_that_are_loaded_before_training_stay(twin):
    model, other = student(twin, *ALIKE, *INIT_HEADS), student(twin, *ALIKE, seed=2)
    model.load_state_dict(other.state_dict())
    model.train()
    for name, each in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], each), name


def test_heads_of_another_shape_are_refused(teacher):
    with pytest.raises(ValueError, match="proposal_generator") as error:
        student(teacher, *INIT_HEADS).train()
    assert "INIT_HEADS_FROM_TEACHER" in str(error.value)
