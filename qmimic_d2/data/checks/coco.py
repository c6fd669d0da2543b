"""
The reader of COCO's annotation files: what only they can get wrong is found, what is harmless is repaired.

A repair changes the content in memory alone. Detectron2's loader and evaluator get it as a temporary file
(:mod:`qmimic_d2.data.loading`).
"""

import json
import math
import os
from typing import Any, Dict, Hashable, List, Optional, Tuple

from detectron2.structures import BoxMode

from qmimic_d2.data.checks.dicts import Records
from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.checks.numbers import number, numbers, whole_size

__all__ = ["coco_class_names", "read_coco"]

_Json = Dict[str, Any]
# By itself and by its text, an id in the one type that all of them get.
_Ids = Dict[Hashable, Hashable]


def coco_class_names(path: str) -> List[str]:
    """
    The classes of an annotation file in the order of Detectron2's labels, by rising category id.

    Raises:
        ValueError: it is not in COCO's format.
    """
    categories = _parse(path, needs_annotations=False)["categories"]
    _unify_ids(categories, "category", Findings(), are_sorted=True)
    return list(_names_by_id(categories, Findings()).values())


def read_coco(
    path: str, image_root: str, findings: Findings, files: ImageFiles, needs_annotations: bool = True
) -> Tuple[_Json, Records]:
    """
    Args:
        path: of the annotation file, on this machine.
        image_root: folder that file names begin from.
        findings: takes problems and repairs.
        files: tell sizes that the file lacks.
        needs_annotations: False for a test set, which may have none: its detections are only written.

    Returns:
        The file's content, repaired. And what is to be inspected; Detectron2's own loader makes the dicts of a run.

    Raises:
        ValueError: it is not in COCO's format; says why.
    """
    content = _parse(path, needs_annotations)
    with open(path, "rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            findings.repair("annotation files begin with a byte order mark", "It is left out", path)
    if not isinstance(content.get("info"), dict):
        findings.repair("annotation files have no info", "An empty one is taken", path)
        content["info"] = {}
    category_ids = _unify_ids(content["categories"], "category", findings, are_sorted=True)
    names = _names_by_id(content["categories"], findings)
    image_ids = _unify_ids(content["images"], "image", findings)
    dicts = [_record(image, image_root, findings, files) for image in content["images"]]
    places: List[List[str]] = [[] for _ in dicts]
    if "annotations" in content:
        for record in dicts:
            record["annotations"] = []
        indices = {record["image_id"]: index for index, record in enumerate(dicts)}
        labels = {each: label for label, each in enumerate(names)}
        for position, annotation in enumerate(content["annotations"]):
            where = f"annotation {annotation['id']!r}" if "id" in annotation else f"annotation {position} of the list"
            category = _refer(annotation, "category_id", category_ids, findings, where)
            image = _refer(annotation, "image_id", image_ids, findings, where)
            if image is None:
                what, fix = "annotations are of an image that is not listed", "Add it, or take the annotations out"
                findings.refuse(what, fix, f"{where}: image_id {annotation.get('image_id')!r}")
                continue
            where = f"{where} of image {image!r}"
            record = dicts[indices[image]]
            _repair(annotation, record, findings, where)
            label = labels.get(category, f"category_id {annotation.get('category_id')!r}")
            record["annotations"].append({**annotation, "category_id": label, "bbox_mode": BoxMode.XYWH_ABS})
            places[indices[image]].append(where)
        _repair_annotation_ids(content["annotations"], findings, "minival" in path)
    return content, Records(dicts, list(names.values()), places)


def _parse(path: str, needs_annotations: bool) -> _Json:
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        parts = ["images", "annotations", "categories"]
        if not needs_annotations and content.get("annotations") is None:
            parts.remove("annotations")
            content.pop("annotations", None)
        for part in parts:
            if not isinstance(content.get(part), list):
                raise ValueError(f"it has no list {part!r}")
            if not all(isinstance(each, dict) for each in content[part]):
                raise ValueError(f"an entry of its list {part!r} is no object")
            if part != "annotations" and not content[part]:
                raise ValueError(f"its list of {part} is empty")
        return content
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the annotation file {os.path.abspath(path)} is not in COCO's format: {type(error).__name__}: {error}. "
            "It must be JSON with the lists images (id, file_name, height, width), annotations (id, image_id, "
            "category_id, bbox) and categories (id, name)"
        ) from error


def _id_text(value: Any) -> str:
    """The text of an id, which is a whole number or a text; "" where it can be none."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else ""
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""


def _unify_ids(entries: List[_Json], what: str, findings: Findings, are_sorted: bool = False) -> _Ids:
    """
    Brings the ids of a list to one type, which Detectron2 and COCO's API can sort and compare.

    Whole numbers stay. Texts stay where all ids are texts, unless ``are_sorted`` and all are numbers ("10" would come
    before "2"). A mixture becomes numbers where it can, else texts. An entry without a usable id loses it.
    """
    usable = [each["id"] for each in entries if _id_text(each.get("id"))]
    are_numbers = all(each.isdecimal() for each in usable if isinstance(each, str))
    are_texts = usable and all(isinstance(each, str) for each in usable)
    convert = int if are_numbers and (are_sorted or not are_texts) else str
    found: _Ids = {}
    for position, entry in enumerate(entries):
        text = _id_text(entry.get("id"))
        if not text:
            what_is_wrong = "images or categories have an id that is neither a whole number nor a text"
            shown = f"{what} {position} of the list: {entry.pop('id', None)!r}"
            findings.refuse(what_is_wrong, "Give each an id of its own", shown)
            continue
        own = convert(text)
        if type(own) is not type(entry["id"]):
            shown = f"{what} {entry['id']!r}, read as {own!r}"
            findings.repair("ids are texts or of several types", "They are taken as one type", shown)
            entry["id"] = own
        found[text] = found[str(own)] = found[own] = own
    return found


def _refer(annotation: _Json, key: str, ids: _Ids, findings: Findings, where: str) -> Optional[Hashable]:
    """The id that an annotation names, also by its text: "7" means 7. None for one that is not listed."""
    value = annotation.get(key)
    if type(value) is int and value in ids:  # nearly always
        return value
    found = ids.get(_id_text(value))
    if found is not None and type(found) is not type(value):
        what = "annotations name image or category by an id of another type"
        findings.repair(what, "The id is found by its text", f"{where}: {key} {value!r}")
        annotation[key] = found
    return found


def _names_by_id(categories: List[_Json], findings: Findings) -> Dict[Hashable, str]:
    """Sorted by id; a name that is no text becomes one."""
    names: Dict[Hashable, str] = {}
    for category in categories:
        name = category.get("name")
        if name is None or name == "" or isinstance(name, (list, dict)):
            findings.refuse("categories have no name", "Name them", f"category {category.get('id')!r}")
        elif not isinstance(name, str):
            findings.repair("categories have a name that is no text", "Its text is taken", repr(name))
            category["name"] = str(name)
        if "id" in category:
            if category["id"] in names:
                fix = "Give each category an id of its own"
                findings.refuse("category ids occur more than once", fix, repr(category["id"]))
            names[category["id"]] = category.get("name") or ""
    return dict(sorted(names.items()))


def _record(image: _Json, image_root: str, findings: Findings, files: ImageFiles) -> _Json:
    """The dict of an image, without annotations."""
    name, sides = image.get("file_name"), (image.get("width"), image.get("height"))
    record = {"image_id": image.get("id")}
    if isinstance(name, str) and name:
        record["file_name"] = os.path.join(image_root, name)
    size = whole_size(*sides, of_text=True)
    if size is None and "file_name" in record:
        size = files.size(record["file_name"])
    if size is not None:  # else the file's own problem is reported
        if not type(sides[0]) is type(sides[1]) is int:
            shown = f"{record.get('file_name')!r}, {sides[0]!r} x {sides[1]!r}, is {size[0]} x {size[1]}"
            findings.repair("images have no usable width and height", "They are read from the files", shown)
        record["width"], record["height"] = image["width"], image["height"] = size
    return record


def _repair(annotation: _Json, image: _Json, findings: Findings, where: str) -> None:
    crowd = annotation.get("iscrowd")
    if type(crowd) is not int or crowd not in (0, 1):
        annotation["iscrowd"] = int(crowd is True or number(crowd, of_text=True) == 1)
        shown = f"{where}: {crowd!r} counts as {annotation['iscrowd']}"
        findings.repair("annotations have no usable iscrowd", "0 is taken: objects, not crowds", shown)
    if annotation.get("ignore", 0) != 0:
        what = "annotations are marked ignore, which Detectron2 does not know"
        findings.repair(what, "They are taken as crowds", where)
        annotation["iscrowd"], annotation["ignore"] = 1, 0
    mask = annotation.get("segmentation")
    if mask and not (_is_run_length(mask, image) if isinstance(mask, dict) else _has_polygon(mask)):
        what = "annotations have a segmentation that cannot be used"
        findings.repair(what, "It is left out; the box stays", where)
        del annotation["segmentation"]
    points = annotation.get("keypoints")
    if points and (not _is_finite(points) or len(points) % 3):
        findings.repair("annotations have keypoints that are no numbers", "They are left out; the box stays", where)
        del annotation["keypoints"]
    elif points and type(annotation.get("num_keypoints")) is not int:
        what = "annotations with keypoints have no num_keypoints"
        findings.repair(what, "The visible ones are counted", where)
        annotation["num_keypoints"] = sum(each > 0 for each in points[2::3])
    _repair_box(annotation, findings, where)


def _repair_box(annotation: _Json, findings: Findings, where: str) -> None:
    polygons = annotation.get("segmentation")
    if annotation.get("bbox") is None and polygons and isinstance(polygons, list):
        xs = [x for polygon in polygons for x in polygon[0::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        annotation["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        findings.repair("annotations have a mask and no box", "The box around the mask is taken", where)
    box, area = annotation.get("bbox"), annotation.get("area")
    if isinstance(box, list) and str in map(type, box) and numbers(box, of_text=True):
        annotation["bbox"] = numbers(box, of_text=True)
        findings.repair("boxes have numbers written as text", "They are read as numbers", where)
    if number(area) is None:
        box = numbers(annotation.get("bbox")) or []
        value = number(area, of_text=True)
        annotation["area"] = math.prod(box[2:]) if value is None else value
        findings.repair("annotations have no usable area", "The area of the box is taken", f"{where}: {area!r}")


def _has_polygon(mask: Any) -> bool:
    """Whether Detectron2's loader finds a polygon of three points; without one it would leave the object out."""
    is_list = isinstance(mask, list) and all(map(_is_finite, mask))
    return is_list and any(len(each) % 2 == 0 and len(each) >= 6 for each in mask)


def _is_finite(values: Any) -> bool:
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_run_length(mask: _Json, image: _Json) -> bool:
    counts = mask.get("counts")
    try:
        height, width = mask.get("size")
        if (width, height) != (image.get("width", width), image.get("height", height)):
            return False
        return (isinstance(counts, str) and bool(counts)) or (min(counts) >= 0 and sum(counts) == width * height)
    except (TypeError, ValueError):
        return False


def _repair_annotation_ids(annotations: List[_Json], findings: Findings, may_repeat: bool) -> None:
    """
    COCO's evaluation takes an object whose annotation id is 0 for one that was not found. Detectron2 lets files called
    minival have annotation ids twice.
    """
    are_usable = [type(each.get("id")) is int and each["id"] > 0 for each in annotations]
    are_all_usable, seen = all(are_usable), set()
    for position, (annotation, is_usable) in enumerate(zip(annotations, are_usable), 1):
        if not is_usable:
            what = "annotations have no id that COCO's evaluation can use, which is a number from 1"
            shown = f"{annotation.get('id')!r} of image {annotation.get('image_id')!r}"
            findings.repair(what, "They are numbered", shown)
        if not are_all_usable:
            annotation["id"] = position
        elif annotation["id"] in seen and not may_repeat:
            what = "annotation ids occur more than once, as in files that were joined"
            shown = f"{annotation['id']} (image {annotation.get('image_id')!r})"
            findings.refuse(what, "Give each annotation an id of its own", shown)
        seen.add(annotation["id"])
