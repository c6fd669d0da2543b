"""The configs in a run folder, which somebody else may have written: read as data, with nothing that they name."""

import os
from typing import Any, Dict, List

from detectron2.config import CfgNode, get_cfg

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.trunk_adapter import without_teacher
from qmimic_d2.run_folder import CONFIG, read_config
from qmimic_d2.yaml.config import BASE_KEY, merge_content

__all__ = ["model_config", "on_cpu", "read_run_config", "read_teacher_config", "setting", "texts"]


def read_run_config(folder: str, name: str = CONFIG) -> Dict[str, Any]:
    """
    The config of a run as nested dicts, without the files that its ``_BASE_`` would lead to.

    Raises:
        OSError, ValueError: it cannot be read, or is no config.
    """
    content = read_config(folder, name)
    if not isinstance(content.get("MODEL"), dict):
        raise ValueError("it is no Detectron2 config")
    return content


def read_teacher_config(folder: str, config_file: str) -> Dict[str, Any]:
    """The same of the teacher's YAML, which a training copies into the folder; no other place is looked at."""
    return read_run_config(folder, os.path.basename(config_file))


def model_config(content: Dict[str, Any], weights: str) -> CfgNode:
    """
    The config for building a run's detector on the CPU: no teacher, and no weights but those of the folder.

    Args:
        content: of ``config.yaml``.
        weights: path of the folder's checkpoint, or "".

    Raises:
        KeyError, ValueError: this version cannot use it, or it builds on another file.
    """
    if BASE_KEY in content:
        raise ValueError(f"it builds on another file by {BASE_KEY}, which a report does not read")
    cfg = get_cfg()
    add_qmimic_config(cfg)
    merge_content(cfg, content, CONFIG)
    return on_cpu(cfg, weights)


def on_cpu(cfg: CfgNode, weights: str) -> CfgNode:
    """A frozen copy of a config as :func:`model_config` returns it."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = weights
    return without_teacher(cfg)


def setting(content: Dict[str, Any], key: str) -> Any:
    """The value of a key such as "SOLVER.MAX_ITER"; None where there is none."""
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def texts(value: Any) -> List[str]:
    """The texts of a list of names; [] for anything else."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, (list, tuple)) else []
