"""One writer at a time in a folder; the system releases the lock when the process ends, however it does."""

import contextlib
import logging
import os
import socket
from typing import IO, Dict, Iterator, Set

import portalocker

__all__ = ["FolderInUseError", "alone_in", "check_free", "hold_folder"]

logger = logging.getLogger(__name__)

_NAME = ".lock"
# Files of the locks that this process holds until it ends, by real path of the folder; and of all its locks.
_held: Dict[str, IO[str]] = {}
_open_files: Set[IO[str]] = set()


class FolderInUseError(ValueError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """
    Holds the folder's lock while the block runs. A folder from :func:`hold_folder` is not locked again.

    Raises:
        FolderInUseError: another process, or another block of this one, holds it; names the process.
    """
    if os.path.realpath(folder) in _held:
        yield
        return
    file = _locked(folder)
    try:
        yield
    finally:
        _open_files.discard(file)
        file.close()


def check_free(folder: str) -> None:
    """
    Makes no file where there is no lock yet.

    Raises:
        FolderInUseError: another process holds the folder's lock; names the process.
    """
    if os.path.exists(os.path.join(folder, _NAME)):
        with alone_in(folder):
            pass


def hold_folder(folder: str) -> None:
    """
    Takes the folder's lock until this process ends; once more does nothing. The folder is made.

    Raises:
        FolderInUseError: another process holds it; names the process.
    """
    key = os.path.realpath(folder)
    if key not in _held:
        os.makedirs(folder, exist_ok=True)
        _held[key] = _locked(folder)


def _locked(folder: str) -> IO[str]:
    path = os.path.join(folder, _NAME)
    file = open(path, "a+", encoding="utf-8", errors="replace")  # open as long as the lock is held
    try:
        portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.AlreadyLocked as error:
        file.seek(0)
        holder = file.read(200).strip()
        file.close()
        raise FolderInUseError(
            f"another process is at work in {folder}{f' ({holder})' if holder.isprintable() and holder else ''}; wait "
            "for its end, or give another folder"
        ) from error
    except portalocker.LockException as error:
        # Some network file systems have no locks. Without one, a second writer is not found.
        logger.warning("%s cannot be locked (%s): take care that one run alone writes there", folder, error)
    else:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _open_files.add(file)
    return file


def _let_go() -> None:
    """A child that is forked, such as a data-loader worker, would keep the lock after its parent's death."""
    for file in _open_files:
        file.close()
    _open_files.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
