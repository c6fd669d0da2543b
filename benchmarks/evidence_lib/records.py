"""What is kept of a run: a small JSON file, ``runs/<variant>/<seed>.json``."""

import json
import math
import os
import subprocess
from typing import Any, Dict, List, Optional

import numpy as np

import qmimic_d2
from package_versions import package_versions
from qmimic_d2.checkpoint import weights_digest
from qmimic_d2.checkpoint.reader import read_checkpoint
from qmimic_d2.files import write_json
from qmimic_d2.run_folder import DETECTIONS, EVALUATION, METRICS, MIMIC, read_evaluation

__all__ = ["Record", "Records", "digest_of_weights", "figures_of_run", "versions"]

Record = Dict[str, Any]

DONE, FAILED = "done", "failed"
# Measurements behind the figures "early" and "late" of a training scalar.
_FEW = 10
_DIGITS = 6
_PREFIX = "qmimic/"


class Records:
    """
    The records below a folder.

    Args:
        folder: holds ``runs/``; need not be there yet.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def path(self, variant: str, seed: int) -> str:
        return os.path.join(self.folder, "runs", variant, f"{seed}.json")

    def read(self, variant: str, seed: int) -> Optional[Record]:
        """
        The record of a run; None where there is none.

        Raises:
            ValueError: the file is no record; names it.
        """
        path = self.path(variant, seed)
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as file:
            try:
                record = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is no JSON ({error}); remove it, and the run counts as open") from error
        if not isinstance(record, dict) or record.get("status") not in (DONE, FAILED):
            raise ValueError(f"{path} is no record of a run; remove it, and the run counts as open")
        return record

    def write(self, record: Record) -> None:
        path = self.path(record["variant"], record["seed"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_json(path, record)


def figures_of_run(folder: str) -> Dict[str, Any]:
    """
    What a run folder of ``train_net.py`` says: accuracy and the mimic's measurements.

    Returns:
        "AP", "AP50" and "AP75", in per cent; "per_class": AP by class; "measures": by name without ``qmimic/``,
        each with "early", the mean of the first ten, "late", of the last ten, "last" and "mean". What is measured
        on held-out images (``mimic.json``) is called ``heldout_<name>``, followed by the level where there are
        several. A model that detects nothing, for which Detectron2's evaluator gives no AP, has 0: leaving it out
        would flatter its variant.

    Raises:
        FileNotFoundError, ValueError, KeyError: there is no evaluation, or one without boxes.
    """
    boxes = read_evaluation(folder)["bbox"]
    if boxes["AP"] is None:
        if not _detected_nothing(folder):
            raise ValueError(f"{folder}/{EVALUATION} has no AP; the data set has no annotations")
        boxes = dict.fromkeys(boxes, 0.0)
    measures = _scalars(os.path.join(folder, METRICS))
    measures.update(_heldout(os.path.join(folder, MIMIC)))
    return {
        **{name: _rounded(boxes[name]) for name in ("AP", "AP50", "AP75")},
        "per_class": {
            name[len("AP-") :]: _rounded(value) for name, value in boxes.items() if name.startswith("AP-")
        },
        "measures": measures,
    }


def _detected_nothing(folder: str) -> bool:
    path = os.path.join(folder, DETECTIONS)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file) == []


def digest_of_weights(path: str) -> str:
    """Of a checkpoint's model: equal for equal weights, whatever else the file holds."""
    return weights_digest(read_checkpoint(path))


def versions() -> Dict[str, str]:
    """What computed a run."""
    return {**package_versions(), "commit": _commit()}


def _scalars(path: str) -> Dict[str, Dict[str, float]]:
    rows: Dict[int, Dict[str, float]] = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                row = json.loads(line)
                # a resumed training writes some iterations again; the later line counts
                rows.setdefault(row.get("iteration", -1), {}).update(row)
    values: Dict[str, List[float]] = {}
    for _, row in sorted(rows.items()):
        for name, value in row.items():
            if name.startswith(_PREFIX) and value is not None and math.isfinite(value):
                values.setdefault(name[len(_PREFIX) :], []).append(value)
    return {
        name: {
            "early": _rounded(float(np.mean(series[:_FEW]))),
            "late": _rounded(float(np.mean(series[-_FEW:]))),
            "last": _rounded(series[-1]),
            "mean": _rounded(float(np.mean(series))),
        }
        for name, series in sorted(values.items())
    }


def _heldout(path: str) -> Dict[str, Dict[str, float]]:
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        levels = json.load(file)["levels"]
    measures = {}
    for level, scalars in levels.items():
        for name, value in scalars.items():
            if isinstance(value, (int, float)):
                suffix = f"_{level}" if len(levels) > 1 else ""
                measures[f"heldout_{name}{suffix}"] = dict.fromkeys(("early", "late", "last", "mean"), _rounded(value))
    return measures


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def _commit() -> str:
    """Of the checkout this code stands in, with "-dirty" where it was changed; "" outside of one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(qmimic_d2.__file__)))
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
