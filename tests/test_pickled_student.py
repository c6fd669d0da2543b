"""A pickled student, as ``torch.save(model)`` writes it: no tensor of the teacher, and a training that goes on."""

import copy
import io

import pytest
import torch
from helpers import ONE_STAGE, batch, seeded_model, tiny_cfg, training_step, write_teacher

HEADS = ("MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT", "trunk", "MODEL.QMIMIC.MIMIC.INIT_HEADS_FROM_TEACHER", True)
FAMILIES = {"RCNN": (), "RetinaNet": ONE_STAGE["RetinaNet"], "FCOS": ONE_STAGE["FCOS"]}


@pytest.fixture(params=FAMILIES)
def student(request, tmp_path):
    options = FAMILIES[request.param]
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*teacher.options, *options, meta_architecture=f"QuantMimic{request.param}")
    model = seeded_model(cfg)
    training_step(model, batch())
    return model


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_holds_no_tensor_of_the_teacher(student, tmp_path):
    sizes = {tuple(tensor.shape) for tensor in torch.load(tmp_path / "teacher.pth")["model"].values()}
    sizes -= {tuple(tensor.shape) for tensor in student.state_dict(keep_vars=True).values()}
    assert sizes
    again = loaded(saved(student))
    assert again.mimic.teacher is None
    held = [each for each in recursively(again) if isinstance(each, torch.Tensor)]
    assert held and not {tuple(each.shape) for each in held} & sizes


def recursively(value, seen=None):
    """Everything that can be reached from an object by attributes, lists and dicts."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen.values()
    seen[id(value)] = value
    following = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        following += value.values()
    elif isinstance(value, (list, tuple, set)):
        following += value
    for each in following:
        recursively(each, seen)
    return seen.values()


def test_it_goes_on_as_the_saved_one(student):
    again = loaded(saved(student))
    assert again.training
    first, second = (training_step(each, batch(), iteration=1) for each in (student, again))
    assert first.losses == second.losses
    assert all(torch.equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())
    assert again.mimic.teacher is not None and again.mimic.teacher is not student.mimic.teacher


def test_it_evaluates_without_a_file_of_the_teacher(student, tmp_path):
    file = saved(student.eval())
    for path in tmp_path.iterdir():
        path.unlink()
    with torch.no_grad():
        found, again = (model(batch())[0]["instances"] for model in (student, loaded(file).eval()))
    assert torch.equal(found.scores, again.scores)


def test_heads_are_taken_from_the_teacher_once(tmp_path):
    teacher = write_teacher(tmp_path)
    model = seeded_model(tiny_cfg(*teacher.options, *HEADS, meta_architecture="QuantMimicRCNN"))
    training_step(model, batch())
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.add_(1.0)
    again = loaded(saved(model))
    training_step(again, batch())
    assert torch.equal(again.roi_heads.box_predictor.cls_score.bias, model.roi_heads.box_predictor.cls_score.bias)


def test_a_copy_still_shares_the_teacher(student):
    for copied in (copy.deepcopy(student), copy.copy(student)):
        assert copied.mimic.teacher is student.mimic.teacher
    nested = copy.deepcopy(torch.nn.ModuleList([student, student]))
    assert nested[0] is nested[1] and nested[0].mimic.teacher is student.mimic.teacher
