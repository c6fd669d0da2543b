"""
WIDER FACE in miniature: digits for faces, in the official layout, with the four .mat files of the evaluation tool.

The subsets follow the official ground truth as it can be seen in its files: no invalid face is in any of them, and
hard, medium and easy begin at heights of about 10, 30 and 50 pixels.
"""

import io
import os
from typing import Any, Dict, Iterable, List

import numpy as np

from miniature_lib.painting import PaintedImage, covered_share, paint_images, publish
from qmimic_d2.data.digits.render import DigitsSpec
from qmimic_d2.data.wider_face.annotations import ATTRIBUTES, WiderFaceRecord
from qmimic_d2.data.wider_face.registration import FOLDER, GROUND_TRUTH

__all__ = ["format_annotations", "make_miniature_wider_face"]

_EVENTS = ("0--Parade", "1--Handshaking", "2--Demonstration", "3--Riot")
_SETTINGS = dict(image_size=160, digits_per_image=(3, 8), size=(10, 60))
# Least height of a face, pixels.
_SUBSETS = {"easy": 50, "medium": 30, "hard": 10}
# An image of every so many has no face; in one of every so many, the smallest face is invalid.
_EMPTY_PERIOD = 8
_INVALID_PERIOD = 4
# This image has a box without width as well.
_ZERO_SIZE_IMAGE = 2
# The header of a .mat file is 116 bytes of text; scipy writes the date there.
_MAT_HEADER = b"MATLAB 5.0 MAT-file, miniature of WIDER FACE's ground truth".ljust(116)


def make_miniature_wider_face(root: str, num_images: int = 40, seed: int = 0) -> str:
    """
    Makes ``widerface``, unless it is there already.

    Args:
        root: folder for it, made if need be: DETECTRON2_DATASETS of who uses it.
        num_images: of each split, 8 or more.
        seed: of all randomness.

    Returns:
        The folder.

    Raises:
        ValueError: a folder of that name holds something else, cannot be written, or the images are too few.
        ImportError: scikit-learn is needed and not installed.
    """
    folder = os.path.join(root, FOLDER)
    settings = {"dataset": "WIDER FACE", "num_images": num_images, "seed": seed}
    publish(folder, settings, lambda partial: _write(partial, num_images, seed))
    return folder


def _write(folder: str, num_images: int, seed: int) -> None:
    os.makedirs(os.path.join(folder, "wider_face_split"))
    for split in ("train", "val"):
        spec = DigitsSpec(f"miniature_wider_face_{split}_{seed}", split, num_images, **_SETTINGS)
        images = paint_images(spec, _has_every_subset, is_empty=_is_empty)
        records = [_record(index, image) for index, image in enumerate(images)]
        # The official files have the images of an event together.
        order = sorted(range(num_images), key=lambda index: index % len(_EVENTS))
        for event in _EVENTS:
            os.makedirs(os.path.join(folder, f"WIDER_{split}", "images", event))
        for index in order:
            with open(os.path.join(folder, f"WIDER_{split}", "images", records[index].image), "wb") as file:
                file.write(images[index].jpeg)
        path = os.path.join(folder, "wider_face_split", f"wider_face_{split}_bbx_gt.txt")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(format_annotations(records[index] for index in order))
    _write_ground_truth(os.path.join(folder, GROUND_TRUTH), [records[index] for index in order])


def format_annotations(records: Iterable[WiderFaceRecord]) -> str:
    """The text of an annotation file, blank at the end of every line of numbers as in the official ones."""
    lines = []
    for record in records:
        lines += [record.image, str(len(record.faces))]
        lines += ["".join(f"{value} " for value in face) for face in record.faces or [(0,) * (4 + len(ATTRIBUTES))]]
    return "\n".join(lines) + "\n"


def _is_empty(index: int) -> bool:
    return index % _EMPTY_PERIOD == _EMPTY_PERIOD - 1


def _record(index: int, image: PaintedImage) -> WiderFaceRecord:
    event = _EVENTS[index % len(_EVENTS)]
    number, _, title = event.partition("--")
    smallest = min((box[3] - box[1] for _, box in image.objects), default=0)
    faces = []
    for position, (digit, (x0, y0, x1, y1)) in enumerate(image.objects):
        width, height = x1 - x0, y1 - y0
        attributes = {
            "blur": int(height < 16) + int(height < 28),
            "expression": int(digit > 7),
            "illumination": int(image.brightness < 100.0),
            "invalid": int(index % _INVALID_PERIOD == 1 and height == smallest),
            "occlusion": int(covered_share(image, position) > 0.0) + int(covered_share(image, position) > 0.1),
            "pose": int(width > 0.7 * height),
        }
        faces.append((x0, y0, width, height, *(attributes[name] for name in ATTRIBUTES)))
    if index == _ZERO_SIZE_IMAGE:
        faces.append((faces[0][0], faces[0][1], 0, faces[0][3], *([0] * len(ATTRIBUTES))))
    return WiderFaceRecord(f"{event}/{number}_{title}_{title}_{number}_{index + 1}.jpg", tuple(faces))


def _has_every_subset(images: List[PaintedImage]) -> bool:
    records = [_record(index, image) for index, image in enumerate(images)]
    return all(any(_members(record, least).size for record in records) for least in _SUBSETS.values())


def _members(record: WiderFaceRecord, least_height: int) -> np.ndarray:
    """Numbers, from 1, of the faces that belong to a subset."""
    invalid = 4 + ATTRIBUTES.index("invalid")
    return np.array(
        [
            number
            for number, face in enumerate(record.faces, start=1)
            if not face[invalid] and face[2] > 0 and face[3] >= least_height
        ],
        dtype=np.uint8,
    ).reshape(-1, 1)


def _write_ground_truth(folder: str, records: List[WiderFaceRecord]) -> None:
    """The four files; records of an event stand together."""
    os.makedirs(folder)
    events: Dict[str, List[WiderFaceRecord]] = {}
    for record in records:
        events.setdefault(record.image.partition("/")[0], []).append(record)
    tables = {
        image: np.array(record.faces or [(0,) * (4 + len(ATTRIBUTES))])
        for image, record in ((record.image, record) for record in records)
    }
    content: Dict[str, Any] = {"event_list": _cells(list(events))}
    content["file_list"] = _by_event(events, lambda record: os.path.splitext(record.image.partition("/")[2])[0])
    content["face_bbx_list"] = _by_event(events, lambda record: tables[record.image][:, :4].astype(np.int32))
    for column, name in enumerate(ATTRIBUTES, start=4):
        labels = _by_event(events, lambda record: tables[record.image][:, column : column + 1].astype(np.uint8))
        content[f"{name}_label_list"] = labels
    _save(os.path.join(folder, "wider_face_val.mat"), content)
    for subset, least_height in _SUBSETS.items():
        members = _by_event(events, lambda record: _members(record, least_height))
        _save(os.path.join(folder, f"wider_{subset}_val.mat"), {**content, "gt_list": members})


def _by_event(events: Dict[str, List[WiderFaceRecord]], value) -> np.ndarray:
    return _cells([_cells([value(record) for record in records]) for records in events.values()])


def _cells(values: List[Any]) -> np.ndarray:
    """A column of cells, as MATLAB has it."""
    cells = np.empty((len(values), 1), dtype=object)
    for index, value in enumerate(values):
        cells[index, 0] = value
    return cells


def _save(path: str, content: Dict[str, Any]) -> None:
    from scipy.io import savemat  # here, because it takes time and few need it

    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=True)
    data = buffer.getvalue()
    with open(path, "wb") as file:
        file.write(_MAT_HEADER + data[len(_MAT_HEADER) :])
