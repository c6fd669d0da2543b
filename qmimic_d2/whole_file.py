"""Files that are there completely or not at all, whatever writes them."""

import contextlib
import os
from typing import Iterator

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """
    Gives the block another name to write under; the file takes its own when the block ends.

    A block that raises, or a process that is killed in it, leaves what stood at ``path`` as it was. The
    other name keeps the ending, by which some writers choose a format, and has the process number, so that
    two processes that write the same file do not write into each other's: the later one's stays.

    Args:
        path: in a folder that exists.

    Yields:
        the name to write under, in the same folder.
    """
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    partial = os.path.join(folder, f".{stem}.{os.getpid()}.part{suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise
