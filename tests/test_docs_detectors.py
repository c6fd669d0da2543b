"""docs/detectors.md: its examples build students that train, as they stand there."""

import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from helpers import ONE_STAGE_FPN, RESNET_FPN, batch, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2.modeling.quantizer_hook import attached_quantizer

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "detectors.md").read_text()
*YAMLS, OWN = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]

# What the batches of the tests have.
KEYPOINTS = (
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2, "MODEL.ROI_HEADS.NUM_CLASSES", 1),
    *("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", False),
)
LOSSES = ["loss_box_reg", "loss_mask", "loss_keypoint", "loss_cls_stage2", "loss_box_reg", "loss_fcos_ctr"]
LOSSES += ["loss_box_reg"]
RETINANET_LEVELS = len(LOSSES) - 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"), *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 12)


@pytest.fixture(scope="module")
def teacher_of_retinanet_levels(tmp_path_factory):
    backbone = ("MODEL.BACKBONE.NAME", "build_divided_retinanet_resnet_fpn_backbone")
    return write_teacher(tmp_path_factory.mktemp("retinanet"), *RESNET_FPN, *backbone)


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_example(number, teacher, teacher_of_retinanet_levels):
    teacher = teacher_of_retinanet_levels if number == RETINANET_LEVELS else teacher
    assert len(YAMLS) == len(LOSSES)
    cfg = tiny_cfg(*RESNET_FPN, "MODEL.QMIMIC.QUANTIZER.SIGNED", False)
    for block in (YAMLS[0], YAMLS[number]):  # the later blocks are added to the first
        cfg.merge_from_other_cfg(CfgNode(block))
    cfg.merge_from_list([*teacher.options, *(KEYPOINTS if cfg.MODEL.KEYPOINT_ON else ())])
    model = seeded_model(cfg)
    assert attached_quantizer(model.backbone).quantizer.signed
    step = training_step(model, batch(num_classes=1 if cfg.MODEL.KEYPOINT_ON else 3))
    assert LOSSES[number] in step.losses and step.losses["loss_mimic_p3"].item() > 0.0


def test_a_detector_of_ones_own(teacher, monkeypatch):
    attach, another_loss = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    my_retinanet = type("MyRetinaNet", (RetinaNet,), {})
    monkeypatch.setitem(sys.modules, "my_project", types.ModuleType("my_project"))
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "MyRetinaNet", my_retinanet)
    cfg = tiny_cfg(*ONE_STAGE_FPN["RetinaNet"], *teacher.options, meta_architecture="MyRetinaNet")
    namespace = {"cfg": cfg}
    exec(compile(attach, "attach", "exec"), namespace)
    model = namespace["model"]
    assert type(model) is my_retinanet and attached_quantizer(model.backbone).features == list(model.head_in_features)
    first = training_step(model, batch()).losses["loss_mimic_p3"].item()
    cfg.merge_from_other_cfg(CfgNode(OWN))
    by_yaml = seeded_model(cfg)
    assert type(by_yaml) is my_retinanet and "loss_mimic_p3" in training_step(by_yaml, batch()).losses
    exec(compile(another_loss, "another_loss", "exec"), namespace)
    assert 0.0 < training_step(model, batch()).losses["loss_mimic_p3"].item() != first > 0.0
    namespace["mimic"].remove()
    assert set(training_step(model, batch()).losses) == {"loss_cls", "loss_box_reg"}
