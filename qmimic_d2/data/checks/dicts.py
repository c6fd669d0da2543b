"""Detectron2's dataset dicts, as a user's own function gives them."""

from collections import Counter
from typing import Any, Dict, Hashable, List, NamedTuple, Optional, Sequence, Set, Tuple

from detectron2.structures import BoxMode

from qmimic_d2.data.checks.boxes import BoxCheck, number
from qmimic_d2.data.checks.coco_annotations import Needs
from qmimic_d2.data.checks.findings import Findings, Kind
from qmimic_d2.data.checks.image_files import ImageFile

__all__ = ["DictContent", "inspect_dicts"]

NO_DICT = Kind("entries are no dicts of an image", "Give a list of dicts with file_name, image_id, height, width")
NO_FILE_NAME = Kind("images have no file_name", "Name their files")
NO_ID = Kind("images have no image_id, by which detections are kept apart", "Give each an id of its own")
TWICE = Kind("image ids occur more than once", "Give each image an id of its own")
NO_SIZE = Kind("images have no usable height and width", "Give them in pixels, as whole numbers")
NO_ANNOTATIONS = Kind("images have no list of annotations, while others have", "Give an empty list")
NO_ANNOTATION = Kind("annotations are no dicts", "Give dicts with bbox, bbox_mode, category_id")
NO_MODE = Kind("annotations have no bbox_mode that Detectron2 can convert", "Give BoxMode.XYXY_ABS or XYWH_ABS")
NO_CATEGORY = Kind("annotations have a category_id that is no label of the classes", "Give 0 to number of classes - 1")
NO_MASK = Kind("objects have no segmentation, and MODEL.MASK_ON is True", "Add it, or set MODEL.MASK_ON False")
NO_KEYPOINTS = Kind("objects have no keypoints, and MODEL.KEYPOINT_ON is True", "Add them, or set it False")

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


class DictContent(NamedTuple):
    """
    What the dicts of a data set hold.

    Attributes:
        num_used: number of classes up to the last that an object has.
        num_objects: annotations that are no crowd.
        files: of the images.
    """

    num_used: int
    num_objects: int
    files: List[ImageFile]


def inspect_dicts(
    dicts: Sequence[Dict[str, Any]],
    findings: Findings,
    needs: Needs = Needs(),
    num_classes: Optional[int] = None,
    is_evaluated: bool = False,
    is_converted: bool = False,
) -> DictContent:
    """
    Checks everything but the image files themselves. Nothing is repaired: the function is the user's own.

    Args:
        dicts: of one data set.
        findings: takes the problems.
        needs: what else than boxes the model is trained on.
        num_classes: of the data set; None if unknown.
        is_evaluated: detections are told apart by the images' ids.
        is_converted: the evaluator makes a COCO file of them, which needs sizes too.
    """
    check_box = BoxCheck(findings)
    labels: Set[int] = set()
    num_objects, files = 0, []
    have_annotations = any(isinstance(each, dict) and "annotations" in each for each in dicts)
    ids: Counter = Counter()
    for position, image in enumerate(dicts):
        where = f"image {position}"
        if not isinstance(image, dict):
            findings.refuse(NO_DICT, f"{where}: {type(image).__name__}")
            continue
        size = _size(image, findings, where, is_converted)
        if not image.get("file_name"):
            if "image" not in image:  # for a mapper of the user's own
                findings.refuse(NO_FILE_NAME, where)
        else:
            where = repr(str(image["file_name"]))
            files.append(ImageFile(str(image["file_name"]), size))
        if image.get("image_id") is None:
            if is_evaluated:
                findings.refuse(NO_ID, where)
        elif isinstance(image["image_id"], Hashable):
            ids[image["image_id"]] += 1
        annotations = image.get("annotations")
        if have_annotations and not isinstance(annotations, (list, tuple)):
            findings.refuse(NO_ANNOTATIONS, where)
            continue
        for index, annotation in enumerate(annotations or ()):
            label = _check(annotation, f"{where}, annotation {index}", size, check_box, needs, num_classes, findings)
            if label is not None:
                num_objects += 1
                labels.add(label)
    for each, count in ids.items():
        if count > 1:
            findings.refuse(TWICE, repr(each))
    check_box.finish()
    return DictContent(max(labels, default=-1) + 1, num_objects, files)


def _size(image: Dict[str, Any], findings: Findings, where: str, is_needed: bool) -> Optional[Tuple[int, int]]:
    size = [number(image.get(key)) for key in ("width", "height")]
    if None not in size and min(size) > 0 and not any(isinstance(image[key], str) for key in ("width", "height")):
        return int(size[0]), int(size[1])
    if is_needed or "width" in image or "height" in image:
        findings.refuse(NO_SIZE, f"{where}: {image.get('width')!r} x {image.get('height')!r}")
    return None


def _check(
    annotation: Any,
    where: str,
    size: Optional[Tuple[int, int]],
    check_box: BoxCheck,
    needs: Needs,
    num_classes: Optional[int],
    findings: Findings,
) -> Optional[int]:
    """The label of an object; None for a crowd, and where there is none."""
    if not isinstance(annotation, dict):
        findings.refuse(NO_ANNOTATION, f"{where}: {type(annotation).__name__}")
        return None
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if mode not in _MODES:
        findings.refuse(NO_MODE, f"{where}: {mode!r}")
    elif mode == BoxMode.XYWHA_ABS:
        check_box.rotated(box, where)
    else:
        box = _as_xywh(box) if mode == BoxMode.XYXY_ABS else box
        check_box(box, size, where, may_be_text=False, is_crowd=bool(annotation.get("iscrowd", 0)))
    label = number(annotation.get("category_id"))
    if label is None or not label.is_integer() or label < 0 or (num_classes is not None and label >= num_classes):
        findings.refuse(NO_CATEGORY, f"{where}: {annotation.get('category_id')!r}")
        return None
    if annotation.get("iscrowd", 0):
        return None
    if needs.mask_format and annotation.get("segmentation") is None:
        findings.refuse(NO_MASK, where)
    if needs.num_keypoints and annotation.get("keypoints") is None:
        findings.refuse(NO_KEYPOINTS, where)
    return int(label)


def _as_xywh(box: Any) -> Any:
    try:
        x0, y0, x1, y1 = box
        return [x0, y0, x1 - x0, y1 - y0]
    except (TypeError, ValueError):
        return box
