"""
The layout of a run folder, which is OUTPUT_DIR of ``train_net.py``: names of its files, reading and writing of them.

It stands on the ground, since the checkpointer asks it too.
"""

import os
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence

from qmimic_d2.files import parse_json, read_json, write_json, write_text
from qmimic_d2.yaml.file import read_yaml

__all__ = [
    "CONFIG",
    "DETECTIONS",
    "EVALUATION",
    "FILES",
    "FINAL_CHECKPOINT",
    "INFERENCE",
    "METRICS",
    "MIMIC",
    "TAG",
    "TEACHER_CONFIG",
    "TRACKERS",
    "has_metric",
    "is_local",
    "is_run",
    "last_checkpoint",
    "read_config",
    "read_evaluation",
    "read_metrics_rows",
    "read_tracked_run",
    "write_configs",
    "write_evaluation",
    "write_mimic",
    "write_tracked_run",
]

CONFIG = "config.yaml"
TEACHER_CONFIG = "teacher_config.yaml"
METRICS = "metrics.json"
EVALUATION = "evaluation.json"
MIMIC = "mimic.json"
# Ids of the runs of W&B and MLflow that --resume continues.
TRACKERS = "trackers.json"
# Holds the name of the checkpoint that --resume goes on from.
TAG = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
# Folder of what evaluators write, and the detections of a COCO evaluation in it.
INFERENCE = "inference"
DETECTIONS = os.path.join(INFERENCE, "coco_instances_results.json")

# Files that a run appends to or replaces.
FILES = (
    *(CONFIG, TEACHER_CONFIG, "log.txt", METRICS, EVALUATION, MIMIC, TRACKERS, TAG),
    *(FINAL_CHECKPOINT, "model_best.pth"),
)

# A folder with none of these is no run.
_SIGNS = (CONFIG, METRICS, EVALUATION)

# Characters of a line of metrics.json and of a tag, and the iteration that a training can have.
_LONGEST_LINE = 1_000_000
# Bytes at the end of a file in which its last row is looked for.
_TAIL = 65_536
_LONGEST_TAG = 4096
_LAST_ITERATION = 10**12


def is_local(folder: str) -> bool:
    """Whether OUTPUT_DIR is a folder of this machine: neither empty nor an address."""
    return bool(folder) and "://" not in folder


def is_run(folder: str) -> bool:
    """Whether a folder holds the config or a figure of a run."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _SIGNS)


def last_checkpoint(folder: str) -> str:
    """Path of the final checkpoint, else of the one that the tag names; "" where neither is there."""
    names = [FINAL_CHECKPOINT]
    tag = os.path.join(folder, TAG)
    if os.path.isfile(tag):
        with open(tag, encoding="utf-8", errors="replace") as file:
            names.append(os.path.basename(file.read(_LONGEST_TAG).strip()))
    paths = [os.path.join(folder, name) for name in names if name]
    return next((path for path in paths if os.path.isfile(path)), "")


def write_configs(folder: str, config: str, teacher: str = "") -> None:
    """
    Writes the YAML of a run, after that of its teacher.

    Args:
        teacher: "" for none of its own.
    """
    if teacher:
        write_text(os.path.join(folder, TEACHER_CONFIG), teacher)
    write_text(os.path.join(folder, CONFIG), config)


def read_config(folder: str, name: str = CONFIG) -> Dict[str, Any]:
    """
    A config as nested dicts, without the files that its ``_BASE_`` would lead to.

    Raises:
        OSError, ValueError: it cannot be read, or is no config.
    """
    content = read_yaml(os.path.join(folder, name))
    if not isinstance(content, dict):
        raise ValueError("it is no Detectron2 config")
    return content


def write_evaluation(folder: str, datasets: Sequence[str], results: Mapping[str, Any]) -> None:
    """Writes the figures of the test sets, as Detectron2's ``DefaultTrainer.test`` gives them."""
    write_json(os.path.join(folder, EVALUATION), {"datasets": list(datasets), "results": results})


def read_evaluation(folder: str) -> Dict[str, Any]:
    """
    The results that :func:`write_evaluation` wrote; {} for content of another make.

    Raises:
        OSError, ValueError: as :func:`qmimic_d2.files.read_json`.
    """
    content = read_json(os.path.join(folder, EVALUATION))
    results = content.get("results") if isinstance(content, dict) else None
    return results if isinstance(results, dict) else {}


def write_mimic(folder: str, content: Mapping[str, Any]) -> None:
    """Writes the comparison of student and teacher on held-out images."""
    write_json(os.path.join(folder, MIMIC), content)


def write_tracked_run(folder: str, package: str, destination: str, run_id: str) -> None:
    """Writes the id of a tracker's run; those of other trackers stay."""
    write_json(os.path.join(folder, TRACKERS), {**_tracked(folder), package: [destination, run_id]})


def read_tracked_run(folder: str, package: str, destination: str) -> str:
    """The id of a tracker's run; "" where there is none of this destination."""
    entry = _tracked(folder).get(package)
    is_it = isinstance(entry, list) and len(entry) == 2 and entry[0] == destination
    return str(entry[1]) if is_it else ""


def _tracked(folder: str) -> Dict[str, Any]:
    try:
        content = read_json(os.path.join(folder, TRACKERS))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics_rows(path: str) -> Iterator[Optional[Dict[str, Any]]]:
    """
    The rows of a ``metrics.json``, one a line; None for a line that is no row.

    A last line without its end is passed over: it is being written, or a kill cut it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(_LONGEST_LINE), ""):
            row = _row(line)
            if row is not None or (line.strip() and (line.endswith("\n") or len(line) == _LONGEST_LINE)):
                yield row


def last_metrics_row(path: str) -> Optional[Dict[str, Any]]:
    """
    The last whole row of a ``metrics.json`` that a training may be writing; None where it has none, or is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        tail = file.read()
    last_whole_line = tail.rpartition(b"\n")[0].rpartition(b"\n")[2]
    return _row(last_whole_line.decode(errors="replace"))


def has_metric(folder: str, iteration: int, key: str) -> bool:
    """Whether ``metrics.json`` has a figure of an iteration."""
    path = os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        return False
    return any(row is not None and row["iteration"] == iteration and key in row for row in read_metrics_rows(path))


def _row(line: str) -> Optional[Dict[str, Any]]:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    iteration = row.get("iteration") if isinstance(row, dict) else None
    return row if type(iteration) is int and 0 <= iteration <= _LAST_ITERATION else None
