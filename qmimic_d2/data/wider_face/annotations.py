"""
The text annotations of WIDER FACE: ``wider_face_{train,val}_bbx_gt.txt``.

A record is the image's path below ``images/``, the number of faces, and a line per face::

    0--Parade/0_Parade_marchingband_1_849.jpg
    1
    449 330 122 149 0 0 0 0 0 0

which the readme of ``wider_face_split.zip`` explains as "x1, y1, w, h, blur, expression, illumination,
invalid, occlusion, pose". An image without a face has the number 0 and yet one line, of ten zeros.
"""

import re
from dataclasses import dataclass
from typing import List, Tuple

__all__ = ["ATTRIBUTES", "WiderFaceRecord", "parse_annotations"]

# In the order of the columns after x, y, w, h.
ATTRIBUTES = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")

_NUM_COLUMNS = 4 + len(ATTRIBUTES)
_IMAGE = re.compile(r"[^/\\]+/[^/\\]+\.(jpg|jpeg|png)", re.IGNORECASE)


@dataclass(frozen=True)
class WiderFaceRecord:
    """
    One image of the annotation file.

    Attributes:
        image: path below ``images/``: "<event>/<name>.jpg".
        faces: a tuple per face as the file has it: x, y, w, h in pixels, then :data:`ATTRIBUTES`.
    """

    image: str
    faces: Tuple[Tuple[int, ...], ...]


def parse_annotations(text: str, name: str) -> List[WiderFaceRecord]:
    """
    Args:
        text: content of an annotation file.
        name: of the file, for error messages.

    Returns:
        The records in the order of the file. An image without a face has no faces, whether the line of
        zeros is there or not. Boxes are as in the file, those of no size and invalid ones among them.

    Raises:
        ValueError: a line is not what it should be; names file and line.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    records, first_lines, position = [], {}, 0
    while position < len(lines):
        number, image = lines[position]
        if not _IMAGE.fullmatch(image):
            raise ValueError(f"{name}, line {number}: {image!r} is no image; it should be <event>/<name>.jpg")
        if image in first_lines:
            raise ValueError(f"{name}, line {number}: {image!r} has a record already, in line {first_lines[image]}")
        first_lines[image] = number
        if position + 1 == len(lines):
            raise ValueError(f"{name} ends behind {image!r}: the number of its faces is missing")
        number, count = lines[position + 1]
        if not re.fullmatch(r"\d+", count):
            raise ValueError(f"{name}, line {number}: {count!r} is not the number of faces in {image!r}")
        start, position = position + 2, position + 2 + int(count)
        if position > len(lines):
            raise ValueError(f"{name} ends within the faces of {image!r}")
        records.append(WiderFaceRecord(image, tuple(_face(name, image, *each) for each in lines[start:position])))
        number, line = lines[position] if position < len(lines) else (0, "")
        if start == position and line and not _IMAGE.fullmatch(line):  # the line of zeros
            if any(_face(name, image, number, line)):
                raise ValueError(f"{name}, line {number}: {image!r} is said to have 0 faces, and here is one: {line!r}")
            position += 1
    if not records:
        raise ValueError(f"{name} holds no record; it should be the file of that name in wider_face_split.zip")
    return records


def _face(name: str, image: str, number: int, line: str) -> Tuple[int, ...]:
    try:
        face = tuple(map(int, line.split()))
    except ValueError:
        face = ()
    if len(face) != _NUM_COLUMNS:
        raise ValueError(
            f"{name}, line {number}: {line!r} is no face of {image!r}; it should be {_NUM_COLUMNS} whole "
            f"numbers: x y w h {' '.join(ATTRIBUTES)}"
        )
    return face
