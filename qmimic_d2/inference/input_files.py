"""The files that a prediction reads, and the names of those that it writes."""

import os
import stat
from typing import Dict, List, Optional, Sequence, Set

from qmimic_d2.image_file import UnusableImageError

__all__ = ["check_regular_file", "find_images", "is_video", "unique_names"]

# Endings of the files that count as images in a folder; a file that is named itself may have any.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# Longest stem of a result's name, in bytes of UTF-8; file systems take 255 with ending and temporary parts.
_LONGEST_STEM = 180

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder that cannot be listed"),
)


def check_regular_file(path: str) -> None:
    """
    Sees that reading a path ends: a pipe or a device might never give an end.

    Raises:
        UnusableImageError: it is no regular file, or it is gone; says what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnusableImageError(f"it cannot be read: {reason}") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "")
    if kind or not stat.S_ISREG(mode):
        raise UnusableImageError(f"it is {kind or 'something else'}; give image and video files")


def find_images(paths: Sequence[str], excluded_folder: str = "") -> List[str]:
    """
    Args:
        paths: files, taken as they are, and folders, searched with their subfolders for files with an
            ending of :data:`IMAGE_SUFFIXES`. Links to folders are followed, none twice. Hidden files and folders
            are passed over.
        excluded_folder: not searched; where the results go, so that they are no input the next time.

    Returns:
        Paths in the order given, those of each folder sorted, and none twice. A subfolder that cannot be listed
        is among them, so that it is reported and not passed over.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no image.
    """
    excluded = os.path.realpath(excluded_folder) if excluded_folder else None
    found: Dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            images = _images_below(path, excluded)
            if not images:
                raise ValueError(
                    f"the folder {path!r} holds no image; looked for files ending in {', '.join(IMAGE_SUFFIXES)}"
                )
        elif os.path.exists(path):
            images = [path]
        else:
            raise FileNotFoundError(f"there is no image or folder {path!r}")
        for image in images:
            found.setdefault(os.path.realpath(image), image)
    return list(found.values())


def is_video(path: str) -> bool:
    """Whether a file's ending is a video's."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def _images_below(folder: str, excluded: Optional[str]) -> List[str]:
    images: List[str] = []
    seen: Set[str] = {os.path.realpath(folder)}
    if excluded is not None:
        seen.add(excluded)

    def is_new(path: str) -> bool:
        place = os.path.realpath(path)
        return not (place in seen or seen.add(place))

    def unlisted(error: OSError) -> None:
        images.append(error.filename)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unlisted):
        folders[:] = [
            each for each in sorted(folders) if not each.startswith(".") and is_new(os.path.join(parent, each))
        ]
        images += [
            os.path.join(parent, file)
            for file in sorted(files)
            if not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return images


def unique_names(paths: Sequence[str], suffix: str) -> List[str]:
    """
    A file name for the result of each image: its own without its ending, and ``suffix``.

    Where several have the same (or one that differs in upper and lower case alone), the later ones get
    "_2", "_3" and so on, which no other one has. Very long names are cut, and bytes that are no UTF-8 become "_",
    so that every file system and every library takes the result.
    """
    stems = [_usable_stem(path) for path in paths]
    own = {stem.casefold() for stem in stems}
    taken: Set[str] = set()
    last_number: Dict[str, int] = {}
    names = []
    for stem in stems:
        key = stem.casefold()
        candidate, number = stem, last_number.get(key, 1)
        while candidate.casefold() in taken or (number > 1 and candidate.casefold() in own):
            number += 1
            candidate = f"{stem}_{number}"
        last_number[key] = number
        taken.add(candidate.casefold())
        names.append(candidate + suffix)
    return names


def _usable_stem(path: str) -> str:
    stem = os.path.splitext(os.path.basename(path))[0]
    usable = stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "_")
    return usable.encode("utf-8")[:_LONGEST_STEM].decode("utf-8", "ignore")
