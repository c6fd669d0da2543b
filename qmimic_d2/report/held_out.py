"""``mimic.json`` of a run folder: how well teacher and student agree on held-out images."""

from dataclasses import dataclass
from typing import Any, Dict, List

from qmimic_d2.files import read_json
from qmimic_d2.report.metrics import is_number

__all__ = ["Histogram", "HeldOut", "finite_figures", "read_held_out"]

# No training has more, and a page cannot show more.
_MOST_LEVELS = 64
_MOST_CODES = 65_536


@dataclass
class Histogram:
    """
    How often each code occurs.

    Attributes:
        codes: the dictionary's values, rising.
        student, teacher: counts, one per code.
    """

    codes: List[float]
    student: List[float]
    teacher: List[float]


@dataclass
class HeldOut:
    """
    The last held-out measurement of a run.

    Attributes:
        dataset, quantizer: names, as the file has them.
        num_images, num_rois, iteration: of the measurement.
        figures: by the student's map, then by name ("match_ratio" and so on).
        histograms: by the student's map.
    """

    dataset: str
    quantizer: str
    num_images: int
    num_rois: int
    iteration: int
    figures: Dict[str, Dict[str, float]]
    histograms: Dict[str, Histogram]


def read_held_out(path: str) -> HeldOut:
    """
    Raises:
        OSError, ValueError: the file cannot be read, or is of another make; says what is wrong.
    """
    content = read_json(path)
    levels = content.get("levels") if isinstance(content, dict) else None
    if not isinstance(levels, dict):
        raise ValueError("it has no object 'levels'")
    if len(levels) > _MOST_LEVELS:
        raise ValueError(f"it has {len(levels)} levels; at most {_MOST_LEVELS} are shown")
    for name, level in levels.items():
        if not isinstance(level, dict):
            raise ValueError(f"the level {name!r} is no object")
    counts = {key: content.get(key) or 0 for key in ("num_images", "num_rois", "iteration")}
    for key, value in counts.items():
        if not is_number(value) or value < 0:
            raise ValueError(f"{key!r} is no number of 0 or more")
    return HeldOut(
        dataset=str(content.get("dataset", "")),
        quantizer=str(content.get("quantizer", "")),
        **{key: int(value) for key, value in counts.items()},
        figures={name: finite_figures(level) for name, level in levels.items()},
        histograms={
            name: _histogram(name, level["code_histogram"])
            for name, level in levels.items()
            if level.get("code_histogram")
        },
    )


def finite_figures(content: Dict[str, Any]) -> Dict[str, float]:
    """Those of a dict that are numbers."""
    return {str(key): float(value) for key, value in content.items() if is_number(value)}


def _histogram(name: str, content: Any) -> Histogram:
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("codes", "student", "teacher")]
    if not all(isinstance(part, list) and all(map(is_number, part)) for part in parts):
        raise ValueError(f"code_histogram of {name!r} has not the lists codes, student, teacher of numbers")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"the lists of code_histogram of {name!r} differ in length: {[len(part) for part in parts]}")
    if len(parts[0]) > _MOST_CODES or min(map(min, parts[1:]), default=0) < 0:
        raise ValueError(f"code_histogram of {name!r} has more than {_MOST_CODES} codes, or counts below 0")
    return Histogram(*parts)
