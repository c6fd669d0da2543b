"""``mimic.json`` of a run folder: how well teacher and student agree on held-out images."""

from dataclasses import dataclass
from typing import Any, Dict, List

from qmimic_d2.report.numbers import is_number

__all__ = ["Histogram", "HeldOut", "parse_held_out"]


# More than these are no training's, and a page cannot show them.
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


def parse_held_out(content: Any) -> HeldOut:
    """
    Args:
        content: of a ``mimic.json``.

    Raises:
        ValueError: it is of another make; says what is wrong.
    """
    if not isinstance(content, dict) or not isinstance(content.get("levels"), dict):
        raise ValueError("it has no object 'levels'")
    if len(content["levels"]) > _MOST_LEVELS:
        raise ValueError(f"it has {len(content['levels'])} levels; at most {_MOST_LEVELS} are shown")
    figures, histograms = {}, {}
    for name, level in content["levels"].items():
        if not isinstance(level, dict):
            raise ValueError(f"the level {name!r} is no object")
        figures[name] = {key: float(value) for key, value in level.items() if is_number(value)}
        if level.get("code_histogram"):
            histograms[name] = _histogram(name, level["code_histogram"])
    return HeldOut(
        dataset=str(content.get("dataset", "")),
        quantizer=str(content.get("quantizer", "")),
        num_images=_count(content, "num_images"),
        num_rois=_count(content, "num_rois"),
        iteration=_count(content, "iteration"),
        figures=figures,
        histograms=histograms,
    )


def _count(content: Dict[str, Any], key: str) -> int:
    value = content.get(key) or 0
    if not is_number(value) or value < 0:
        raise ValueError(f"{key!r} is no number of 0 or more")
    return int(value)


def _histogram(name: str, content: Any) -> Histogram:
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("codes", "student", "teacher")]
    if not all(isinstance(part, list) and all(map(is_number, part)) for part in parts):
        raise ValueError(f"code_histogram of {name!r} has not the lists codes, student, teacher of numbers")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"the lists of code_histogram of {name!r} differ in length: {[len(part) for part in parts]}")
    if len(parts[0]) > _MOST_CODES or min(map(min, parts[1:]), default=0) < 0:
        raise ValueError(f"code_histogram of {name!r} has more than {_MOST_CODES} codes, or counts below 0")
    return Histogram(*parts)
