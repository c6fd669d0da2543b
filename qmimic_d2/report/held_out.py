"""``mimic.json`` of a run folder: how well teacher and student agree on held-out images."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List

__all__ = ["Histogram", "HeldOut", "parse_held_out"]


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
    figures, histograms = {}, {}
    for name, level in content["levels"].items():
        if not isinstance(level, dict):
            raise ValueError(f"the level {name!r} is no object")
        figures[name] = {key: float(value) for key, value in level.items() if _is_number(value)}
        if level.get("code_histogram"):
            histograms[name] = _histogram(name, level["code_histogram"])
    return HeldOut(
        dataset=str(content.get("dataset", "")),
        quantizer=str(content.get("quantizer", "")),
        num_images=int(content.get("num_images") or 0),
        num_rois=int(content.get("num_rois") or 0),
        iteration=int(content.get("iteration") or 0),
        figures=figures,
        histograms=histograms,
    )


def _histogram(name: str, content: Any) -> Histogram:
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("codes", "student", "teacher")]
    if not all(isinstance(part, list) and all(map(_is_number, part)) for part in parts):
        raise ValueError(f"code_histogram of {name!r} has not the lists codes, student, teacher of numbers")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"the lists of code_histogram of {name!r} differ in length: {[len(part) for part in parts]}")
    return Histogram(*parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
