"""
COCO's annotation files: what stops a run is found, what is harmless is repaired.

A repair changes the content in memory alone. Detectron2's loader and evaluator get it as a temporary file
(:mod:`qmimic_d2.data.loading`).
"""

import json
import os
from typing import Any, Dict, Hashable, List, NamedTuple, Tuple

from qmimic_d2.data.checks.boxes import number
from qmimic_d2.data.checks.coco_annotations import Needs, check_annotations
from qmimic_d2.data.checks.findings import Findings, Kind
from qmimic_d2.data.checks.ids import Ids, is_id
from qmimic_d2.data.checks.image_files import ImageFile, header_size

__all__ = ["CocoContent", "Needs", "inspect_coco", "read_coco"]

NO_INFO = Kind("annotation files have no info", "An empty one is taken")
MARK = Kind("annotation files begin with a byte order mark", "It is left out")
NO_ID = Kind("images or categories have an id that is neither a whole number nor a text", "Give each an id of its own")
OTHER_IDS = Kind("ids are texts or of several types", "They are taken as one type")
IMAGE_TWICE = Kind(
    "image ids occur more than once, as in files that were joined",
    "Renumber the images and the image_id of their annotations, so that each image has an id of its own",
)
CATEGORY_TWICE = Kind("category ids occur more than once", "Give each category an id of its own")
NO_NAME = Kind("categories have no name", "Name them")
NAME_IS_NO_TEXT = Kind("categories have a name that is no text", "Its text is taken")
NO_FILE_NAME = Kind("images have no file_name", "Name their files")
NO_SIZE = Kind("images have no usable width and height", "They are read from the files")
FILE_TWICE = Kind("image files have several ids", "Each id counts as an image of its own")


class CocoContent(NamedTuple):
    """
    What an annotation file says, repaired.

    Attributes:
        content: as JSON. Of use only where the check found no problem.
        class_names: in the order of Detectron2's labels, by rising category id.
        num_used: number of classes up to the last that an object has.
        num_objects: annotations that are no crowd.
        files: of the images.
    """

    content: Dict[str, Any]
    class_names: List[str]
    num_used: int
    num_objects: int
    files: List[ImageFile]


def read_coco(path: str, needs_annotations: bool = True) -> Dict[str, Any]:
    """
    Reads a file whose top level is COCO's.

    Args:
        path: on this machine.
        needs_annotations: False for a test set, which may have none: its detections are only written.

    Raises:
        ValueError: it is not; says why.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        for part in ("images", "annotations", "categories"):
            if part == "annotations" and not needs_annotations and content.get(part) is None:
                content.pop(part, None)
                continue
            if not isinstance(content.get(part), list):
                raise ValueError(f"it has no list {part!r}")
            if not all(isinstance(each, dict) for each in content[part]):
                raise ValueError(f"an entry of its list {part!r} is no object")
            if part != "annotations" and not content[part]:
                raise ValueError(f"its list of {part} is empty")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the annotation file {os.path.abspath(path)} is not in COCO's format: {type(error).__name__}: {error}. "
            "It must be JSON with the lists images (id, file_name, height, width), annotations (id, image_id, "
            "category_id, bbox) and categories (id, name)"
        ) from error


def inspect_coco(
    path: str, image_root: str, findings: Findings, needs: Needs = Needs(), needs_annotations: bool = True
) -> CocoContent:
    """
    Checks and repairs everything but the image files themselves.

    Args:
        path: of the annotation file, on this machine.
        image_root: folder that file names begin from.
        findings: takes problems, repairs and notes.
        needs: what else than boxes the model is trained on.
        needs_annotations: as in :func:`read_coco`.

    Raises:
        ValueError: as :func:`read_coco`.
    """
    content = read_coco(path, needs_annotations)
    with open(path, "rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            findings.repair(MARK, path)
    if not isinstance(content.get("info"), dict):
        findings.repair(NO_INFO, path)
        content["info"] = {}
    category_ids = _own_ids(content["categories"], "category", findings, CATEGORY_TWICE, are_sorted=True)
    named = {}
    for category in content["categories"]:
        named[category.get("id")] = _name(category, findings)
    order = sorted(each for each in named if category_ids.referred(each) is not None)
    image_ids = _own_ids(content["images"], "image", findings, IMAGE_TWICE)
    files, sizes = _images(content["images"], image_root, findings)
    used, num_objects = check_annotations(
        content.get("annotations", []), image_ids, category_ids, sizes, findings, needs, path
    )
    num_used = max((index for index, each in enumerate(order, 1) if each in used), default=0)
    return CocoContent(content, [named[each] for each in order], num_used, num_objects, files)


def _own_ids(
    entries: List[Dict[str, Any]], what: str, findings: Findings, twice: Kind, are_sorted: bool = False
) -> Ids:
    """The ids of a list, which are brought to one type; an entry without a usable one loses its id."""
    usable = [each for each in entries if is_id(each.get("id"))]
    ids = Ids([each["id"] for each in usable], are_sorted)
    for position, entry in enumerate(entries):
        if not is_id(entry.get("id")):
            findings.refuse(NO_ID, f"{what} {position} of the list: {entry.pop('id', None)!r}")
            continue
        own = ids.own(entry["id"])
        if own != entry["id"] or type(own) is not type(entry["id"]):
            findings.repair(OTHER_IDS, f"{what} {entry['id']!r}, read as {own!r}")
            entry["id"] = own
    if ids.duplicates:
        for each in ids.duplicates:
            findings.refuse(twice, repr(each))
    return ids


def _name(category: Dict[str, Any], findings: Findings) -> str:
    name = category.get("name")
    if isinstance(name, str) and name:
        return name
    if name is None or isinstance(name, (list, dict)) or name == "":
        findings.refuse(NO_NAME, f"category {category.get('id')!r}")
        return ""
    findings.repair(NAME_IS_NO_TEXT, repr(name))
    category["name"] = str(name)
    return category["name"]


def _images(
    images: List[Dict[str, Any]], image_root: str, findings: Findings
) -> Tuple[List[ImageFile], Dict[Hashable, Tuple[int, int]]]:
    """Files of the images, and their sizes by id; a size that is missing is read from the file."""
    files, sizes, first_of = [], {}, {}
    for image in images:
        number_of_image, name = image.get("id"), image.get("file_name")
        if not isinstance(name, str) or not name:
            findings.refuse(NO_FILE_NAME, f"image {number_of_image!r}: {name!r}")
            continue
        path = os.path.join(image_root, name)
        if first_of.setdefault(path, number_of_image) != number_of_image:
            findings.note(FILE_TWICE, f"{name}: {first_of[path]!r} and {number_of_image!r}")
        size = _size(image, path, findings)
        files.append(ImageFile(path, size))
        if size is not None:
            sizes[number_of_image] = size
    return files, sizes


def _size(image: Dict[str, Any], path: str, findings: Findings):
    size = image.get("width"), image.get("height")
    if type(size[0]) is int and type(size[1]) is int and min(size) > 0:
        return size
    numbers = [number(each) for each in size]
    if None not in numbers and min(numbers) > 0 and all(each.is_integer() for each in numbers):
        read = int(numbers[0]), int(numbers[1])
    else:
        read = header_size(path)
    if read is not None:  # else the file's own problem is reported
        findings.repair(NO_SIZE, f"{path!r}, {size[0]!r} x {size[1]!r}, is {read[0]} x {read[1]}")
        image["width"], image["height"] = read
    return read
