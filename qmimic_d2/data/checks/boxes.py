"""Boxes of a data set: four finite numbers, in pixels, with an area, inside of their image."""

import math
from typing import Any, List, Optional, Tuple

from qmimic_d2.data.checks.findings import Findings, Kind

__all__ = ["BoxCheck", "number"]

UNUSABLE = Kind(
    "annotations have a box that is no list of four finite numbers",
    "Write four numbers in pixels, or take the annotation out",
)
UNUSABLE_ROTATED = Kind(
    "annotations have a box with an angle that is no list of five finite numbers",
    "Write x, y of the center, width, height and the angle",
)
NEGATIVE = Kind("boxes have a negative width or height", "Correct the order of the numbers")
NORMALIZED = Kind(
    "boxes are all between 0 and 1, as if divided by the size of the image", "Multiply them: boxes are in pixels"
)
TEXT = Kind("boxes have numbers written as text", "They are read as numbers")
NO_AREA = Kind("boxes have no area", "Training leaves them out")
OUTSIDE = Kind("boxes lie wholly outside of their image", "Training leaves them out")
REACHES_OVER = Kind(
    "boxes reach over the border of their image",
    "Training cuts them off there. If most boxes do, see whether they are corners instead of x, y, width, height",
)

# Rounding of tools, in pixels.
_MARGIN = 1.0
# Rounding of a box divided by the size of its image.
_ONE = 1.001


def number(value: Any) -> Optional[float]:
    """A finite number, also one written as text; else None."""
    if type(value) is float or type(value) is int:  # nearly always
        return float(value) if abs(value) < 1e300 else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        try:  # NumPy's scalars
            value = value.item()
        except (AttributeError, ValueError):
            return None
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


class BoxCheck:
    """Checks the boxes of one data set one after the other; :meth:`finish` tells what only all of them show."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._number = 0
        self._largest = -math.inf
        self._first = ""

    def __call__(
        self,
        box: Any,
        size: Optional[Tuple[float, float]],
        where: str,
        may_be_text: bool = True,
        is_crowd: bool = False,
    ) -> Optional[List[float]]:
        """
        Args:
            box: x, y, width, height.
            size: width and height of the image; None if unknown.
            where: names the annotation.
            may_be_text: numbers may be written as text, which the caller repairs.
            is_crowd: nothing is trained on it, so that only the form counts.

        Returns:
            The box as numbers, or None where it has none.
        """
        numbers = _numbers(box)
        is_text = numbers is not None and any(isinstance(each, str) for each in box)
        if numbers is None or len(numbers) != 4 or (is_text and not may_be_text):
            self._findings.refuse(UNUSABLE, f"{where} has {_short(box)}")
            return None
        if is_text:
            self._findings.repair(TEXT, where)
        if not is_crowd:
            self._look_at(numbers, size, where)
        return numbers

    def rotated(self, box: Any, where: str) -> None:
        """A box with an angle: five finite numbers."""
        numbers = _numbers(box)
        if numbers is None or len(numbers) != 5:
            self._findings.refuse(UNUSABLE_ROTATED, f"{where} has {_short(box)}")

    def _look_at(self, box: List[float], size: Optional[Tuple[float, float]], where: str) -> None:
        x, y, width, height = box
        self._number += 1
        self._largest = max(self._largest, x + width, y + height)
        self._first = self._first or f"{where} has {_short(box)}"
        if width < 0 or height < 0:
            self._findings.refuse(NEGATIVE, f"{where} has {_short(box)}")
        elif width == 0 or height == 0:
            self._findings.note(NO_AREA, f"{where} has {_short(box)}")
        elif size is not None and (x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0):
            self._findings.note(OUTSIDE, f"{where} has {_short(box)} in {size[0]} x {size[1]} pixels")
        elif size is not None and (
            min(x, y) < -_MARGIN or x + width > size[0] + _MARGIN or y + height > size[1] + _MARGIN
        ):
            self._findings.note(REACHES_OVER, f"{where} has {_short(box)} in {size[0]} x {size[1]} pixels")

    def finish(self) -> None:
        """Looks at the boxes together."""
        if 0 < self._largest <= _ONE:
            self._findings.refuse(NORMALIZED, self._first, self._number)


def _numbers(box: Any) -> Optional[List[float]]:
    if isinstance(box, (str, dict)):
        return None
    try:
        numbers = [number(each) for each in box]
    except TypeError:
        return None
    return None if None in numbers else numbers


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
