"""Which values of a run's files are numbers that a page can show."""

from typing import Any

__all__ = ["is_number"]

# Beyond it, sums and the margins of a plot leave the range of a float.
_LARGEST = 1e100


def is_number(value: Any) -> bool:
    """Whether it is an int or float, finite, no boolean, and at most 1e100 in size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
