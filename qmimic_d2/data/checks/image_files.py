"""The image files of a data set: they are there, they are images, and they have the annotated size."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, Iterable, NamedTuple, Optional, Tuple

from tqdm import tqdm

from qmimic_d2.data.checks.findings import Findings, Kind
from qmimic_d2.image_file import UnusableImageError, image_size

__all__ = ["ImageFile", "check_image_files", "header_size"]

MISSING = Kind(
    "image files are not there", "Correct file_name or the folder of the images, or take the images out of the data set"
)
BACKSLASH = Kind("file names have backslashes, which only Windows takes for folders", "Write / instead of \\")
UNUSABLE = Kind("files are no images that can be read", "Replace them, or take them out of the data set")
ANOTHER_SIZE = Kind(
    "images have another size than is annotated",
    "Annotate the image as it is turned by its EXIF data, or correct width and height",
)

# Threads wait for slow disks; the work itself is short.
_NUM_THREADS = 4
# A check that takes longer shows how far it is.
_SECONDS_UNTIL_PROGRESS = 3.0


class ImageFile(NamedTuple):
    """
    An image as a data set describes it.

    Attributes:
        path: a URI is left alone.
        size: annotated width and height in pixels; None for no claim.
    """

    path: str
    size: Optional[Tuple[int, int]]


def check_image_files(
    images: Iterable[ImageFile], findings: Findings, known: Dict[str, object], title: str = ""
) -> None:
    """
    Reads the header of every file, a few at a time, with a progress bar where that takes long.

    Args:
        images: of one data set.
        findings: takes the problems.
        known: by path, size or error of the files that were looked at; filled here, so that a second data set of
            the same files costs nothing.
        title: of the progress bar.
    """
    images = list(images)
    new = list(dict.fromkeys(each.path for each in images if each.path not in known and "://" not in each.path))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        progress = tqdm(
            pool.map(_look_at, new), title, len(new), leave=False, disable=None, delay=_SECONDS_UNTIL_PROGRESS
        )
        known.update(zip(new, progress))
    for image in images:
        found = known.get(image.path)
        if found is None:
            continue
        if isinstance(found, FileNotFoundError):
            _refuse_missing(image.path, findings)
        elif isinstance(found, Exception):
            findings.refuse(UNUSABLE, f"{image.path!r} ({found})")
        elif image.size is not None and found != image.size:
            findings.refuse(
                ANOTHER_SIZE,
                f"{image.path!r} is {found[0]} x {found[1]} pixels, annotated as {image.size[0]} x {image.size[1]}",
            )


def header_size(path: str) -> Optional[Tuple[int, int]]:
    """Width and height of an image; None where they cannot be read, which :func:`check_image_files` reports."""
    found = _look_at(path)
    return None if isinstance(found, Exception) else found


def _look_at(path: str) -> object:
    if not os.path.exists(path):
        return FileNotFoundError(path)
    if not os.path.isfile(path):  # a pipe would be waited for
        return UnusableImageError("it is no file")
    try:
        return image_size(path)
    except UnusableImageError as error:
        return error


def _refuse_missing(path: str, findings: Findings) -> None:
    if "\\" not in path:
        findings.refuse(MISSING, repr(path))
        return
    with_slashes = path.replace("\\", "/")
    findings.refuse(
        BACKSLASH, f"{path}, which {'is' if os.path.exists(with_slashes) else 'would be'} {with_slashes}"
    )


