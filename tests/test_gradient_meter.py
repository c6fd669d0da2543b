"""Where gradients cannot be taken inside the forward pass: frozen maps, activation checkpoints, FSDP."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import (
    RESNET_C4,
    RESNET_FPN,
    batch,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

MIMIC = "MODEL.QMIMIC.MIMIC"
GRADIENT_PERIOD = "MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD"
RECOMMENDED = (f"{MIMIC}.SCHEDULE", "balanced", f"{MIMIC}.NORMALIZE_BY", "target")
# Two maps, of which res4 is computed from res3.
TWO_MAPS = (
    *(*RESNET_C4, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"]),
    *("MODEL.RESNETS.STAGE_STRIDES", [1, 1, 2, 1], f"{MIMIC}.IN_FEATURES", ["res3", "res4"]),
    *(f"{MIMIC}.ROI_SOURCE", ["whole_map"]),
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    options = {"vgg": (), "fpn": RESNET_FPN, "two maps": TWO_MAPS}
    return {name: (write_teacher(folder, *each, name=name), each) for name, each in options.items()}


def student(teachers, *options, kind="vgg"):
    teacher, base = teachers[kind]
    return seeded_model(tiny_cfg(*teacher.options, *base, *options, meta_architecture="QuantMimicRCNN"))


def run_in_checkpoint(module, use_reentrant=True):
    """Detectron2's own ``use_act_checkpoint`` does this to the blocks of a backbone."""
    forward = module.forward
    module.forward = lambda *args: checkpoint(forward, *args, use_reentrant=use_reentrant)


def figures(step):
    return {name: value for name, (value, _) in step.storage.latest().items() if name.startswith("qmimic/")}


def assert_same_training(first, second):
    assert first.losses == second.losses
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(second.gradients[name], gradient, msg=name)


# ------------------------------------------------------------------------------- activation checkpoints


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["conv4", "conv5"], ids=["below the map", "of the map"])
def test_the_recommended_settings_work_with_a_checkpointed_backbone(teachers, caplog, stage, autocast):
    steps = []
    for is_checkpointed in (False, True):
        model = student(teachers, *RECOMMENDED)
        if is_checkpointed:
            run_in_checkpoint(getattr(model.backbone, stage))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            steps.append(training_step(model, batch()))
    assert_same_training(*steps)
    plain, found = map(figures, steps)
    assert found["qmimic/grad_share_map"] == plain["qmimic/grad_share_map"] == pytest.approx(0.8)
    assert found["qmimic/weight"] == plain["qmimic/weight"]
    assert "qmimic/grad_share_backbone" in plain and "qmimic/grad_share_backbone" not in found
    assert "qmimic/grad_*_backbone" in caplog.text and "use_reentrant=False" in caplog.text


@pytest.mark.parametrize("kind, stages", [("fpn", ("res3", "res4", "res5")), ("two maps", ("res3", "res4"))])
def test_maps_between_checkpoints(teachers, kind, stages):
    steps = []
    for is_checkpointed in (False, True):
        model = student(teachers, *RECOMMENDED, kind=kind)
        network = getattr(model.backbone, "bottom_up", model.backbone)
        for name in stages if is_checkpointed else ():
            run_in_checkpoint(getattr(network, name))
        steps.append(training_step(model, batch()))
    plain, found = map(figures, steps)
    # of several maps a view's gradient is that of its readers, so that the balanced weights of both may differ
    assert found["qmimic/grad_share_map"] == pytest.approx(0.8)
    for name, loss in steps[0].losses.items():
        ratio = found["qmimic/weight"] / plain["qmimic/weight"] if name.startswith("loss_mimic") else 1.0
        torch.testing.assert_close(steps[1].losses[name], loss * ratio)
    assert set(steps[1].gradients) == set(steps[0].gradients)


def test_without_measurements_a_checkpoint_changes_nothing(teachers):
    options = (f"{MIMIC}.SCHEDULE", "constant", GRADIENT_PERIOD, 0)
    steps = []
    for is_checkpointed in (False, True):
        model = student(teachers, *options, kind="two maps")
        if is_checkpointed:
            run_in_checkpoint(model.backbone.res4)
        steps.append(training_step(model, batch()))
    assert_same_training(*steps)


def test_a_checkpoint_that_is_not_reentrant_is_measured_everywhere(teachers):
    model = student(teachers, *RECOMMENDED)
    for module in (model.backbone.conv4, model.roi_heads.box_head):
        run_in_checkpoint(module, use_reentrant=False)
    found, plain = (training_step(each, batch()) for each in (model, student(teachers, *RECOMMENDED)))
    assert_same_training(plain, found)
    assert figures(found)["qmimic/grad_share_backbone"] == figures(plain)["qmimic/grad_share_backbone"]


def test_checkpointed_heads_are_refused_with_a_balanced_weight(teachers):
    model = student(teachers, *RECOMMENDED)
    run_in_checkpoint(model.roi_heads.box_head)
    with pytest.raises(ValueError) as error:
        training_step(model, batch())
    for words in ("SCHEDULE is 'balanced'", "use_reentrant=False", "'warmup' or 'constant'"):
        assert words in str(error.value)


def test_checkpointed_heads_are_not_measured_with_another_weight(teachers, caplog):
    model = student(teachers, GRADIENT_PERIOD, 1)
    run_in_checkpoint(model.roi_heads.box_head)
    steps = [training_step(model, batch(), iteration=iteration) for iteration in range(3)]
    assert not any("grad" in name for step in steps for name in figures(step))
    said = [each.message for each in caplog.records if "GRADIENT_PERIOD" in each.message]
    assert len(said) == 2 and "qmimic/grad_*_map" in said[1]


# -------------------------------------------------------------------------------------------- frozen maps


def test_a_balanced_weight_of_a_frozen_map_is_refused(teachers):
    model = student(teachers, *RECOMMENDED, "MODEL.VGG.FREEZE_AT", 5)
    with pytest.raises(ValueError) as error:
        training_step(model, batch())
    for words in ("SCHEDULE is 'balanced'", "['conv5']", "MODEL.VGG.FREEZE_AT", f"{MIMIC}.IN_FEATURES"):
        assert words in str(error.value)


def test_a_frozen_map_is_no_place(teachers, caplog):
    model = student(teachers, GRADIENT_PERIOD, 1, "MODEL.VGG.FREEZE_AT", 5)
    found = [figures(training_step(model, batch(), iteration=iteration)) for iteration in range(2)]
    assert not any("grad" in name for each in found for name in each)
    assert [each.message for each in caplog.records].count(caplog.messages[0]) == 1
    assert "teaches the student nothing" in caplog.text and "MODEL.VGG.FREEZE_AT" in caplog.text


@pytest.mark.parametrize("freeze_at", [3, 2])
def test_the_other_maps_are_measured(teachers, caplog, freeze_at):
    model = student(teachers, *RECOMMENDED, "MODEL.BACKBONE.FREEZE_AT", freeze_at, kind="two maps")
    found = figures(training_step(model, batch()))
    assert found["qmimic/grad_share_map"] == pytest.approx(0.8)
    assert ("['res3'] require no gradient" in caplog.text) == (freeze_at == 3)


# ------------------------------------------------------------------- torch.compile, DDP and FSDP


@pytest.mark.slow
def test_a_compiled_backbone(teachers):
    model = student(teachers, *RECOMMENDED)
    model.backbone = torch.compile(model.backbone, backend="aot_eager")
    found, plain = (training_step(each, batch()) for each in (model, student(teachers, *RECOMMENDED)))
    for name, loss in plain.losses.items():
        torch.testing.assert_close(found.losses[name], loss)
    assert figures(found)["qmimic/grad_share_map"] == pytest.approx(0.8)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    path = tmp_path_factory.mktemp("group") / "rendezvous"
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("arguments", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_data_parallel_with_checkpoints(teachers, process_group, arguments):
    model = student(teachers, *RECOMMENDED)
    run_in_checkpoint(model.backbone.conv4, use_reentrant=False)
    found = training_step(DistributedDataParallel(model, **arguments), batch())
    plain = training_step(student(teachers, *RECOMMENDED), batch())
    assert found.losses == plain.losses
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(found.gradients[f"module.{name}"], gradient)


def sharded_step(model, mesh, *names):
    for name in names:
        fully_shard(model.get_submodule(name) if name else model, mesh=mesh)
    model.train()
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        losses = model(batch())
    sum(losses.values()).backward()
    return losses, storage.latest()


def test_a_model_that_is_sharded_as_a_whole_is_measured(teachers, process_group):
    losses, found = sharded_step(student(teachers, *RECOMMENDED), process_group, "")
    plain = training_step(student(teachers, *RECOMMENDED), batch())
    assert {name: loss.detach() for name, loss in losses.items()} == plain.losses
    assert found["qmimic/weight"][0] == figures(plain)["qmimic/weight"]


@pytest.mark.parametrize("part", ["backbone", "roi_heads.box_head", "backbone.conv5"])
def test_sharded_parts(teachers, process_group, caplog, part):
    losses, found = sharded_step(student(teachers, GRADIENT_PERIOD, 1), process_group, part, "")
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not any("grad" in name for name in found)
    assert f"FSDP shards ['{part}']" in caplog.text and "GRADIENT_PERIOD" in caplog.text
    with pytest.raises(ValueError, match="SCHEDULE is 'balanced'.*FSDP shards.*Shard the model as a whole"):
        sharded_step(student(teachers, *RECOMMENDED), process_group, part, "")
