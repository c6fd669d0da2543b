"""
Detections in the official text format of WIDER FACE: ``<event>/<image>.txt`` with

    <event>/<image>.jpg
    <number of detections>
    <x> <y> <w> <h> <score>          pixels; one line per detection

Shape letters used in this module:

    D   detections of one image
"""

import logging
import os
from typing import Dict, List, Mapping

import numpy as np

from qmimic_d2.evaluation.wider_face.ground_truth import WiderFaceGroundTruth
from qmimic_d2.files import write_text

__all__ = ["as_written", "read_predictions", "write_predictions"]

logger = logging.getLogger(__name__)

_COLUMNS = "x y w h score"
_NUM_COLUMNS = len(_COLUMNS.split())

# No face is so small; boxes that are shares of the image's size may reach a little beyond it.
_LARGEST_SHARE = 1.5


def as_written(detections: np.ndarray) -> np.ndarray:
    """
    Args:
        detections: (D, 5) float32.

    Returns:
        (D, 5) float64: what is read from a file that the detections were written to, to the last bit.
    """
    return _texts(detections).astype(np.float64)


def write_predictions(folder: str, predictions: Mapping[str, np.ndarray]) -> None:
    """
    Args:
        folder: of the events' folders. Files that are there are replaced, others are left alone.
        predictions: per image id "<event>/<name>": (D, 5) x, y, w, h, score.
    """
    for event in {image_id.partition("/")[0] for image_id in predictions}:
        os.makedirs(os.path.join(folder, event), exist_ok=True)
    for image_id, detections in predictions.items():
        lines = [f"{image_id}.jpg", str(len(detections)), *(" ".join(row) for row in _texts(detections))]
        write_text(os.path.join(folder, f"{image_id}.txt"), "\n".join(lines) + "\n")


def read_predictions(folder: str, ground_truth: WiderFaceGroundTruth) -> Dict[str, np.ndarray]:
    """
    Reads the file of every image of the ground truth. As in the official tool an image whose file is missing has
    no detections, and a file of another image is not read; both are told in a warning. A name in a file's first
    line is not looked at. Where the tool passes over a malformed file, this is an error.

    Args:
        folder: of the events' folders.
        ground_truth: names the images.

    Returns:
        Per image id (D, 5) float64 x, y, w, h, score.

    Raises:
        FileNotFoundError: there is no such folder, or none of the images has a file in it.
        ValueError: a folder is no event of the ground truth, a file is malformed (names it and the line), or all
            coordinates are shares of the image's size in place of pixels.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"predictions are looked for in {os.path.abspath(folder)}, and there is no such folder. It should hold a "
            "folder for every event, with a file <image>.txt for every image"
        )
    found = _files(folder, ground_truth)
    predictions, missing = {}, []
    for image_id in ground_truth.boxes:
        if image_id in found:
            predictions[image_id] = _read(os.path.join(folder, f"{image_id}.txt"))
        else:
            missing.append(image_id)
    if not predictions:
        raise FileNotFoundError(
            f"{os.path.abspath(folder)} holds no predictions: the first file that is looked for is {missing[0]}.txt"
        )
    if missing:
        logger.warning(
            "%d of %d images have no file in %s, and count as images without detections; the first is %s",
            *(len(missing), len(ground_truth.boxes), folder, missing[0]),
        )
    _check_pixels(folder, predictions)
    unknown = sorted(found - set(predictions))
    if unknown:
        logger.warning(
            "%d files in %s belong to no image of the ground truth and are not read; the first is %s.txt",
            *(len(unknown), folder, unknown[0]),
        )
    return predictions


def _check_pixels(folder: str, predictions: Mapping[str, np.ndarray]) -> None:
    boxes = np.concatenate([each[:, :4] for each in predictions.values()])
    if len(boxes) and np.abs(boxes).max() <= _LARGEST_SHARE:
        raise ValueError(
            f"no x, y, w or h of the {len(boxes)} detections in {os.path.abspath(folder)} is above {_LARGEST_SHARE:g}: "
            "they are shares of the image's size, and no face would match. Write pixels: multiply x and w by the "
            "image's width, y and h by its height"
        )


def _files(folder: str, ground_truth: WiderFaceGroundTruth) -> set:
    """The image ids of the files in the events' folders."""
    events = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    unknown = [event for event in events if event not in ground_truth.events]
    if unknown:
        raise ValueError(
            f"{os.path.abspath(folder)} has the folders {unknown}, which are no events of the ground truth; those are "
            f"{ground_truth.events}"
        )
    return {
        f"{event}/{file[: -len('.txt')]}"
        for event in events
        for file in os.listdir(os.path.join(folder, event))
        if file.endswith(".txt")
    }


def _read(path: str) -> np.ndarray:
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    count = lines[1].strip() if len(lines) > 1 else ""
    if not count.isdecimal():
        raise ValueError(f"{path}, line 2: {count!r} is not the number of detections; line 1 has the image's name")
    rows = [line.split() for line in lines[2:]]
    if len(rows) != int(count):
        raise ValueError(f"{path}: line 2 says {count} detections, and {len(rows)} lines follow")
    for number, row in enumerate(rows, start=3):
        if len(row) != _NUM_COLUMNS:
            raise ValueError(f"{path}, line {number}: {len(row)} columns; there should be {_NUM_COLUMNS}: {_COLUMNS}")
    try:
        detections = np.array(rows, dtype=np.float64).reshape(-1, _NUM_COLUMNS)
    except ValueError:
        detections = np.full((1, 1), np.nan)
    if not np.isfinite(detections).all():
        number = next(number for number, row in enumerate(rows, start=3) if not _is_finite(row))
        raise ValueError(f"{path}, line {number}: {' '.join(rows[number - 3])!r} are not five numbers: {_COLUMNS}")
    return detections


def _is_finite(row: List[str]) -> bool:
    try:
        return bool(np.isfinite([float(value) for value in row]).all())
    except ValueError:
        return False


def _texts(detections: np.ndarray) -> np.ndarray:
    """(D, 5) texts, the shortest that give the same float32."""
    return np.asarray(detections, dtype=np.float32).reshape(-1, _NUM_COLUMNS).astype(str)
