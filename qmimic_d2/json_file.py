"""Text and JSON files: written completely or not at all, and read whatever is in them."""

import json
import math
import os
from typing import Any, Optional

from qmimic_d2.whole_file import whole_file

__all__ = ["check_writable", "parse_json", "read_json", "write_json", "write_text"]

# Digits of an integer that a float can hold.
_MOST_DIGITS = 300


def check_writable(path: str, flag: str) -> None:
    """
    Makes the folder of a file that is written at the end of a long job.

    Raises:
        ValueError: the path is a folder.
        OSError: its folder cannot be made.
    """
    if os.path.isdir(path):
        raise ValueError(f"{flag} is {path!r}, which is a folder; give a file")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def read_json(path: str) -> Any:
    """
    The content of a JSON file, by :func:`parse_json`.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, a pipe or a device.
        OSError: it cannot be opened.
        ValueError: it is no JSON in UTF-8, or nested too deeply; names the file.
    """
    if not os.path.isfile(path):
        kind = "is no ordinary file" if os.path.lexists(path) else "is not there"
        raise FileNotFoundError(f"the JSON file {path!r} {kind}")
    try:
        with open(path, encoding="utf-8") as file:
            return parse_json(file.read())
    except ValueError as error:
        raise ValueError(f"{path!r} cannot be read as JSON: {error}") from error


def parse_json(text: str) -> Any:
    """
    As ``json.loads``. NaN, infinity, 1e309 and what else no float can hold become None, as :func:`write_json` writes
    them; so every number that is returned is finite and fits a float.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite_float, parse_int=_bounded_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_number(text: str) -> None:
    return None


def _finite_float(text: str) -> Optional[float]:
    value = float(text)
    return value if math.isfinite(value) else None


def _bounded_int(text: str) -> Optional[int]:
    return int(text) if len(text) <= _MOST_DIGITS else None


def write_json(path: str, content: Any) -> None:
    """As :func:`write_text`. NaN and infinity, which JSON has not, become null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes UTF-8, by :func:`whole_file`."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
