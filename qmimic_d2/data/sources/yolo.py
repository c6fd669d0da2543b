"""
Data sets in the layout of YOLO: a ``data.yaml``, images, and one text file of labels for each image.

The format is that of https://docs.ultralytics.com/datasets/detect/: a line is ``class x y width height``, divided by
the width and height of the image; x and y are the center of the box. A line with more numbers is a polygon
``class x0 y0 x1 y1 ...``, of which the enclosing box is taken.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.structures import BoxMode

from qmimic_d2.data.checks.boxes import BoxCheck
from qmimic_d2.data.checks.findings import Findings, Kind
from qmimic_d2.data.checks.image_files import header_size
from qmimic_d2.yaml.file import read_yaml

__all__ = ["SPLITS", "YoloData", "load_yolo", "read_data_yaml"]

# Keys of data.yaml that name images, the usual one for training first.
SPLITS = ("train", "val", "test")

NO_NUMBERS = Kind("lines are no label", "Write: class x y width height, five numbers, or a polygon")
NO_CLASS = Kind("labels have a class that data.yaml does not name", "Correct the number, or add the class to names")
NOT_NORMALIZED = Kind(
    "labels have numbers outside of 0 to 1", "Divide x and width by the width of the image, y and height by its height"
)
REACHES_OVER = Kind("boxes reach over the border of their image by rounding", "They are cut off there")
NO_IMAGE = Kind("images cannot be read", "Replace them, or take them out of the data set")
REPEATED = Kind("labels are repeated in their file", "Training takes each once")
TWICE = Kind("images are listed more than once", "Take the repeated lines out of the list")

_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# How far rounding may carry a side over the border, as a share of the image.
_ROUNDING = 0.01


@dataclass(frozen=True)
class YoloData:
    """
    What a ``data.yaml`` says.

    Attributes:
        path: of the file.
        classes: names, in the order of their numbers.
        images: by split, folders of images and text files that list images.
    """

    path: str
    classes: Tuple[str, ...]
    images: Dict[str, Tuple[str, ...]]

    def check_split(self, split: str) -> None:
        """
        Raises:
            ValueError: there is no such split.
        """
        if split not in self.images:
            raise ValueError(f"{self.path!r} has no split {split!r}; it has {list(self.images)}")


def read_data_yaml(path: str) -> YoloData:
    """
    Raises:
        FileNotFoundError: there is no such file, or a folder that it names is not there.
        ValueError: it is no ``data.yaml``; names what is missing.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{path!r} is no data.yaml of YOLO: it has no 'names'. Write the names of the classes there")
    classes = _class_names(content["names"], path)
    number = content.get("nc", len(classes))
    if number != len(classes):
        raise ValueError(f"{path!r} has nc {number!r}, and {len(classes)} names; correct one of them")
    images = {split: _places(content, split, path) for split in SPLITS if content.get(split)}
    if not images:
        raise ValueError(f"{path!r} names no images; give folders as 'train' and 'val'")
    return YoloData(path, classes, images)


def load_yolo(data: YoloData, split: str, classes: Sequence[str], findings: Findings) -> List[Dict[str, Any]]:
    """
    The images of a split as Detectron2's dicts.

    An image without a label file, or with an empty one, has no object.

    Args:
        data: as :func:`read_data_yaml` gives it.
        split: a key of ``data.images``.
        classes: of the detector; a label gets the place of its name there.
        findings: takes problems and repairs.

    Raises:
        ValueError: there is no such split, or no image in it.
    """
    data.check_split(split)
    labels = {name: number for number, name in enumerate(classes)}
    paths = [path for place in data.images[split] for path in _images(place)]
    if not paths:
        raise ValueError(f"{data.path!r} names {list(data.images[split])} for {split!r}, where there is no image")
    for path, count in Counter(paths).items():
        if count > 1:
            findings.refuse(TWICE, path)
    check_box = BoxCheck(findings)
    dicts = []
    for number, path in enumerate(paths):
        size = header_size(path)
        if size is None:
            findings.refuse(NO_IMAGE, path)
            continue
        dicts.append(
            {
                "file_name": path,
                "image_id": number,
                "width": size[0],
                "height": size[1],
                "annotations": _annotations(_label_file(path), size, data.classes, labels, check_box, findings),
            }
        )
    check_box.finish()
    return dicts


def _class_names(names: Any, path: str) -> Tuple[str, ...]:
    if isinstance(names, dict):
        numbers = sorted(names, key=lambda each: (not isinstance(each, int), str(each).zfill(9)))
        if numbers != list(range(len(numbers))):
            raise ValueError(f"{path!r} numbers its names {numbers}; number the classes from 0 on, without a gap")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names or not all(isinstance(each, (str, int)) for each in names):
        raise ValueError(f"{path!r} has names {names!r}; give a list of the classes")
    found = tuple(str(each) for each in names)
    if len(set(found)) < len(found):
        raise ValueError(f"{path!r} names a class twice: {list(found)}")
    return found


def _places(content: Dict[str, Any], split: str, path: str) -> Tuple[str, ...]:
    """Absolute paths of what a split names; relative ones count from ``path`` in the file, or from the file itself."""
    beside = os.path.dirname(os.path.abspath(path))
    root = os.path.join(beside, os.path.expanduser(str(content.get("path") or "")))
    given = content[split]
    found = []
    for each in given if isinstance(given, list) else [given]:
        if not isinstance(each, str):
            raise ValueError(f"{path!r} has {each!r} in {split!r}; give the path of a folder, or of a list of images")
        tried = [os.path.normpath(os.path.join(folder, each)) for folder in (root, beside)]
        # Roboflow writes ../train/images for a folder that stands next to the file
        tried.append(os.path.normpath(os.path.join(beside, each.replace("../", "", 1))))
        place = next((place for place in tried if os.path.exists(place)), None)
        if place is None:
            raise FileNotFoundError(
                f"{path!r} names {each!r} in {split!r}, and there is no {tried[0]!r}; correct it, or 'path'"
            )
        found.append(place)
    return tuple(found)


def _images(place: str) -> List[str]:
    """The images of a folder and those below it, or of a text file that lists them."""
    if os.path.isdir(place):
        walked = (os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names)
        return sorted(each for each in walked if each.lower().endswith(_ENDINGS))
    with open(place, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    return [os.path.normpath(os.path.join(os.path.dirname(place), line)) for line in lines if line]


def _label_file(image: str) -> str:
    """As YOLO has it: the last folder "images" of the path becomes "labels"."""
    folder, name = os.path.split(image)
    parts = folder.split(os.sep)
    for index in range(len(parts) - 1, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return os.path.join(os.sep.join(parts), os.path.splitext(name)[0] + ".txt")


def _annotations(
    path: str,
    size: Tuple[int, int],
    names: Sequence[str],
    labels: Dict[str, int],
    check_box: BoxCheck,
    findings: Findings,
) -> List[Dict[str, Any]]:
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [line.split() for line in file]
    found, seen = [], set()
    for position, words in enumerate(lines, 1):
        if not words:
            continue
        where = f"{path}: line {position}"
        numbers = _numbers(words)
        if numbers is None:
            findings.refuse(NO_NUMBERS, f"{where}: {' '.join(words)[:80]!r}")
            continue
        number, *rest = numbers
        if not 0 <= number < len(names) or names[int(number)] not in labels:
            findings.refuse(NO_CLASS, f"{where}: {words[0]}")
            continue
        corners = _corners(rest)
        if min(corners) < -_ROUNDING or max(corners) > 1.0 + _ROUNDING:
            findings.refuse(NOT_NORMALIZED, f"{where}: {' '.join(words)[:80]!r}")
            continue
        if tuple(words) in seen:
            findings.repair(REPEATED, where)
            continue
        seen.add(tuple(words))
        if min(corners) < -1e-4 or max(corners) > 1.0 + 1e-4:
            findings.repair(REACHES_OVER, where)
        x0, y0, x1, y1 = (
            min(max(each, 0.0), 1.0) * side for each, side in zip(corners, (size[0], size[1], size[0], size[1]))
        )
        if check_box([x0, y0, x1 - x0, y1 - y0], size, where) is not None:
            found.append(
                {
                    "category_id": labels[names[int(number)]],
                    "bbox": [x0, y0, x1, y1],
                    "bbox_mode": BoxMode.XYXY_ABS,
                }
            )
    return found


def _numbers(words: Sequence[str]) -> Optional[List[float]]:
    """Those of a label; None where the words are none."""
    try:
        numbers = [float(each) for each in words]
    except ValueError:
        return None
    is_box, is_polygon = len(numbers) == 5, len(numbers) >= 7 and len(numbers) % 2 == 1
    is_finite = all(abs(each) < 1e300 for each in numbers)
    return numbers if (is_box or is_polygon) and is_finite and numbers[0].is_integer() else None


def _corners(numbers: Sequence[float]) -> Tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a box or of a polygon, divided by the sides of the image."""
    if len(numbers) == 4:
        x, y, width, height = numbers
        return x - width / 2.0, y - height / 2.0, x + width / 2.0, y + height / 2.0
    return min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2])
