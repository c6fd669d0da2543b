"""Files that are there completely or not at all, whatever writes them."""

import contextlib
import os
import re
import secrets
from typing import Iterator

__all__ = ["remove_leftovers", "whole_file"]

# ".partial" is how earlier versions named a checkpoint that was being written.
_LEFTOVER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part(\.\w+)?|.+\.pth\.partial|last_checkpoint\.partial")


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
