"""The annotations of a COCO file, one by one."""

import math
from typing import Any, Dict, Hashable, List, NamedTuple, Optional, Set, Tuple

from qmimic_d2.data.checks.boxes import BoxCheck, number
from qmimic_d2.data.checks.findings import Findings, Kind
from qmimic_d2.data.checks.ids import Ids

__all__ = ["Needs", "check_annotations"]

NO_IMAGE = Kind("annotations are of an image that is not listed", "Add the image, or take the annotations out")
NO_CATEGORY = Kind("annotations have a category_id that is not listed", "Add the category, or correct the annotations")
OTHER_REFERENCE = Kind("annotations name image or category by an id of another type", "The id is found by its text")
TWICE = Kind(
    "annotation ids occur more than once, as in files that were joined", "Give each annotation an id of its own"
)
NUMBERED = Kind("annotations have no id that COCO's evaluation can use, which is a number from 1", "They are numbered")
NO_CROWD = Kind("annotations have no usable iscrowd", "0 is taken: objects, not crowds")
IGNORED = Kind("annotations are marked ignore, which Detectron2 does not know", "They are taken as crowds")
NO_AREA = Kind("annotations have no usable area", "The area of the box is taken")
BOX_OF_MASK = Kind("annotations have a mask and no box", "The box around the mask is taken")
NO_MASK = Kind("objects have no usable segmentation, and MODEL.MASK_ON is True", "Add it, or set MODEL.MASK_ON False")
BAD_MASK = Kind("annotations have a segmentation that cannot be used", "It is left out; the box stays")
RLE = Kind(
    "objects have run-length masks, and INPUT.MASK_FORMAT is 'polygon'", "Set INPUT.MASK_FORMAT bitmask"
)
NO_KEYPOINTS = Kind(
    "objects do not have the keypoints of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, and MODEL.KEYPOINT_ON is True",
    "Add them, correct the number, or set MODEL.KEYPOINT_ON False",
)
BAD_KEYPOINTS = Kind("annotations have keypoints that are no numbers", "They are left out; the box stays")
COUNTED = Kind("annotations with keypoints have no num_keypoints", "The visible ones are counted")


class Needs(NamedTuple):
    """
    What a model is trained on beside boxes.

    Attributes:
        mask_format: "polygon" or "bitmask"; "" for no masks.
        num_keypoints: of an object; 0 for none.
    """

    mask_format: str = ""
    num_keypoints: int = 0


def check_annotations(
    annotations: List[Dict[str, Any]],
    image_ids: Ids,
    category_ids: Ids,
    sizes: Dict[Hashable, Tuple[int, int]],
    findings: Findings,
    needs: Needs,
    path: str,
) -> Tuple[Set[Hashable], int]:
    """
    Checks and repairs annotations in place.

    Args:
        sizes: width and height of images, by id.
        path: of the file. Detectron2 lets files called minival have annotation ids twice.

    Returns:
        Ids of the categories that objects have, and the number of objects; a crowd is no object.
    """
    check_box = BoxCheck(findings)
    used: Set[Hashable] = set()
    num_objects = 0
    for position, annotation in enumerate(annotations):
        where = f"annotation {annotation['id']!r}" if "id" in annotation else f"annotation {position} of the list"
        image = _reference(annotation, "image_id", image_ids, NO_IMAGE, findings, where)
        category = _reference(annotation, "category_id", category_ids, NO_CATEGORY, findings, where)
        where = f"{where} of image {image!r}"
        size = sizes.get(image)
        _repair_crowd(annotation, findings, where)
        _repair_mask(annotation, size, findings, where)
        _repair_keypoints(annotation, findings, where)
        is_object = not annotation["iscrowd"]
        if annotation.get("bbox") is None and isinstance(annotation.get("segmentation"), list):
            annotation["bbox"] = _box_around(annotation["segmentation"])
            findings.repair(BOX_OF_MASK, where)
        box = check_box(annotation.get("bbox"), size, where, is_crowd=not is_object)
        if box is not None:
            if any(isinstance(each, str) for each in annotation["bbox"]):
                annotation["bbox"] = box
            _repair_area(annotation, box, findings, where)
        if is_object:
            num_objects += 1
            used.add(category)
            _check_needs(annotation, needs, findings, where)
    check_box.finish()
    _check_ids(annotations, findings, "minival" in path)
    return used, num_objects


def _reference(
    annotation: Dict[str, Any], key: str, ids: Ids, unknown: Kind, findings: Findings, where: str
) -> Optional[Hashable]:
    value = annotation.get(key)
    found = ids.referred(value)
    if found is None:
        findings.refuse(unknown, f"{where}: {key} {value!r}")
    elif type(found) is not type(value):
        findings.repair(OTHER_REFERENCE, f"{where}: {key} {value!r}")
        annotation[key] = found
    return found


def _repair_crowd(annotation: Dict[str, Any], findings: Findings, where: str) -> None:
    crowd = annotation.get("iscrowd")
    if type(crowd) is not int or crowd not in (0, 1):
        value = number(int(crowd) if isinstance(crowd, bool) else crowd)
        annotation["iscrowd"] = int(value == 1)
        findings.repair(NO_CROWD, f"{where}: {crowd!r}" if value is None else f"{where}: {crowd!r} is {value == 1:d}")
    if annotation.get("ignore", 0) != 0:
        findings.repair(IGNORED, where)
        annotation["iscrowd"] = 1
        annotation["ignore"] = 0


def _repair_area(annotation: Dict[str, Any], box: List[float], findings: Findings, where: str) -> None:
    area = annotation.get("area")
    value = number(area)
    if value is not None and not isinstance(area, (str, bool)):
        return
    annotation["area"] = box[2] * box[3] if value is None else value
    findings.repair(NO_AREA, f"{where}: {area!r}")


def _repair_mask(
    annotation: Dict[str, Any], size: Optional[Tuple[int, int]], findings: Findings, where: str
) -> None:
    mask = annotation.get("segmentation")
    if mask and not (_is_run_length(mask, size) if isinstance(mask, dict) else _has_polygon(mask)):
        findings.repair(BAD_MASK, where)
        del annotation["segmentation"]


def _has_polygon(mask: Any) -> bool:
    """Whether Detectron2's loader finds a polygon of three points; without one it would leave the object out."""
    try:
        return (
            isinstance(mask, list)
            and all(math.isfinite(sum(each)) for each in mask)
            and any(len(each) % 2 == 0 and len(each) >= 6 for each in mask)
        )
    except (TypeError, OverflowError):
        return False


def _is_run_length(mask: Dict[str, Any], size: Optional[Tuple[int, int]]) -> bool:
    counts, extent = mask.get("counts"), mask.get("size")
    try:
        height, width = extent
        if size is not None and (width, height) != size:
            return False
        return (isinstance(counts, str) and bool(counts)) or (min(counts) >= 0 and sum(counts) == width * height)
    except (TypeError, ValueError):
        return False


def _box_around(polygons: List[List[float]]) -> List[float]:
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _repair_keypoints(annotation: Dict[str, Any], findings: Findings, where: str) -> None:
    points = annotation.get("keypoints")
    if not points:
        return
    try:
        is_usable = isinstance(points, list) and len(points) % 3 == 0 and math.isfinite(sum(points))
    except (TypeError, OverflowError):
        is_usable = False
    if not is_usable:
        findings.repair(BAD_KEYPOINTS, where)
        del annotation["keypoints"]
    elif type(annotation.get("num_keypoints")) is not int:
        findings.repair(COUNTED, where)
        annotation["num_keypoints"] = sum(each > 0 for each in points[2::3])


def _check_needs(annotation: Dict[str, Any], needs: Needs, findings: Findings, where: str) -> None:
    if needs.mask_format:
        mask = annotation.get("segmentation")
        if not mask:
            findings.refuse(NO_MASK, where)
        elif isinstance(mask, dict) and needs.mask_format == "polygon":
            findings.refuse(RLE, where)
    if needs.num_keypoints and len(annotation.get("keypoints") or ()) != 3 * needs.num_keypoints:
        findings.refuse(NO_KEYPOINTS, where)


def _check_ids(annotations: List[Dict[str, Any]], findings: Findings, may_repeat: bool) -> None:
    """COCO's evaluation takes an object whose annotation id is 0 for one that was not found."""
    ids = [each.get("id") for each in annotations]
    if all(type(each) is int and each > 0 for each in ids):
        if len(set(ids)) < len(ids) and not may_repeat:
            seen: Set[int] = set()
            for each, annotation in zip(ids, annotations):
                if each in seen:
                    findings.refuse(TWICE, f"{each} (image {annotation.get('image_id')!r})")
                seen.add(each)
        return
    for index, annotation in enumerate(annotations, 1):
        if type(annotation.get("id")) is not int or annotation["id"] <= 0:
            findings.repair(NUMBERED, f"{annotation.get('id')!r} of image {annotation.get('image_id')!r}")
        annotation["id"] = index
