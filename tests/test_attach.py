"""attach_mimic and attach_quantizer on detectors that know nothing of this package, by code and by YAML."""

import copy
import io
import os
import pickle

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, build_backbone
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.structures import ImageList
from helpers import RESNET_FPN, batch, run_two_processes, seeded_model, tiny_cfg, training_step, write_teacher
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2 import attach_mimic, attach_quantizer
from qmimic_d2.export import build_student
from qmimic_d2.export.student import student_config
from qmimic_d2.modeling import build_quantizer
from qmimic_d2.modeling.attach import attached_mimic
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

MIMIC = "MODEL.QMIMIC.MIMIC"
ROI_SOURCE = f"{MIMIC}.ROI_SOURCE"
SEM_SEG = (
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4", "p5"], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2),
)


class OwnForwardRCNN(GeneralizedRCNN):
    """An R-CNN of a project, whose forward is its own."""

    def forward(self, batched_inputs):
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [each["instances"].to(self.device) for each in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, targets)
        losses.update(self.roi_heads(images, features, proposals, targets)[1])
        return losses


class HandWritten(nn.Module):
    """Nothing in common with Detectron2's detectors but ``backbone`` and a dict of losses."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.score = nn.Conv2d(self.backbone.output_shape()["conv5"].channels, 1, 1)

    def forward(self, inputs):
        images = ImageList.from_tensors([each["image"].float() / 255.0 for each in inputs], 8).tensor
        scores = self.score(self.backbone(images)["conv5"])
        return {"loss_scores": scores.square().mean()} if self.training else scores


# By name: class, options, ROI_SOURCE, compared maps.
DETECTORS = {
    "own forward": (OwnForwardRCNN, (), ["sampled"], ["conv5"]),
    "proposal network": (ProposalNetwork, (), ["proposals"], ["conv5"]),
    "panoptic": (PanopticFPN, (*RESNET_FPN, *SEM_SEG), ["sampled"], ["p3", "p4", "p5"]),
    "hand-written": (HandWritten, (), ["ground_truth"], ["conv5"]),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for kind in (OwnForwardRCNN, HandWritten):
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, kind.__name__, kind)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        "panoptic": write_teacher(tmp_path_factory.mktemp("fpn"), *RESNET_FPN),
        "": write_teacher(tmp_path_factory.mktemp("vgg")),
    }


def config(name, teachers, *options):
    kind, own, source, _ = DETECTORS[name]
    teacher = teachers.get(name, teachers[""])
    options = (*own, *teacher.options, ROI_SOURCE, source, *options)
    return tiny_cfg(*options, meta_architecture=kind.__name__)


def images(**kwargs):
    inputs = batch((64, 64), (48, 80), **kwargs)
    for each in inputs:
        each["sem_seg"] = torch.zeros(each["image"].shape[-2:], dtype=torch.long)
    return inputs


def plain(name, teachers):
    """The detector alone, with a quantizer on the maps that are compared."""
    cfg = config(name, teachers)
    model = seeded_model(cfg)
    attach_quantizer(model.backbone, build_quantizer(cfg), DETECTORS[name][3])
    return model


def student(name, teachers, *options):
    model = plain(name, teachers)
    attach_mimic(model, config(name, teachers, *options))
    return model


def by_yaml(name, teachers):
    cfg = config(name, teachers)
    node = {"MODEL": {"META_ARCHITECTURE": "QuantMimic", "QMIMIC": {"META_ARCHITECTURE": cfg.MODEL.META_ARCHITECTURE}}}
    cfg.merge_from_other_cfg(CfgNode(node))
    return seeded_model(cfg)


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def mimics(losses):
    return {name: each for name, each in losses.items() if name.startswith("loss_mimic")}


def others(losses):
    return {name: each for name, each in losses.items() if not name.startswith("loss_mimic")}


def hooks(model):
    """How many hooks every module has, of each kind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


# --------------------------------------------------------------------------------------- any detector


@pytest.mark.parametrize("build", [student, by_yaml], ids=["code", "yaml"])
@pytest.mark.parametrize("name", DETECTORS)
def test_any_detector_is_a_student(name, build, teachers):
    model = build(name, teachers)
    kind, _, _, maps = DETECTORS[name]
    assert type(model) is kind
    assert attached_quantizer(model.backbone).features == maps
    step = training_step(model, images())
    expected = training_step(plain(name, teachers), images())
    assert_equal(others(step.losses), expected.losses)
    suffixes = [f"_{each}" for each in maps] if len(maps) > 1 else [""]
    assert set(mimics(step.losses)) == {f"loss_mimic{suffix}" for suffix in suffixes}
    assert sum(mimics(step.losses).values()) > 0.0
    assert all(f"mimic.adapters.{each}.weight" in step.gradients for each in maps)
    assert step.storage.latest()["qmimic/weight"][0] == 1.0
    own = [each for each in model.state_dict() if not each.startswith("mimic.adapters.")]
    assert own == list(plain(name, teachers).state_dict())


@pytest.mark.parametrize("name", DETECTORS)
def test_code_and_yaml_are_alike(name, teachers):
    first, second = (training_step(build(name, teachers), images()) for build in (student, by_yaml))
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)


@pytest.mark.parametrize("name", DETECTORS)
def test_student_and_teacher_are_compared(name, teachers):
    model = student(name, teachers).train()
    boxes = [each["instances"].gt_boxes for each in images()]
    compared = model.eval().mimic.compare_on(images(), boxes)
    assert list(compared) == DETECTORS[name][3]
    assert sum(each.num_rois for each in compared.values()) == sum(len(each) for each in boxes)
    assert model.mimic.record.maps == {} and not model.mimic.record.is_recording


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("hand-written", "sampled", ["'sampled'", "ground_truth"]),
        ("hand-written", "proposals", ["'proposals'", "ground_truth"]),
        ("proposal network", "sampled", ["'sampled'", "proposals"]),
    ],
)
def test_regions_that_a_detector_does_not_have_are_refused_by_name(name, source, words, teachers):
    model = plain(name, teachers)
    with pytest.raises(ValueError, match=ROI_SOURCE) as caught:
        attach_mimic(model, config(name, teachers, ROI_SOURCE, [source]))
    assert all(word in str(caught.value) for word in words)
    assert attached_mimic(model) is None


def test_what_is_no_detector_is_refused(teachers):
    cfg = config("hand-written", teachers)
    with pytest.raises(ValueError, match="no module 'backbone'"):
        attach_mimic(nn.Linear(1, 1), cfg)
    model = seeded_model(cfg)
    model.mimic = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="of its own"):
        attach_mimic(model, cfg)


def test_losses_have_to_be_a_dict(teachers):
    model = student("hand-written", teachers).train()
    model.register_forward_hook(lambda module, inputs, output: output["loss_scores"], prepend=True)
    with pytest.raises(ValueError, match="a dict of losses"):
        training_step(model, images())


@pytest.mark.parametrize("name", ["", "QuantMimic", "NoSuchDetector"])
def test_the_detector_of_a_yaml_has_to_be_registered(name):
    with pytest.raises(ValueError, match="MODEL.QMIMIC.META_ARCHITECTURE") as caught:
        seeded_model(tiny_cfg("MODEL.QMIMIC.META_ARCHITECTURE", name, meta_architecture="QuantMimic"))
    assert repr(name) in str(caught.value) and "'GeneralizedRCNN'" in str(caught.value)


def test_a_yaml_with_the_adapter_in_the_trunk_is_refused():
    options = ("MODEL.QMIMIC.META_ARCHITECTURE", "GeneralizedRCNN", f"{MIMIC}.ADAPTER_PLACEMENT", "trunk")
    with pytest.raises(ValueError, match="ADAPTER_PLACEMENT 'branch'"):
        seeded_model(tiny_cfg(*options, meta_architecture="QuantMimic"))


# ------------------------------------------------------------------------------- put on, taken off, replaced


@pytest.mark.parametrize("name", DETECTORS)
def test_removed_it_is_the_detector_again(name, teachers):
    model, untouched = student(name, teachers), plain(name, teachers)
    mimic = model.mimic
    mimic.remove()
    mimic.remove()
    assert not hasattr(model, "mimic") and hooks(model) == hooks(untouched)
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert_equal(training_step(model, images()).losses, training_step(untouched, images()).losses)
    torch.manual_seed(1)
    attach_mimic(model, config(name, teachers))
    assert mimics(training_step(model, images()).losses)


def test_attached_twice_it_acts_once(teachers):
    model, once = student("own forward", teachers), student("own forward", teachers)
    count = hooks(model)
    first = model.mimic
    first.load_state_dict(once.mimic.state_dict())
    second = attach_mimic(model, config("own forward", teachers))
    assert model.mimic is second is not first and hooks(model) == count
    second.load_state_dict(once.mimic.state_dict())
    assert_equal(training_step(model, images()).losses, training_step(once, images()).losses)


def test_the_quantizer_may_come_after_the_mimic(teachers):
    cfg = config("own forward", teachers)
    model = seeded_model(cfg)
    attach_mimic(model, cfg)
    attach_quantizer(model.backbone, build_quantizer(cfg), ["conv5"])
    expected = training_step(student("own forward", teachers), images())
    losses = training_step(model, images()).losses
    assert_equal(others(losses), others(expected.losses))  # the heads read codes, and the mimic what is before them
    assert mimics(losses).keys() == mimics(expected.losses).keys()


def test_another_loss_is_a_function_of_a_pair(teachers):
    def absolute(pair):
        assert pair.student.shape == pair.teacher.shape
        return (pair.student - pair.teacher).abs().sum() / pair.num_regions

    model = plain("own forward", teachers)
    mimic = attach_mimic(model, config("own forward", teachers), distance=absolute)
    step = training_step(model, images())
    usual = training_step(student("own forward", teachers), images())
    assert mimic.distance is absolute
    assert 0.0 < step.losses["loss_mimic"] != usual.losses["loss_mimic"]
    assert_equal(others(step.losses), others(usual.losses))


def test_without_a_teacher_nothing_changes(teachers, caplog):
    model = plain("own forward", teachers)
    attach_mimic(model, config("own forward", teachers, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", ""))
    assert attached_mimic(model) is None
    losses = training_step(model, images()).losses
    assert "the mimic is off" in caplog.text
    assert_equal(losses, training_step(plain("own forward", teachers), images()).losses)


# ---------------------------------------------------------------- copies, files, processes, compilers, devices


@pytest.mark.parametrize("name", DETECTORS)
def test_a_copy_trains_by_itself(name, teachers):
    model = student(name, teachers).train()
    copied = copy.deepcopy(model)
    assert copied.mimic.detector is copied and copied.mimic.teacher is model.mimic.teacher
    first, second = training_step(copied, images()), training_step(model, images())
    assert_equal(first.losses, second.losses)
    assert_equal(first.gradients, second.gradients)
    copied.mimic.remove()
    assert mimics(training_step(model, images()).losses) and not mimics(training_step(copied, images()).losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_pickled_student_trains_on(name, teachers):
    model = student(name, teachers).train()
    file = io.BytesIO()
    torch.save(model, file)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert again.mimic.detector is again and again.mimic.teacher is None
        assert_equal(training_step(again, images()).losses, training_step(copy.deepcopy(model), images()).losses)
        again.mimic.remove()
        assert not mimics(training_step(again, images()).losses)


def ddp_worker(rank, folder, teachers):
    META_ARCH_REGISTRY._obj_map.update({kind.__name__: kind for kind in (OwnForwardRCNN, HandWritten)})
    for name in DETECTORS:
        wrapped = DistributedDataParallel(student(name, teachers).train(), broadcast_buffers=False)
        step = training_step(wrapped, images(seed=rank))
        torch.save((step.losses, step.gradients), os.path.join(folder, f"{name}{rank}.pth"))


@pytest.mark.ddp
def test_two_processes(teachers, tmp_path):
    run_two_processes(ddp_worker, tmp_path, teachers)
    for name in DETECTORS:
        (first, gradients), (second, same) = (torch.load(tmp_path / f"{name}{rank}.pth") for rank in range(2))
        assert mimics(first).keys() == mimics(second).keys() and sum(mimics(first).values()) > 0.0
        assert sum(mimics(first).values()) != sum(mimics(second).values())  # of other images
        assert any("mimic.adapters" in key for key in gradients)
        assert_equal(gradients, same)  # and yet one gradient


@pytest.mark.slow
@pytest.mark.parametrize("compiles_first", [False, True])
def test_a_compiled_backbone(teachers, compiles_first):
    cfg = config("own forward", teachers)
    model = plain("own forward", teachers)
    if not compiles_first:
        torch.manual_seed(5)
        attach_mimic(model, cfg)
    model.backbone = torch.compile(model.backbone, backend="aot_eager")
    if compiles_first:
        torch.manual_seed(5)
        attach_mimic(model, cfg)
    expected = plain("own forward", teachers)
    torch.manual_seed(5)
    attach_mimic(expected, cfg)
    for seed in range(2):
        found, wanted = (training_step(each, images(seed=seed)).losses for each in (model, expected))
        torch.testing.assert_close(found, wanted)
    assert model.mimic.record.maps == {}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_teacher_follows(name, teachers):
    model = student(name, teachers).train()
    nn.Sequential(model).to("meta")
    assert model.mimic.teacher.device == torch.device("meta")


@pytest.mark.parametrize("through", ["model", "sequence"])
def test_an_earlier_checkpoint_is_read(teachers, through):
    model, other = student("own forward", teachers), student("own forward", teachers)
    nn.init.constant_(model.mimic.adapters["conv5"].bias, 3.0)
    state = {name.replace("mimic.", "mimic_loss."): each for name, each in model.state_dict().items()}
    assert "mimic_loss.adapters.conv5.bias" in state
    if through == "model":
        other.load_state_dict(state)
    else:
        nn.Sequential(other).load_state_dict({f"0.{name}": each for name, each in state.items()})
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_an_exported_student_is_built_again(teachers, tmp_path):
    model = by_yaml("own forward", teachers).eval()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    named = ("MODEL.QMIMIC.META_ARCHITECTURE", "OwnForwardRCNN", "MODEL.WEIGHTS", str(path))
    cfg = config("own forward", teachers, *named)
    cfg.MODEL.META_ARCHITECTURE = "QuantMimic"
    shipped = build_student(cfg)
    exported = student_config(cfg, shipped)
    node = exported.cfg.MODEL
    assert (node.META_ARCHITECTURE, node.QMIMIC.META_ARCHITECTURE) == ("QuantMimic", "OwnForwardRCNN")
    assert node.QMIMIC.TEACHER.CONFIG_FILE == "" and not exported.is_stock
    again = seeded_model(exported.cfg, seed=9)
    again.load_state_dict(shipped.state_dict())
    assert type(again) is OwnForwardRCNN and attached_quantizer(again.backbone).features == ["conv5"]
    pixels = torch.rand(1, 3, 64, 64)
    assert_equal(dict(again.eval().backbone(pixels)), dict(model.backbone(pixels)))
