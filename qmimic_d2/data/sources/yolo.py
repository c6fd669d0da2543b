"""
Data sets in the layout of YOLO: a ``data.yaml``, images, and one text file of labels for each image.

The format is that of https://docs.ultralytics.com/datasets/detect/: a line is ``class x y width height``, divided by
the width and height of the image; x and y are the center of the box. A line with more numbers is a polygon
``class x0 y0 x1 y1 ...``, of which the enclosing box is taken.
"""

import os
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from detectron2.structures import BoxMode

from qmimic_d2.data.checks.dicts import Records
from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.checks.numbers import numbers
from qmimic_d2.yaml.file import read_yaml

__all__ = ["SPLITS", "YoloData", "read_data_yaml", "read_yolo"]

# Keys of data.yaml that name images, the usual one for training first.
SPLITS = ("train", "val", "test")

_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# How far rounding may carry a side over the border, as a share of the image.
_ROUNDING = 0.01


class YoloData(NamedTuple):
    """
    What a ``data.yaml`` says.

    Attributes:
        classes: names, in the order of their numbers.
        images: by split, folders of images and text files that list images.
    """

    classes: Tuple[str, ...]
    images: Dict[str, Tuple[str, ...]]


def read_data_yaml(path: str, split: str = "") -> YoloData:
    """
    Raises:
        FileNotFoundError: there is no such file, or a folder that it names is not there.
        ValueError: it is no ``data.yaml``, or has no such split; names what is missing.
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
    if split and split not in images:
        raise ValueError(f"{path!r} has no split {split!r}; it has {list(images)}")
    return YoloData(classes, images)


def read_yolo(path: str, split: str, classes: Sequence[str], findings: Findings, files: ImageFiles) -> Records:
    """
    The images of a split. One without a label file, or with an empty one, has no object.

    Args:
        path: of the ``data.yaml``.
        split: one of its splits.
        classes: of the detector; a label gets the place of its name there.
        findings: takes problems and repairs.
        files: tell the sizes.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_data_yaml`; or there is no image.
    """
    data = read_data_yaml(path, split)
    labels = {name: number for number, name in enumerate(classes)}
    images = [image for place in data.images[split] for image in _images(place)]
    if not images:
        raise ValueError(f"{path!r} names {list(data.images[split])} for {split!r}, where there is no image")
    files.look_at(images, split)
    image_ids = {image: number for number, image in enumerate(dict.fromkeys(images))}  # a repeated image has one
    dicts, places = [], []
    for image in images:
        size, found = files.size(image), {}
        record = {"file_name": image, "image_id": image_ids[image]}
        if size is not None:  # else the file's own problem is reported
            record["width"], record["height"] = size
            found = dict(_annotations(_label_file(image), size, data.classes, labels, findings))
        dicts.append({**record, "annotations": list(found.values())})
        places.append(list(found))
    return Records(dicts, classes, places)


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
    path: str, size: Tuple[int, int], names: Sequence[str], labels: Dict[str, int], findings: Findings
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """File and line of each object of a label file, and its annotation."""
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = file.read().splitlines()
    seen = set()
    for position, line in enumerate(lines, 1):
        words, where = line.split(), f"{path}: line {position}"
        shown = f"{where}: {line[:80]!r}"
        if not words:
            continue
        if tuple(words) in seen:
            findings.repair("labels are repeated in their file", "Training takes each once", where)
            continue
        seen.add(tuple(words))
        found = numbers(words, of_text=True)
        if not found or not found[0].is_integer() or not (len(found) == 5 or (len(found) >= 7 and len(found) % 2)):
            fix = "Write: class x y width height, five numbers, or a polygon"
            findings.refuse("lines are no label", fix, shown)
            continue
        number, corners = int(found[0]), _corners(found[1:])
        if min(corners) < -_ROUNDING or max(corners) > 1.0 + _ROUNDING:
            fix = "Divide x and width by the width of the image, y and height by its height"
            findings.refuse("labels have numbers outside of 0 to 1", fix, shown)
            continue
        if min(corners) < -1e-4 or max(corners) > 1.0 + 1e-4:
            what = "boxes reach over the border of their image by rounding"
            findings.repair(what, "They are cut off there", where)
        name = names[number] if 0 <= number < len(names) else f"number {number}"
        box = [min(max(each, 0.0), 1.0) * side for each, side in zip(corners, size * 2)]
        yield where, {"category_id": labels.get(name, name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def _corners(numbers: Sequence[float]) -> Tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a box or of a polygon, divided by the sides of the image."""
    if len(numbers) == 4:
        x, y, width, height = numbers
        return x - width / 2.0, y - height / 2.0, x + width / 2.0, y + height / 2.0
    return min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2])
