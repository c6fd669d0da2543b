"""One-stage students in training: their losses, regions and levels, their teacher of any family, and what they save."""

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers import (
    NUM_CLASSES,
    ONE_STAGE,
    ONE_STAGE_FPN,
    RESNET_FPN,
    batch,
    calls_of_mimic_loss,
    maps_of_teacher,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)

from qmimic_d2.modeling import FrozenTeacher, QuantMimicFCOS, QuantMimicRetinaNet
from qmimic_d2.modeling.checkpointer import build_checkpointer

QMIMIC = "MODEL.QMIMIC"
MIMIC = f"{QMIMIC}.MIMIC"
ROI_SOURCE = f"{MIMIC}.ROI_SOURCE"
LOSS_WEIGHT = f"{MIMIC}.LOSS_WEIGHT"
INIT_HEADS = (f"{MIMIC}.INIT_HEADS_FROM_TEACHER", True)
TRUNK = (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.ADAPTER", "conv1x1_relu")
LEVELS = ("p3", "p4", "p5", "p6")
FAMILIES = list(ONE_STAGE)


def student_cfg(family, *options, levels=ONE_STAGE, kind="QuantMimic"):
    return tiny_cfg(*levels[family], *options, meta_architecture=f"{kind}{family}")


def student(family, *options, levels=ONE_STAGE, kind="QuantMimic", seed=1):
    return seeded_model(student_cfg(family, *options, levels=levels, kind=kind), seed)


def write_one_stage_teacher(folder, family, *options, levels=ONE_STAGE):
    """As write_teacher, of a quantized one-stage detector."""
    name = "RetinaNet" if family == "RetinaNet" else "QuantFCOS"
    return write_teacher(folder, *levels[family], "MODEL.META_ARCHITECTURE", name, *options, name=family)


@pytest.fixture(scope="module")
def rcnn(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("rcnn"))


@pytest.fixture(scope="module", params=FAMILIES)
def same_family(request, tmp_path_factory):
    """A family and a teacher of it, with an FPN."""
    folder = tmp_path_factory.mktemp(request.param)
    wide = ("MODEL.FPN.OUT_CHANNELS", 12)
    return request.param, write_one_stage_teacher(folder, request.param, *wide, levels=ONE_STAGE_FPN)


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def without(prefix, entries):
    return {name: each for name, each in entries.items() if not name.startswith(prefix)}


# ------------------------------------------------------------------------------------------ the mimic loss


@pytest.mark.parametrize("family", FAMILIES)
def test_it_adds_the_loss_and_leaves_the_others(family, rcnn):
    model, inputs = student(family, *rcnn.options, LOSS_WEIGHT, 3.0), batch((64, 64), (48, 80))
    training_step(student(family, kind="Quant"), inputs)  # TorchScript's first run of the focal loss
    quant = training_step(student(family, kind="Quant"), inputs)
    calls = calls_of_mimic_loss(model)
    step = training_step(model, inputs)
    assert_equal(without("loss_mimic", step.losses), quant.losses)
    ((maps, teacher_maps, boxes),) = (call.values() for call in calls)
    plain = model.train().mimic(maps, teacher_maps, boxes)["loss_mimic"]
    torch.testing.assert_close(step.losses["loss_mimic"], 3.0 * plain.detach())
    assert step.losses["loss_mimic"].item() > 0.0
    # the map as it was before the student's quantizer, the teacher's behind its own, the annotated boxes
    stock = student(family, f"{QMIMIC}.QUANTIZER.NAME", "", kind="Quant").train()
    assert torch.equal(maps["conv5"], stock.backbone(stock.preprocess_image(inputs).tensor)["conv5"])
    assert_equal(teacher_maps, FrozenTeacher(student_cfg(family, *rcnn.options)).features(inputs))
    assert_equal([each.tensor for each in boxes], [each["instances"].gt_boxes.tensor for each in inputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_reaches_backbone_and_adapter_alone(family, rcnn):
    model = student(family, *rcnn.options).train()
    with EventStorage():
        model(batch())["loss_mimic"].backward()
    touched = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in touched} == {"backbone", "mimic"}
    assert all(name in touched for name, _ in model.backbone.named_parameters(prefix="backbone"))


def test_several_levels_have_a_loss_each(same_family):
    family, teacher = same_family
    model = student(family, *teacher.options, ROI_SOURCE, ["whole_map"], levels=ONE_STAGE_FPN)
    step = training_step(model, batch((64, 64), (48, 80)))
    assert [name for name in step.losses if "mimic" in name] == [f"loss_mimic_{name}" for name in LEVELS]
    for name in LEVELS:
        assert step.losses[f"loss_mimic_{name}"].item() > 0.0
        assert step.gradients[f"mimic.adapters.{name}.weight"].abs().sum() > 0.0
        assert f"qmimic/match_ratio_{name}" in step.storage.latest()
    assert 0.0 < step.storage.latest()["qmimic/grad_share_map"][0] < 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_a_box(family, rcnn):
    model = student(family, *rcnn.options)
    step = training_step(model, batch(num_boxes=(0,)))
    assert all(math.isfinite(loss.item()) for loss in step.losses.values())
    assert step.losses["loss_mimic"].item() == 0.0
    # every parameter takes part in the step all the same
    assert set(step.gradients) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("source", ["ground_truth", "neighbourhood", "teacher_proposals", "whole_map"])
@pytest.mark.parametrize("family", FAMILIES)
def test_regions(family, source, rcnn):
    step = training_step(student(family, *rcnn.options, ROI_SOURCE, [source]), batch())
    assert step.losses["loss_mimic"].item() > 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_union_of_regions(family, rcnn):
    model, inputs = student(family, *rcnn.options, ROI_SOURCE, ["ground_truth", "teacher_proposals"]), batch()
    calls = calls_of_mimic_loss(model)
    training_step(model, inputs)
    _, proposals = model.mimic.teacher.features_and_proposals(inputs)
    for found, each, extra in zip(calls[0]["boxes"], inputs, proposals):
        annotated = each["instances"].gt_boxes.tensor
        assert len(extra) > 0
        assert torch.equal(found.tensor, torch.cat([annotated, extra.tensor]))


@pytest.mark.parametrize("source", [["sampled"], ["proposals"], ["ground_truth", "sampled"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_regions_of_an_rcnn_are_refused(family, source, rcnn):
    with pytest.raises(ValueError) as caught:
        student(family, *rcnn.options, ROI_SOURCE, source)
    for word in (ROI_SOURCE, repr(source), "'ground_truth'", "'neighbourhood'", "'teacher_proposals'", "'whole_map'"):
        assert word in str(caught.value)
    assert "'sampled'" not in str(caught.value).partition("give a list")[2]
    # without a teacher nothing looks at it
    training_step(student(family, ROI_SOURCE, source), batch())


# ------------------------------------------------------------------------------- teachers of other families


def test_a_student_of_the_same_family(same_family):
    family, teacher = same_family
    step = training_step(student(family, *teacher.options, levels=ONE_STAGE_FPN), batch())
    assert step.losses["loss_mimic_p3"].item() > 0.0


def test_an_rcnn_learns_from_a_one_stage_teacher(same_family):
    teacher = same_family[1]
    cfg = tiny_cfg(*RESNET_FPN, *teacher.options, meta_architecture="QuantMimicRCNN")
    model = seeded_model(cfg)
    assert model.mimic.teacher_features == ["p3", "p4", "p5"]
    assert training_step(model, batch()).losses["loss_mimic_p3"].item() > 0.0


def test_the_maps_of_a_teacher_may_be_named(same_family, rcnn):
    family, teacher = same_family
    names = (f"{MIMIC}.TEACHER_IN_FEATURES", ["p3"])
    model = student(family, *teacher.options, *names)
    assert (model.mimic.student_features, model.mimic.teacher_features) == (["conv5"], ["p3"])
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_a_one_stage_teacher_has_no_proposals(same_family):
    family, teacher = same_family
    model = student(family, *teacher.options, ROI_SOURCE, ["teacher_proposals"], levels=ONE_STAGE_FPN)
    with pytest.raises(ValueError, match="has no proposal generator"):
        model.train()


@pytest.mark.parametrize("stride", [0.25, 2.0])
def test_a_teacher_that_was_trained_on_other_codes_is_known(tmp_path, stride, caplog):
    teacher = write_one_stage_teacher(tmp_path, "FCOS", f"{QMIMIC}.QUANTIZER.STRIDE", stride)
    student("FCOS", *teacher.options)
    assert ("differs from the student's" in caplog.text) == (stride == 2.0)


def head_of(state):
    return {name: each for name, each in state.items() if name.startswith("head.")}


@pytest.mark.slow
@pytest.mark.parametrize("options", [("MODEL.FPN.OUT_CHANNELS", 12), TRUNK], ids=["equally wide", "trunk"])
def test_the_head_begins_with_the_teachers_weights(same_family, options):
    family, teacher = same_family
    model = student(family, *teacher.options, *options, *INIT_HEADS, levels=ONE_STAGE_FPN)
    taken = head_of(torch.load(teacher.weights)["model"])
    assert head_of(model.state_dict()).keys() == taken.keys()
    model.train()
    assert len(taken) >= 8
    assert_equal(head_of(model.state_dict()), taken)
    training_step(model, batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_another_family_is_refused(family, rcnn):
    with pytest.raises(ValueError) as caught:
        student(family, *rcnn.options, *INIT_HEADS).train()
    assert "INIT_HEADS_FROM_TEACHER" in str(caught.value) and "head." in str(caught.value)


def test_the_adapter_in_the_trunk(same_family):
    family, teacher = same_family
    trained = student(family, *teacher.options, *TRUNK, levels=ONE_STAGE_FPN)
    assert {shape.channels for shape in trained.backbone.output_shape().values()} == {12}
    assert not list(trained.mimic.parameters())
    step = training_step(trained, batch())
    assert step.losses["loss_mimic_p3"].item() > 0.0
    assert "backbone.adapters.p6.0.weight" in step.gradients
    widths = (*TRUNK, f"{MIMIC}.TRUNK_CHANNELS", [12] * 4)
    shipped = student(family, *widths, levels=ONE_STAGE_FPN, kind="Quant", seed=2)
    shipped.load_state_dict(trained.state_dict())


# --------------------------------------------------------------------------------- what is saved, and evaluated


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_in_no_list_of_the_model(family, rcnn):
    model, quant = student(family, *rcnn.options).train(), student(family, kind="Quant")
    assert isinstance(model.mimic.teacher, FrozenTeacher)
    adapter = {"mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"}
    assert set(model.state_dict()) - set(quant.state_dict()) == adapter
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in quant.named_parameters()} == adapter
    assert not [name for name, _ in model.named_modules() if "teacher" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_needs_no_file_of_the_teacher(family, rcnn, tmp_path):
    trained = student(family, *rcnn.options, seed=3)
    build_checkpointer(trained, str(tmp_path)).save("student")
    nowhere = (f"{QMIMIC}.TEACHER.CONFIG_FILE", "nowhere.yaml")
    for options, kind in ((nowhere, "QuantMimic"), ((), "QuantMimic"), ((), "Quant")):
        model = student(family, *options, kind=kind, seed=4)
        build_checkpointer(model, "").load_for_evaluation(str(tmp_path / "student.pth"))
        model.eval(), trained.eval()
        with torch.no_grad():
            first, second = (each(batch())[0]["instances"] for each in (model, trained))
        assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


@pytest.mark.parametrize("kind", [QuantMimicRetinaNet, QuantMimicFCOS])
def test_explicit_construction(kind, rcnn):
    family = kind.__name__[len("QuantMimic") :]
    built = student(family, *rcnn.options)
    args = kind.from_config(student_cfg(family, *rcnn.options))
    names = ("backbone", "head")
    model = kind(**{**args, **{name: getattr(built, name) for name in names}, "quantizer": None})
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_some_iterations_bring_the_student_nearer_to_its_teacher(family, rcnn):
    fixed = ("SOLVER.BASE_LR", 0.01, f"{MIMIC}.NORMALIZE_BY", "target", LOSS_WEIGHT, 20.0)
    cfg = student_cfg(family, *rcnn.options, *fixed)
    model, inputs = seeded_model(cfg), batch()
    trainer = SimpleTrainer(model, [inputs] * 30, build_optimizer(cfg, model))
    before = maps_of_teacher(model.train())
    with EventStorage() as trainer.storage:
        for trainer.iter in range(30):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
        losses = [value for value, _ in trainer.storage.history("loss_mimic").values()]
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    assert_equal(maps_of_teacher(model), before)
    assert model.num_classes == NUM_CLASSES
