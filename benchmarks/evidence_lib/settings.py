"""Which settings decide what a run comes to, and a digest of them."""

import hashlib
import json
from typing import Any, Dict

from detectron2.config import CfgNode

from qmimic_d2.config import default_config
from qmimic_d2.engine import load_config
from qmimic_d2.yaml.config import flat_keys

__all__ = ["config_digest", "settings_of"]

# Keys, or beginnings of keys, that change no weight and no AP: places, and how often something is measured or
# saved. Weights that are read count by their own digests.
_WITHOUT_EFFECT = (
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "MODEL.WEIGHTS",
    "MODEL.QMIMIC.DIAGNOSTICS.",
    "MODEL.QMIMIC.TEACHER.CACHE",  # and CACHE_GB
    "MODEL.QMIMIC.TEACHER.CONFIG_FILE",
    "MODEL.QMIMIC.TEACHER.OPTS",
    "MODEL.QMIMIC.TEACHER.WEIGHTS",
)
# What of a teacher's config reaches the student.
_OF_A_TEACHER = ("MODEL.", "INPUT.FORMAT")


def settings_of(cfg: CfgNode) -> Dict[str, Any]:
    """
    The keys of a resolved config that differ from the defaults and have an effect on the result.

    Differences alone, so that a key which this project gets later, with a default that changes nothing, leaves
    earlier runs what they are. A teacher's config stands under ``TEACHER``.
    """
    settings = _differences(cfg)
    file = cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE
    if file.endswith(".yaml"):
        teacher = _differences(load_config(file, cfg.MODEL.QMIMIC.TEACHER.OPTS, device="cpu"))
        settings["TEACHER"] = {key: value for key, value in teacher.items() if key.startswith(_OF_A_TEACHER)}
    elif file:
        settings["TEACHER"] = file
    return settings


def config_digest(settings: Dict[str, Any], revision: int) -> str:
    """Of :func:`settings_of` and the matrix's revision: 16 hexadecimal digits."""
    text = json.dumps([revision, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _differences(cfg: CfgNode) -> Dict[str, Any]:
    known = _earlier_names(_flat(default_config()))
    absent = object()
    return {
        key: value
        for key, value in sorted(_earlier_names(_flat(cfg)).items())
        if not key.startswith(_WITHOUT_EFFECT) and known.get(key, absent) != value
    }


def _earlier_names(flat: Dict[str, Any]) -> Dict[str, Any]:
    """The keys under the names that they had when the recorded digests were made."""
    flat, node = dict(flat), "MODEL.QMIMIC"
    places = {
        "features": flat.pop(f"{node}.QUANTIZER.ON_BACKBONE"),
        "mimic": flat.pop(f"{node}.MIMIC.QUANTIZE_STUDENT"),
    }
    flat[f"{node}.QUANTIZER.STUDENT_AT"] = [place for place, is_on in places.items() if is_on]
    flat[f"{node}.QUANTIZER.TEACHER_ON"] = flat.pop(f"{node}.MIMIC.QUANTIZE_TEACHER")
    flat[f"{node}.MIMIC.ROI_SOURCE"] = "+".join(flat[f"{node}.MIMIC.ROI_SOURCE"])
    return flat


def _flat(cfg: CfgNode) -> Dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat_keys(cfg).items()}
