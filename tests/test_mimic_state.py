"""What a student holds: a teacher that is no part of it, nothing of a past step, and what it saves."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.evaluation import inference_context
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers import batch, maps_of_teacher, seeded_model, training_step
from mimic_models import (
    CONFIG_FILE,
    PLAIN,
    QMIMIC,
    WEIGHTS,
    assert_equal,
    detections_of,
    mimic_cfg,
    mimic_model,
    move_away,
    other_model,
    without,
)
from torch import nn

from qmimic_d2.modeling import FrozenTeacher
from qmimic_d2.modeling.checkpointer import build_checkpointer

# --------------------------------------------------------------------------------- the teacher beside it


def test_the_teacher_is_in_no_list_of_the_model(vgg_teacher):
    model, quant = mimic_model(*vgg_teacher.options).train(), other_model("QuantRCNN")
    assert isinstance(model.mimic.teacher, FrozenTeacher)
    adapter = {"mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"}
    assert set(model.state_dict()) - set(quant.state_dict()) == adapter
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in quant.named_parameters()} == adapter
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in quant.named_buffers()]
    assert not [name for name, _ in model.named_modules() if "teacher" in name]


def test_the_optimizer_trains_the_adapter_and_not_the_teacher(vgg_teacher):
    cfg = mimic_cfg(
        *vgg_teacher.options,
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01),
        *("SOLVER.BASE_LR", 0.1),
    )
    model = seeded_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert trained == {id(each) for each in model.parameters()}
    adapter = model.mimic.adapters["conv5"].weight.detach().clone()
    before = maps_of_teacher(model)
    for iteration in range(3):
        with EventStorage(iteration):
            losses = model(batch(seed=iteration))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    moved = (model.mimic.adapters["conv5"].weight - adapter).norm().item()
    assert 0.0 < moved < 0.01  # three clipped steps of at most 0.1 * 0.01
    assert_equal(maps_of_teacher(model), before)


def test_train_and_eval_leave_the_teacher_in_eval_mode(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    before = maps_of_teacher(model)
    for mode in (True, False, True, True, False):
        model.train(mode)
        assert model.training is mode and model.backbone.training is mode
        assert_equal(maps_of_teacher(model), before)
    assert model.train() is model and model.eval() is model


def test_no_statistic_of_the_teacher_changes_in_training(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    before = maps_of_teacher(model)
    own = copy.deepcopy(model.backbone.state_dict())
    for seed in range(3):
        training_step(model, batch(seed=seed))
    assert_equal(maps_of_teacher(model), before)
    changed = [name for name, each in model.backbone.state_dict().items() if not torch.equal(each, own[name])]
    assert any(name.endswith("running_mean") for name in changed)


def test_a_copy_shares_the_teacher_and_has_its_own_record(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    copied = copy.deepcopy(model)
    assert copied.mimic.teacher is model.mimic.teacher
    assert copied.mimic.record is not model.mimic.record
    first, second = (training_step(each, batch()) for each in (model, copied))
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)


def test_the_teacher_follows_the_model(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    teacher = model.mimic.teacher
    assert model.to("cpu").mimic.teacher is teacher and teacher.device == model.device
    nn.Sequential(model).to("meta")  # as a wrapper moves it
    assert teacher.device == torch.device("meta")


def test_the_dtype_of_the_student_is_not_the_teachers(vgg_teacher):
    model = mimic_model(*vgg_teacher.options, *PLAIN).train().double()
    assert next(model.backbone.parameters()).dtype == torch.float64
    assert model.mimic.teacher.features(batch())["conv5"].dtype == torch.float32


# ----------------------------------------------------------------------------------- seeds, pairing runs


def variants(written):
    scratch = ("GeneralizedRCNN", ())
    quant = ("QuantRCNN", ())
    mimic = ("QuantMimicRCNN", (*written.options, *PLAIN))
    relu = ("QuantMimicRCNN", (*written.options, *PLAIN, f"{QMIMIC}.MIMIC.ADAPTER", "conv1x1_relu"))
    qmimic = ("QuantMimicRCNN", tuple(written.options))
    return [scratch, quant, mimic, relu, qmimic]


def test_variants_of_one_seed_begin_alike_and_draw_alike(vgg_teacher):
    states, generators = [], []
    for meta_architecture, options in variants(vgg_teacher):
        model = other_model(meta_architecture, *options, seed=7).train()
        states.append(without("mimic.", model.state_dict()))
        generators.append(torch.get_rng_state())
    for state, generator in zip(states[1:], generators[1:]):
        assert_equal(dict(state), dict(states[0]))
        assert torch.equal(generator, generators[0])


def test_a_step_of_every_variant_draws_alike(vgg_teacher):
    sampled = []
    for meta_architecture, options in variants(vgg_teacher):
        training_step(other_model(meta_architecture, *options), batch())
        sampled.append(torch.get_rng_state())
    assert all(torch.equal(each, sampled[0]) for each in sampled)


def test_the_same_seed_gives_the_same_adapter(vgg_teacher):
    first, second = (mimic_model(*vgg_teacher.options, seed=3).state_dict() for _ in range(2))
    assert_equal(dict(first), dict(second))


# --------------------------------------------------------------------- nothing outlives a step, or leaks


def test_nothing_of_a_step_is_kept(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    references, pairs = [], model.mimic.pairs

    def record(maps, teacher_maps, boxes):
        references.extend(weakref.ref(each) for each in (maps["conv5"], teacher_maps["conv5"]))
        return pairs(maps, teacher_maps, boxes)

    model.mimic.pairs = record
    with EventStorage():
        losses = model(batch())
    assert model.mimic.record.maps == {}
    assert model.mimic.record.regions.sampled == [] and not model.mimic.record.is_recording
    sum(losses.values()).backward()
    del losses
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_nothing_of_a_failed_step_is_kept(vgg_teacher, monkeypatch):
    model = mimic_model(*vgg_teacher.options).train()
    monkeypatch.setattr(model.mimic.teacher, "features", lambda inputs: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError), EventStorage():
        model(batch())
    assert model.mimic.record.maps == {} and not model.mimic.record.is_recording


def test_evaluation_records_nothing_and_runs_no_teacher(vgg_teacher, monkeypatch):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    monkeypatch.setattr(FrozenTeacher, "features", lambda *args: pytest.fail("the teacher ran"))
    seen = []
    model.roi_heads.register_forward_hook(lambda *args: seen.append(model.mimic.record.maps))
    detections_of(model, batch())
    assert seen == [{}]


def test_losses_under_no_grad_hold_no_graph(vgg_teacher):
    model = mimic_model(*vgg_teacher.options).train()
    with EventStorage(), torch.no_grad():
        losses = model(batch())
    assert losses["loss_mimic"].item() > 0.0
    assert not any(loss.requires_grad for loss in losses.values())


# ------------------------------------------------------------------------------- checkpoints, evaluation


def test_a_checkpoint_holds_the_adapter_and_no_teacher(vgg_teacher, tmp_path):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    build_checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth")["model"]
    assert set(saved) == set(model.state_dict())
    assert sorted(name for name in saved if name.startswith("mimic.")) == [
        "mimic.adapters.conv5.bias",
        "mimic.adapters.conv5.weight",
    ]
    teachers = [each for each in vgg_teacher.model.backbone.state_dict().values() if each.numel() > 1]
    same = [(a, b) for a, b in itertools.product(saved.values(), teachers) if a.shape == b.shape and torch.equal(a, b)]
    assert same == []
    again = mimic_model(*vgg_teacher.options, seed=9)
    build_checkpointer(again, str(tmp_path)).resume_or_load("", resume=True)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("gone", ["both", "weights", "truncated"])
def test_evaluation_runs_with_the_teachers_files_removed(vgg_teacher, tmp_path, gone):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    options = (CONFIG_FILE, str(config_file), WEIGHTS, str(weights))
    model = mimic_model(*options)
    training_step(model, batch())
    expected = detections_of(model, batch())
    build_checkpointer(model, str(tmp_path)).save("model")
    if gone == "truncated":
        weights.write_bytes(b"")
    else:
        weights.unlink()
    if gone == "both":
        config_file.unlink()

    again = mimic_model(*options, seed=9)
    build_checkpointer(again, "").load_for_evaluation(str(tmp_path / "model.pth"))
    # as Detectron2's evaluator does it, which puts the model back into training mode at the end
    with inference_context(again):
        assert_equal(detections_of(again, batch()), expected)
    assert again.training and again.mimic.teacher is None
    with pytest.raises((FileNotFoundError, ValueError)) as caught, EventStorage():
        again(batch())
    assert "MODEL.QMIMIC.TEACHER" in str(caught.value)


@pytest.mark.parametrize("meta_architecture, options", [("QuantRCNN", ()), ("GeneralizedRCNN", ())])
def test_a_student_is_loaded_without_this_class(vgg_teacher, tmp_path, meta_architecture, options):
    quantizer = PLAIN if meta_architecture == "GeneralizedRCNN" else ()
    model = mimic_model(*vgg_teacher.options, *quantizer)
    training_step(model, batch())
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    shipped = other_model(meta_architecture, *options, seed=9)
    DetectionCheckpointer(shipped).load(str(tmp_path / "model.pth"))
    assert_equal(detections_of(shipped, batch()), detections_of(model, batch()))


def test_a_trace_of_the_backbone_in_evaluation(vgg_teacher):
    model = mimic_model(*vgg_teacher.options)
    training_step(model, batch())
    model.eval()
    pixels = model.preprocess_image(batch()).tensor
    with torch.no_grad():
        traced = torch.jit.trace(model.backbone, pixels, strict=False)
        assert_equal(dict(traced(pixels.flip(-1))), dict(model.backbone(pixels.flip(-1))))
    assert model.mimic.record.maps == {}
