"""
A ``digits_det`` data set on disk: made once, whole or not at all, and checked.

It is a directory ``<root>/<name>`` of ordinary COCO files::

    annotations.json
    images/000001.jpg ...
    complete.json           written last: settings, digests and library versions

It is written under another name and renamed once it is whole, so an interrupted generation is
never taken for a data set.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict
from typing import Optional

import cv2
import numpy as np
from iopath.common.file_io import file_lock

from qmimic_d2.data.digits.render import DigitsPainter, DigitsSpec

__all__ = ["ANNOTATIONS", "IMAGES", "CLASS_NAMES", "prepare", "verify"]

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.json"
IMAGES = "images"
CLASS_NAMES = [str(digit) for digit in range(10)]

_MARKER = "complete.json"
_JPEG_QUALITY = 95
# To be raised with every change of what a spec paints: data made before is then made again.
_GENERATOR_VERSION = 1


def prepare(spec: DigitsSpec, root: str, expected_sha256: Optional[str] = None) -> str:
    """
    Makes a data set unless it is there already. Of several processes that call this at once, one
    makes the data while the others wait.

    A complete set is recognised by its settings and the number of its files, which takes no
    time; :func:`verify` does a full check.

    Args:
        spec: the data set.
        root: directory of the data sets.
        expected_sha256: what annotations.json should hash to; a warning says so if a set made
            now does not.

    Returns:
        The directory of the data set.

    Raises:
        ValueError: the root cannot be written to, or a directory of that name holds something
            else.
        ImportError: scikit-learn is needed and not installed.
    """
    directory = os.path.join(root, spec.name)
    # Without the lock first: a complete set may lie on a disk that cannot be written to.
    if _is_complete(spec, directory):
        return directory
    try:
        os.makedirs(root, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(f"no permission to write to {root!r}")
    except OSError as e:
        raise ValueError(
            f"Cannot make the data set {spec.name} in {root!r} ({e}). Set the environment "
            "variable DETECTRON2_DATASETS to a directory that can be written to."
        ) from e
    with file_lock(directory):
        # Another process may have made it while this one waited.
        if not _is_complete(spec, directory):
            _make(spec, root, directory, expected_sha256)
    return directory


def verify(spec: DigitsSpec, root: str) -> str:
    """
    Reads every file of a data set and compares them with what was generated.

    Args:
        spec: the data set.
        root: directory of the data sets.

    Returns:
        SHA-256 of the contents, in hexadecimal.

    Raises:
        FileNotFoundError: there is no complete data set of these settings.
        ValueError: a file was changed, added or removed.
    """
    directory = os.path.join(root, spec.name)
    marker = _read_marker(directory)
    if marker is None or marker.get("settings") != _settings(spec):
        raise FileNotFoundError(
            f"There is no data set {spec.name} with the present settings in {root!r}. It is made "
            "by loading it, or by qmimic_d2.data.prepare_digits."
        )
    found = _contents_sha256(directory)
    if found != marker.get("contents_sha256"):
        raise ValueError(
            f"The files in {directory!r} are not those that were generated. Remove the directory "
            "to have them made again."
        )
    return found


def _settings(spec):
    """All that decides the contents, as JSON would give it back."""
    settings = dict(asdict(spec), generator=_GENERATOR_VERSION, jpeg_quality=_JPEG_QUALITY)
    return json.loads(json.dumps(settings))


def _read_marker(directory):
    try:
        with open(os.path.join(directory, _MARKER)) as f:
            marker = json.load(f)
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _is_complete(spec, directory):
    marker = _read_marker(directory)
    if marker is None or marker.get("settings") != _settings(spec):
        return False
    try:
        num_images = len(os.listdir(os.path.join(directory, IMAGES)))
    except OSError:
        return False
    return num_images == spec.num_images and os.path.isfile(os.path.join(directory, ANNOTATIONS))


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def _contents_sha256(directory):
    images = os.path.join(directory, IMAGES)
    files = [f"{IMAGES}/{name}" for name in os.listdir(images)] if os.path.isdir(images) else []
    if os.path.isfile(os.path.join(directory, ANNOTATIONS)):
        files.append(ANNOTATIONS)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{_sha256(os.path.join(directory, file))}  {file}\n".encode())
    return digest.hexdigest()


def _make(spec, root, directory, expected_sha256):
    """Called with the lock held, so nobody else is at work on this data set."""
    start = time.perf_counter()
    _refuse_foreign_files(directory)
    for leftover in os.listdir(root):
        if re.fullmatch(re.escape(spec.name) + r"\.(partial|old)-\d+", leftover):
            shutil.rmtree(os.path.join(root, leftover), ignore_errors=True)

    logger.info("Making the data set %s (%d images) in %s", spec.name, spec.num_images, directory)
    partial, old = f"{directory}.partial-{os.getpid()}", f"{directory}.old-{os.getpid()}"
    try:
        num_digits = _write(spec, partial, expected_sha256)
        # A rename does not replace a directory that has files in it.
        if os.path.exists(directory):
            os.rename(directory, old)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    seconds = time.perf_counter() - start
    logger.info(
        "Made the data set %s: %d images with %d digits in %.1f seconds, in %s",
        *(spec.name, spec.num_images, num_digits, seconds, directory),
    )


def _refuse_foreign_files(directory):
    """An outdated or damaged set is replaced; anything else that bears its name is kept."""
    if not os.path.lexists(directory):
        return
    images = os.path.join(directory, IMAGES)
    ours = os.path.isdir(directory) and not os.path.islink(directory)
    ours = ours and set(os.listdir(directory)) <= {ANNOTATIONS, IMAGES, _MARKER}
    if ours and os.path.isdir(images):
        ours = all(re.fullmatch(r"\d{6}\.jpg", file) for file in os.listdir(images))
    if not ours:
        raise ValueError(
            f"{directory!r} is in the way: it holds files that are not part of this data set. "
            "Move it, or set the environment variable DETECTRON2_DATASETS to another directory."
        )


def _write(spec, directory, expected_sha256):
    """Writes a whole data set into a new directory and returns the number of digits in it."""
    annotations_file = os.path.join(directory, ANNOTATIONS)
    os.makedirs(os.path.join(directory, IMAGES))
    coco = _write_images(spec, os.path.join(directory, IMAGES))
    with open(annotations_file, "w", newline="\n") as f:
        json.dump(coco, f, sort_keys=True)

    # Imported here, after its absence was reported with what to do about it.
    import sklearn

    versions = {module.__name__: module.__version__ for module in (cv2, np, sklearn)}
    annotations_sha256 = _sha256(annotations_file)
    if expected_sha256 is not None and annotations_sha256 != expected_sha256:
        logger.warning(
            "The annotations of %s are not the published ones (SHA-256 %s, not %s), so results "
            "on it cannot be compared with those from other machines. It was made with %s.",
            *(spec.name, annotations_sha256, expected_sha256, versions),
        )
    marker = dict(
        settings=_settings(spec),
        annotations_sha256=annotations_sha256,
        contents_sha256=_contents_sha256(directory),
        versions=versions,
    )
    with open(os.path.join(directory, _MARKER), "w", newline="\n") as f:
        json.dump(marker, f, indent=2, sort_keys=True)
    return len(coco["annotations"])


def _write_images(spec, directory):
    """Writes the JPEG files and returns what annotations.json is to hold."""
    painter = DigitsPainter(spec)
    images, annotations = [], []
    for index in range(spec.num_images):
        image, digits = painter.paint(index)
        file_name = f"{index + 1:06d}.jpg"
        encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        assert encoded, file_name
        with open(os.path.join(directory, file_name), "wb") as f:
            f.write(data.tobytes())
        height, width = image.shape[:2]
        images.append(dict(id=index + 1, file_name=file_name, height=height, width=width))
        for digit, (x0, y0, x1, y1) in digits:
            annotation = dict(
                # From 1: COCO evaluation takes id 0 for "no match".
                id=len(annotations) + 1,
                image_id=index + 1,
                category_id=digit + 1,
                bbox=[x0, y0, x1 - x0, y1 - y0],
                area=(x1 - x0) * (y1 - y0),
                iscrowd=0,
            )
            annotations.append(annotation)
    return dict(
        info=dict(description=f"{spec.name}: handwritten digits on photographs"),
        images=images,
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASS_NAMES)],
    )
