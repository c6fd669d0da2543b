"""Types of command-line arguments that several sub-commands take."""

import argparse
import math
from typing import Any, Callable, Tuple

__all__ = [
    "count",
    "image_size",
    "non_negative",
    "num_codes",
    "positive",
    "positive_number",
    "score",
    "side",
    "threads",
    "threads_or_default",
]


def _number(kind: type, is_valid: Callable[[float], bool], wanted: str) -> Callable[[str], Any]:
    """A type for argparse: ``kind`` of the text, where it is valid. NaN stands for a text that is no such number."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r}: give {wanted}")
        return value

    return convert


count = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
positive = _number(int, lambda value: value >= 1, "a whole number, 1 or more")
# A side of an image in pixels.
side = _number(int, lambda value: 1 <= value <= 65536, "a whole number from 1 to 65536")
threads = _number(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")
# 0 leaves the number of threads to the library.
threads_or_default = _number(int, lambda value: 0 <= value <= 1024, "a whole number from 0 to 1024")
# Size of a dictionary.
num_codes = _number(int, lambda value: value == 0 or value >= 2, "2 or more, zero included, or 0 for an unbounded one")
score = _number(float, lambda value: 0.0 <= value <= 1.0, "a number from 0 to 1")
non_negative = _number(float, lambda value: 0.0 <= value < math.inf, "a finite number, 0 or more")
positive_number = _number(float, lambda value: 0.0 < value < math.inf, "a finite number above 0")


def image_size(text: str) -> Tuple[int, int]:
    """Height and width, from such as "480x640"."""
    height, _, width = text.lower().partition("x")
    try:
        return side(height), side(width)
    except argparse.ArgumentTypeError:
        message = f"{text!r} is no size; give height and width such as 480x640, each at most 65536"
        raise argparse.ArgumentTypeError(message) from None
