"""The shipped YAMLs, and what lets a full-width detector run in a second: ``from shipped_configs import load``."""

from pathlib import Path
from typing import Any, Dict

import torch
from detectron2.config import CfgNode

from qmimic_d2.config_files import get_config_file, packaged_config_folder
from qmimic_d2.engine import load_config
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config

FOLDER = Path(packaged_config_folder())

# Names below that folder, with "/".
NAMES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))

# Those that are complete; the others are built upon.
LEAVES = [name for name in NAMES if not name.rpartition("/")[2].startswith("Base-")]

# Those of the paper's own data sets.
PAPER = [name for name in LEAVES if name.startswith(("PascalVOC/", "WIDERFACE/"))]

# KEY VALUE pairs: a full-width head takes seconds for the hundreds of regions that it is trained on.
FEW_REGIONS = (
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 200),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 40),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.QMIMIC.MIMIC.MAX_ROIS_PER_IMAGE", 8),
)


def load(name: str, *opts: Any) -> CfgNode:
    """A frozen config by its name, on the CPU, with KEY VALUE pairs put over it."""
    return load_config(get_config_file(name), ["MODEL.DEVICE", "cpu", *opts])


class UntrainedTeachers:
    """Files of weights that nobody trained, one for each teacher's config."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: Dict[str, Path] = {}

    def weights_of(self, cfg: CfgNode) -> str:
        """The file for the teacher of a student's config; its backbone alone, which is what a mimic reads."""
        teacher = load_teacher_config(cfg)
        if teacher.path not in self._files:
            path = self._folder / f"{len(self._files)}.pth"
            torch.save(teacher.build_backbone().state_dict(prefix="backbone."), path)
            self._files[teacher.path] = path
        return str(self._files[teacher.path])
