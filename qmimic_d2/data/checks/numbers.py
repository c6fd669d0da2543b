"""Numbers of a data set, which may be anything that JSON, a text or a user's function can hold."""

from typing import Any, List, Optional, Tuple

__all__ = ["number", "numbers", "whole_size"]

_PLAIN = {float, int}


def number(value: Any, of_text: bool = False) -> Optional[float]:
    """A finite number, NumPy's scalars and with ``of_text`` texts among them; else None."""
    if type(value) is float or type(value) is int:  # nearly always
        return float(value) if abs(value) < 1e300 else None
    try:
        if isinstance(value, str):
            return number(float(value)) if of_text else None
        value = value.item()
    except (AttributeError, ValueError, RuntimeError):
        return None
    return number(value) if type(value) in (float, int) else None


def numbers(values: Any, of_text: bool = False) -> Optional[List[float]]:
    """Those of a list or an array; None where one of them is no :func:`number`."""
    if isinstance(values, (str, dict)):
        return None
    try:
        if type(values) is list and _PLAIN.issuperset(map(type, values)) and abs(sum(values)) < 1e300:  # nearly always
            return values
        found = [number(each, of_text) for each in values]
    except TypeError:
        return None
    return None if None in found else found


def whole_size(width: Any, height: Any, of_text: bool = False) -> Optional[Tuple[int, int]]:
    """Width and height in pixels; None where they are no whole numbers from 1."""
    found = numbers((width, height), of_text)
    if found is None or not all(each > 0 and each.is_integer() for each in found):
        return None
    return int(found[0]), int(found[1])
