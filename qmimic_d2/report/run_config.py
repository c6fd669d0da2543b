"""The configs in a run folder, which somebody else may have written: read as data, with nothing that they name."""

import os
from typing import Any, Dict

from detectron2.config import CfgNode

from qmimic_d2.config import default_config
from qmimic_d2.config_files import changed
from qmimic_d2.modeling.trunk_adapter import without_teacher
from qmimic_d2.run_folder import CONFIG, read_config
from qmimic_d2.yaml.config import BASE_KEY, merge_content

__all__ = ["model_config", "on_cpu", "read_run_config"]


def read_run_config(path: str) -> Dict[str, Any]:
    """
    The config of a run as nested dicts, without the files that its ``_BASE_`` leads to.

    Raises:
        OSError, ValueError: it cannot be read, or is no config.
    """
    content = read_config(*os.path.split(path))
    if not isinstance(content.get("MODEL"), dict):
        raise ValueError("it is no Detectron2 config")
    return content


def model_config(content: Dict[str, Any], weights: str) -> CfgNode:
    """
    The config that builds a run's detector, as :func:`on_cpu` returns it.

    Args:
        content: of ``config.yaml``.

    Raises:
        KeyError, ValueError: this version cannot use it, or it builds on another file.
    """
    if BASE_KEY in content:
        raise ValueError(f"it builds on another file by {BASE_KEY}, which a report does not read")
    cfg = default_config()
    merge_content(cfg, content, CONFIG)
    return on_cpu(cfg, weights)


def on_cpu(cfg: CfgNode, weights: str) -> CfgNode:
    """A frozen copy for the CPU: no teacher, and no weights but the folder's checkpoint ("" = none)."""
    return without_teacher(changed(cfg, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights))
