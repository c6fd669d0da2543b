"""Files that are there completely or not at all, whatever writes them; text and JSON among them."""

import contextlib
import json
import math
import os
import re
import secrets
import tempfile
from typing import Any, Iterator, Optional

__all__ = [
    *("check_is_file", "check_output_folder", "check_writable", "parse_json", "read_json", "remove_leftovers"),
    *("whole_file", "write_json", "write_text"),
]

# ".partial" is how earlier versions named a checkpoint that was being written.
_LEFTOVER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part(\.\w+)?|.+\.pth\.partial|last_checkpoint\.partial")
# Digits of an integer that a float can hold.
_MOST_DIGITS = 300


@contextlib.contextmanager
def whole_file(path: str, *, keeps_ending: bool = True) -> Iterator[str]:
    """
    Gives the block another name to write under; the file takes its own when the block ends.

    A block that raises, or a process that is killed in it, leaves what stood at ``path`` as it was. The content is
    on the disk before the file takes its name, and the name is before this function returns, so that a power cut
    leaves either file whole. The other name is hidden and unique, so that two writers of the same file do not write
    into each other's: the later one's stays. What a killed writer leaves is harmless; see :func:`remove_leftovers`.

    Args:
        path: in a folder that exists.
        keeps_ending: the other name has the ending of ``path``, by which some writers choose a format. Without it,
            a leftover cannot be taken for a file of the format.

    Yields:
        the name to write under, in the same folder.
    """
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    unique = f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.part"
    partial = os.path.join(folder, unique + suffix if keeps_ending else unique)
    try:
        yield partial
        _flush(partial, os.O_RDWR)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise
    with contextlib.suppress(OSError):  # not every system can flush a folder
        _flush(folder or os.curdir, os.O_RDONLY)


def remove_leftovers(folder: str) -> None:
    """Removes what killed writers left in a folder in which nobody else writes."""
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _flush(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def check_output_folder(folder: str) -> None:
    """
    Makes a folder, and sees that files can be made in it.

    Raises:
        OSError: that is not so; names the folder.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--output is {folder!r}, where nothing can be written: {error}") from error


def check_is_file(path: str, kind: str) -> None:
    """
    Raises:
        FileNotFoundError: there is no such file, or it is a folder, a pipe or a device.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the {kind} file {path!r} {'is no ordinary file' if os.path.lexists(path) else 'is not there'}"
        )


def read_json(path: str) -> Any:
    """
    The content of a JSON file, by :func:`parse_json`.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, a pipe or a device.
        OSError: it cannot be opened.
        ValueError: it is no JSON in UTF-8, or nested too deeply; names the file.
    """
    check_is_file(path, "JSON")
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
        return json.loads(text, parse_constant=lambda text: None, parse_float=_finite_float, parse_int=_bounded_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
