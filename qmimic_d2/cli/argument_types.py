"""Types of command-line arguments that several sub-commands take."""

import argparse
import math
from typing import Tuple

__all__ = [
    "count",
    "image_size",
    "non_negative",
    "positive",
    "positive_number",
    "score",
    "side",
    "threads",
    "threads_or_default",
]

_LONGEST_SIDE = 65536
_MOST_THREADS = 1024


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _whole(text, 1)


def side(text: str) -> int:
    """A side of an image in pixels, 1 or more."""
    return _whole(text, 1, _LONGEST_SIDE)


def threads(text: str) -> int:
    """A number of threads, 1 or more."""
    return _whole(text, 1, _MOST_THREADS)


def threads_or_default(text: str) -> int:
    """A number of threads; 0 leaves the choice to the library."""
    return _whole(text, 0, _MOST_THREADS)


def image_size(text: str) -> Tuple[int, int]:
    """Height and width, from such as "480x640"."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give height and width such as 480x640")
    return side(height), side(width)


def score(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no score; give a number from 0 to 1")
    return value


def non_negative(text: str) -> float:
    """A finite number, 0 or more."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a finite number, 0 or more")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0.0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a finite number above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str, least: int, most: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is no number of {bounds}; give a whole one")
    return value
