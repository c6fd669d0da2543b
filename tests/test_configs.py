"""Every YAML that is shipped is read, built, trained for a step and used, at its own sizes."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import batch, image

from qmimic_d2.config_files import get_config_file, packaged_config_folder
from qmimic_d2.engine import Trainer, load_config
from qmimic_d2.modeling.head_features import head_node, is_meta_architecture
from qmimic_d2.modeling.mimic_student import MimicStudent
from qmimic_d2.modeling.teacher_config import load_teacher_config

FOLDER = Path(packaged_config_folder())
NAMES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
LEAVES = [name for name in NAMES if not name.rpartition("/")[2].startswith("Base-")]


def load(name, *opts):
    return load_config(get_config_file(name), ["MODEL.DEVICE", "cpu", *opts])


def with_random_teacher(name, folder):
    """The config, with weights for its teacher, if it has one, that nobody trained."""
    cfg = load(name)
    if not cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
        return cfg
    weights = folder / "teacher.pth"
    torch.save(load_teacher_config(cfg).build_backbone().state_dict(prefix="backbone."), weights)
    return load(name, "MODEL.QMIMIC.TEACHER.WEIGHTS", str(weights))


def test_there_are_some():
    assert NAMES and LEAVES
    assert set(NAMES) - set(LEAVES)


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_detects(name, tmp_path):
    cfg = with_random_teacher(name, tmp_path)
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    inputs = batch((128, 128), num_boxes=(4,), num_classes=head_node(cfg).NUM_CLASSES)
    model.train()
    with EventStorage():
        losses = model(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    is_mimic = is_meta_architecture(cfg, MimicStudent)
    assert any(loss.startswith("loss_mimic") for loss in losses) == is_mimic
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        instances = model([{"image": image(128, 128), "height": 100, "width": 80}])[0]["instances"]
    assert instances.image_size == (100, 80)
    assert len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_names_what_a_training_needs(name):
    cfg = load(name)
    assert cfg.DATASETS.TRAIN and cfg.DATASETS.TEST
    assert cfg.OUTPUT_DIR.startswith("output/")
    assert cfg.SEED >= 0  # what is published can be repeated
    if is_meta_architecture(cfg, MimicStudent):
        assert cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE
        assert cfg.MODEL.QMIMIC.TEACHER.WEIGHTS or load_teacher_config(cfg).weights


def test_no_two_leaves_share_an_output_folder():
    folders = [load(name).OUTPUT_DIR for name in LEAVES]
    assert len(set(folders)) == len(folders)
