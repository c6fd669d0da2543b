"""The image files of a data set: they are there, they are images, and they have the annotated size."""

import os
from multiprocessing.pool import ThreadPool
from typing import Any, Dict, Iterable, Optional, Tuple

from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.image_file import UnusableImageError, image_size
from qmimic_d2.progress import track

__all__ = ["ImageFiles"]

# Threads wait for slow disks; the work itself is short.
_NUM_THREADS = 4


class ImageFiles:
    """Files of images, of which the header is read once, whoever asks. URIs are left alone."""

    def __init__(self) -> None:
        self._found: Dict[str, Any] = {}  # by path: the size, an error, or None for a URI

    def look_at(self, paths: Iterable[str], title: str = "") -> None:
        """Reads the headers, a few at a time, and shows how far it is under this title."""
        new = list(dict.fromkeys(each for each in paths if each not in self._found))
        with ThreadPool(_NUM_THREADS) as pool:
            found = pool.imap(_look_at, new, chunksize=16)
            self._found.update(zip(new, track(found, title or "image files", len(new))))

    def size(self, path: str) -> Optional[Tuple[int, int]]:
        """Width and height in pixels; None where they cannot be read, which :meth:`check` reports."""
        if path not in self._found:
            self._found[path] = _look_at(path)
        found = self._found[path]
        return None if isinstance(found, Exception) else found

    def check(self, path: str, size: Optional[Tuple[int, int]], findings: Findings) -> None:
        """Reports what is wrong with a file that was looked at; ``size`` is annotated, None for no claim."""
        found = self._found.get(path)
        if isinstance(found, FileNotFoundError):
            with_slashes = path.replace("\\", "/")
            if with_slashes == path:
                fix = "Correct file_name or the folder of the images, or take the images out of the data set"
                findings.refuse("image files are not there", fix, repr(path))
            else:
                what = "file names have backslashes, which only Windows takes for folders"
                is_there = "is" if os.path.exists(with_slashes) else "would be"
                findings.refuse(what, "Write / instead of \\", f"{path}, which {is_there} {with_slashes}")
        elif isinstance(found, Exception):
            fix = "Replace them, or take them out of the data set"
            findings.refuse("files are no images that can be read", fix, f"{path!r} ({found})")
        elif None not in (found, size) and found != size:
            findings.refuse(
                "images have another size than is annotated",
                "Annotate the image as it is turned by its EXIF data, or correct width and height",
                f"{path!r} is {found[0]} x {found[1]} pixels, annotated as {size[0]} x {size[1]}",
            )


def _look_at(path: str) -> Any:
    if "://" in path:
        return None
    if not os.path.exists(path):
        return FileNotFoundError(path)
    if not os.path.isfile(path):  # a pipe would be waited for
        return UnusableImageError("it is no file")
    try:
        return image_size(path)
    except UnusableImageError as error:
        return error
