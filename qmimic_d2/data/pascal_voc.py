"""
Pascal VOC's files, and those of users' own in this format.

Detectron2's loader and evaluator take what the challenge's own files have. This reader also takes lists with blank
lines or one line, images with another ending than .jpg, objects without ``difficult``, ``truncated`` and ``pose``,
coordinates that are no whole numbers, and annotations without a usable ``<size>``.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from qmimic_d2.data.checks.boxes import BoxCheck, number
from qmimic_d2.data.checks.findings import DataSetError, Findings, Kind
from qmimic_d2.data.checks.image_files import header_size

__all__ = ["VocObject", "check_pascal_voc", "load_pascal_voc", "read_objects", "voc_image_ids"]

MISSING_XML = Kind("annotation files are not there", "Add them, or take the images out of the list")
NO_XML = Kind("annotation files are no XML", "Replace them, or take the images out of the list")
UNDECLARED = Kind(
    "objects have a class that is not declared",
    "Correct the name, or add it to the class_names of register_pascal_voc",
)
NO_NAME = Kind("objects have no name", "Write the class into <name>")
TWICE = Kind("images are listed more than once", "Take the repeated lines out of the list")
NO_SIZE = Kind("annotations have no usable <size>", "It is read from the image")
NO_DIFFICULT = Kind("objects have no usable <difficult>", "0 is taken: they count in the evaluation")

# As on http://host.robots.ox.ac.uk/pascal/VOC/, by year and by split ("" for the others).
_ARCHIVES = {
    (2007, "test"): "VOCtest_06-Nov-2007.tar",
    (2007, ""): "VOCtrainval_06-Nov-2007.tar",
    (2012, ""): "VOCtrainval_11-May-2012.tar",
}
# In this order, in lower or upper case; Detectron2's loader takes the first alone.
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """
    An object as its file has it.

    Attributes:
        name: of its class.
        box: xmin, ymin, xmax, ymax in pixels that are counted from 1, the last ones included.
        is_difficult: not counted in the evaluation.
    """

    name: str
    box: Tuple[float, float, float, float]
    is_difficult: bool


def voc_image_ids(folder: str, split: str) -> List[str]:
    """
    The images of a split, in the order of its list.

    A line is an image's id, or an id and the flag -1, 0 or 1 as in the challenge's lists of one class. Blank lines do
    not count.
    """
    with PathManager.open(_list_file(folder, split), encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    return [_without_flag(folder, line) for line in lines if line]


def read_objects(path: str, findings: Findings) -> List[VocObject]:
    """
    The objects of one annotation file; for the evaluator, which needs no image.

    Args:
        path: on this machine.
        findings: takes the problems; an object that has one is left out.
    """
    root = _parse(path, findings)
    return [] if root is None else _objects(root, path, None, BoxCheck(findings), findings)


def load_pascal_voc(
    folder: str, split: str, class_names: Sequence[str], findings: Optional[Findings] = None
) -> List[Dict[str, Any]]:
    """
    Detectron2's ``load_voc_instances`` for what the module says.

    Args:
        folder: holds Annotations, ImageSets and JPEGImages.
        split: name of a list in ImageSets/Main, without ".txt".
        class_names: in the order of the labels.
        findings: takes problems, repairs and notes. None: problems raise.

    Returns:
        Detectron2's dataset dicts.

    Raises:
        DataSetError: there are problems, and ``findings`` is None.
        FileNotFoundError: the list, an annotation or an image is not there.
    """
    own = Findings() if findings is None else findings
    folder = PathManager.get_local_path(folder)
    ids = voc_image_ids(folder, split)
    for each, count in Counter(ids).items():
        if count > 1:
            own.refuse(TWICE, each)
    images = _images_by_id(os.path.join(folder, "JPEGImages"))
    labels = {name: label for label, name in enumerate(class_names)}
    check_box = BoxCheck(own)
    dicts = []
    for each in ids:
        path = _xml_file(folder, each)
        image = images.get(each) or os.path.join(folder, "JPEGImages", f"{each}.jpg")
        root = _parse(path, own)
        if root is None:
            continue
        size = _size(root, image, path, own)
        annotations = []
        for item in _objects(root, path, size, check_box, own):
            if item.name not in labels:
                own.refuse(UNDECLARED, f"{path}: {item.name!r}")
                continue
            x0, y0, x1, y1 = item.box
            annotations.append(
                {
                    "category_id": labels[item.name],
                    "bbox": [x0 - 1.0, y0 - 1.0, x1, y1],
                    "bbox_mode": BoxMode.XYXY_ABS,
                }
            )
        record = {"file_name": image, "image_id": each, "annotations": annotations}
        if size is not None:
            record["width"], record["height"] = size
        dicts.append(record)
    check_box.finish()
    if findings is None and own.has_problems:
        raise DataSetError(f"{_list_file(folder, split)!r} lists data that cannot be used:\n{own.problems()}")
    return dicts


def check_pascal_voc(folder: str, split: str, year: int) -> None:
    """
    Looks for the list of a split, and for the annotation and the image of everything in it. No file is parsed.

    Args:
        folder: ``VOC2007`` or ``VOC2012``, as registered with Detectron2.
        split: "train", "val", "trainval" or "test".
        year: of the challenge.

    Raises:
        FileNotFoundError: something is not there; names it, how many more there are, and what to unpack where.
        ValueError: the list is empty.
    """
    path = _list_file(folder, split)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path!r}. {_what_to_do(folder, split, year)}")
    ids = voc_image_ids(folder, split)
    if not ids:
        raise ValueError(f"{path!r} lists no image. {_what_to_do(folder, split, year)}")
    parts = (
        ("Annotations", ".xml", [each for each in ids if not os.path.isfile(_xml_file(folder, each))]),
        ("JPEGImages", ".jpg", _without_image(folder, ids)),
    )
    for part, suffix, missing in parts:
        if missing:
            raise FileNotFoundError(
                f"{path!r} lists {len(ids)} images, and {len(missing)} files of them are missing, the first "
                f"{os.path.join(folder, part, missing[0] + suffix)!r}. {_what_to_do(folder, split, year)}"
            )


def _list_file(folder: str, split: str) -> str:
    return os.path.join(folder, "ImageSets", "Main", f"{split}.txt")


def _without_flag(folder: str, line: str) -> str:
    words = line.split()
    has_flag = len(words) > 1 and words[-1] in ("-1", "0", "1")
    return line[: -len(words[-1])].rstrip() if has_flag and not os.path.isfile(_xml_file(folder, line)) else line


def _xml_file(folder: str, image_id: str) -> str:
    return os.path.join(folder, "Annotations", f"{image_id}.xml")


def _without_image(folder: str, ids: Sequence[str]) -> List[str]:
    images = _images_by_id(os.path.join(folder, "JPEGImages"))
    return [each for each in ids if each not in images]


def _images_by_id(folder: str) -> Dict[str, str]:
    """Paths of the images below a folder by their names without ending."""
    found: Dict[str, Tuple[int, str]] = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in _ENDINGS:
                image_id = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
                ranked = _ENDINGS.index(ending.lower()) + (ending != ending.lower()), os.path.join(parent, name)
                found[image_id] = min(found.get(image_id, ranked), ranked)
    return {image_id: path for image_id, (_, path) in found.items()}


def _parse(path: str, findings: Findings) -> Optional[ElementTree.Element]:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        findings.refuse(MISSING_XML, path)
        return None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        findings.refuse(NO_XML, f"{path} ({error})")
        return None


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _size(root: ElementTree.Element, image: str, path: str, findings: Findings) -> Optional[Tuple[int, int]]:
    size = [number(_text(root, f"size/{tag}")) for tag in ("width", "height")]
    if None not in size and all(each > 0 and each.is_integer() for each in size):
        return int(size[0]), int(size[1])
    read = header_size(image)
    if read is not None:  # else the check of the image files says so
        findings.repair(NO_SIZE, f"{path}: {read[0]} x {read[1]}")
    return read


def _objects(
    root: ElementTree.Element, path: str, size: Optional[Tuple[int, int]], check_box: BoxCheck, findings: Findings
) -> List[VocObject]:
    found = []
    for position, element in enumerate(root.findall("object"), 1):
        where = f"{path}: object {position}"
        name = _text(element, "name")
        if not name:
            findings.refuse(NO_NAME, where)
            continue
        corners = [number(_text(element, f"bndbox/{corner}")) for corner in _CORNERS]
        if None not in corners:
            x0, y0, x1, y1 = corners
            corners = [x0 - 1.0, y0 - 1.0, x1 - x0 + 1.0, y1 - y0 + 1.0]
        if check_box(corners, size, where) is None:
            continue
        difficult = _text(element, "difficult")
        if difficult not in ("0", "1"):
            findings.repair(NO_DIFFICULT, where)
        found.append(VocObject(name, (x0, y0, x1, y1), difficult == "1"))
    return found


def _what_to_do(folder: str, split: str, year: int) -> str:
    name = os.path.basename(folder)
    archive = _ARCHIVES.get((year, split), _ARCHIVES.get((year, "")))
    unpack = f"Unpack {archive} and move its VOCdevkit/{name}" if archive else f"Move {name}"
    return (
        f"{unpack} to {os.path.dirname(os.path.abspath(folder))}, so that {name}/Annotations, "
        f"{name}/ImageSets/Main and {name}/JPEGImages stand there; the environment variable DETECTRON2_DATASETS names "
        "another folder"
    )
