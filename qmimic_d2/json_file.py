"""Text and JSON files that are there completely or not at all, and are read with one message when they are damaged."""

import json
import math
import os
from typing import Any

from qmimic_d2.whole_file import whole_file

__all__ = ["check_writable", "read_json", "write_json", "write_text"]


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
    What :func:`write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON in UTF-8, is nested too deeply, or has a number that is NaN, infinite or
            beyond a float's range; names the file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file, parse_constant=_finite_number, parse_float=_finite_number, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{path!r} is no JSON file that can be read: {reason}") from error


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is beyond a float's range")
    return number


def _integer(text: str) -> int:
    _finite_number(text)
    return int(text)


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
