"""Whether a run can write what it will write into its output folder."""

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["check_output_dir"]

# Files that a run appends to or replaces, and folders that it makes.
_FILES = (
    *("config.yaml", "teacher_config.yaml", "log.txt", "metrics.json", "evaluation.json", "mimic.json"),
    *("last_checkpoint", "model_final.pth", "model_best.pth"),
)
_FOLDERS = ("inference",)

# As long as the longest name that a run gives to a file, events.out.tfevents.<time>.<host>.<process>.<number>.
_LONGEST_NAME = 120


def check_output_dir(output_dir: str) -> None:
    """
    Raises where OUTPUT_DIR cannot be made or written to. It writes a file there and removes it again.

    A folder that is not there yet is tried under a temporary name in the nearest one that is.

    Raises:
        ValueError: names OUTPUT_DIR, the reason and the fix.
    """
    if not output_dir.strip():
        raise ValueError(f"OUTPUT_DIR is {output_dir!r}; name a folder to write to")
    if not output_dir.isprintable():
        raise ValueError(
            f"OUTPUT_DIR is {output_dir!r}, which holds characters that no terminal shows, such as a null or an "
            "escape; leave them out"
        )
    if "://" in output_dir:
        raise ValueError(f"OUTPUT_DIR is {output_dir!r}, which is an address; name a folder of this machine")
    try:
        _try_to_write(Path(os.path.abspath(output_dir)))
        _check_entries(Path(output_dir))
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = getattr(error, "filename", None)
        place = f" ({name})" if name and not os.path.basename(str(name)).startswith(_PREFIX) else ""
        raise ValueError(
            f"OUTPUT_DIR is {output_dir!r}, and a run cannot write there: {reason}{place}. Name a "
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
    for name in (*_FILES, *_FOLDERS):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "it is a link that leads nowhere", str(path))
        is_right = stat.S_ISDIR if name in _FOLDERS else stat.S_ISREG
        if not is_right(path.stat().st_mode):
            kind = "a folder" if name in _FOLDERS else "a file"
            raise FileExistsError(errno.EEXIST, f"a run needs the name for {kind} of its own", str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
