"""Whether a run can write what it will write into its output folder."""

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlparse

from qmimic_d2.folder_lock import check_free
from qmimic_d2.run_folder import FILES, INFERENCE, is_local

__all__ = ["check_output_dir"]

# As long as the longest name that a run gives to a file, events.out.tfevents.<time>.<host>.<process>.<number>.
_LONGEST_NAME = 120


def check_output_dir(output_dir: str) -> None:
    """
    Raises where OUTPUT_DIR cannot be made or written to. It writes a file there and removes it again.

    A folder that is not there yet is tried under a temporary name in the nearest one that is.

    Raises:
        ValueError: names OUTPUT_DIR, the reason and the fix. A checkpoint in a folder with such a name could not be
            found again, or the folder takes no files.
        FolderInUseError: another process writes there; names it.
    """
    if not output_dir.strip():
        raise ValueError(f"OUTPUT_DIR is {output_dir!r}; name a folder to write to")
    if not is_local(output_dir):
        raise ValueError(f"OUTPUT_DIR is {output_dir!r}, which is an address; name a folder of this machine")
    odd = sorted({each for each in output_dir if not each.isprintable() or each in "?#"})
    # Detectron2 reads a checkpoint's path as an address, in which these mean something else or are dropped.
    if odd or urlparse(output_dir).geturl() != output_dir:
        raise ValueError(
            f"OUTPUT_DIR is {output_dir!r}, in which {odd or 'a part'} would be read as that of an address; choose a "
            "name of letters, digits, '-', '_' and '.'"
        )
    try:
        check_free(output_dir)
        _try_to_write(Path(os.path.abspath(output_dir)))
        _check_entries(Path(output_dir))
    except OSError as error:
        name = str(error.filename or "")
        place = f" ({name})" if name and not os.path.basename(name).startswith(_PREFIX) else ""
        raise ValueError(
            f"OUTPUT_DIR is {output_dir!r}, and a run cannot write there: {error.strerror or error}{place}. Name a "
            "folder that you may write to"
        ) from error


_PREFIX = ".qmimic_d2-"


def _try_to_write(path: Path) -> None:
    missing = []
    while not os.path.lexists(path):
        missing.insert(0, path.name)
        path = path.parent
    if not path.is_dir():
        reason = "it is a link that leads nowhere" if path.is_symlink() and not path.exists() else "it is no folder"
        raise NotADirectoryError(errno.ENOTDIR, reason, str(path))
    before = path.stat()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
    try:
        inner = folder.joinpath(*missing)
        inner.mkdir(parents=True, exist_ok=True)
        (inner / ("x" * _LONGEST_NAME)).write_bytes(b"\0" * 4096)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _check_entries(folder: Path) -> None:
    for name in (*FILES, INFERENCE):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "it is a link that leads nowhere", str(path))
        is_right, kind = (stat.S_ISDIR, "a folder") if name == INFERENCE else (stat.S_ISREG, "a file")
        if not is_right(path.stat().st_mode):
            raise FileExistsError(errno.EEXIST, f"a run needs the name for {kind} of its own", str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
