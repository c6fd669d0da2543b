"""Students with a mimic, and what the tests of them compare."""

from pathlib import Path

import torch
from detectron2.config import CfgNode
from helpers import seeded_model, tiny_cfg

from qmimic_d2.modeling import QuantMimicRCNN

QMIMIC = "MODEL.QMIMIC"
CONFIG_FILE = f"{QMIMIC}.TEACHER.CONFIG_FILE"
WEIGHTS = f"{QMIMIC}.TEACHER.WEIGHTS"
NAME = f"{QMIMIC}.QUANTIZER.NAME"
ROI_SOURCE = f"{QMIMIC}.MIMIC.ROI_SOURCE"
PERIOD = f"{QMIMIC}.DIAGNOSTICS.PERIOD"
IN_FEATURES = f"{QMIMIC}.MIMIC.IN_FEATURES"
TEACHER_IN_FEATURES = f"{QMIMIC}.MIMIC.TEACHER_IN_FEATURES"
TRAIN_ON_PRED_BOXES = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES"
PLAIN = (NAME, "")

# Faster R-CNN C4: heads that keep their sampled proposals to themselves.
RES5 = (
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 4),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 1),
    *("MODEL.RESNETS.NORM", "BN"),
)


def mimic_cfg(*options) -> CfgNode:
    return tiny_cfg(*options, meta_architecture="QuantMimicRCNN")


def mimic_model(*options, seed=1) -> QuantMimicRCNN:
    return seeded_model(mimic_cfg(*options), seed)


def other_model(meta_architecture, *options, seed=1):
    return seeded_model(tiny_cfg(*options, meta_architecture=meta_architecture), seed)


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def assert_near(first, second):
    """Equal to what another order of summation leaves."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def without(prefix, entries):
    return {name: each for name, each in entries.items() if not name.startswith(prefix)}


def detections_of(model, inputs):
    model.eval()
    with torch.no_grad():
        found = [each["instances"] for each in model([{"image": each["image"]} for each in inputs])]
    return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]


def move_away(written, folder) -> Path:
    """A copy of a teacher's files, to be removed."""
    paths = []
    for source in (written.config_file, written.weights):
        path = folder / Path(source).name
        path.write_bytes(Path(source).read_bytes())
        paths.append(path)
    return paths
