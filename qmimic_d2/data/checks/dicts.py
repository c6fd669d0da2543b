"""The inspection of Detectron2's dataset dicts, into which the reader of each format turns its files."""

import math
from typing import Any, Callable, Dict, Hashable, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from detectron2.structures import BoxMode

from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.checks.numbers import number, numbers, whole_size

__all__ = ["Counts", "Needs", "Records", "inspect_dicts", "load_usable"]

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
# Rounding of tools, in pixels.
_MARGIN = 1.0
# Rounding of a box divided by the size of its image.
_ONE = 1.001
_DECLARE_IT = (
    "Correct it, or declare the class: in the categories of a COCO file, the names of a data.yaml, the class_names of "
    "register_pascal_voc, the thing_classes of the metadata (of which a label is the place, from 0)"
)


class Records(NamedTuple):
    """
    What a reader makes of a data set.

    Attributes:
        dicts: Detectron2's. A class that is not declared stays the text of the files.
        class_names: in the order of the labels; None if unknown.
        places: by image and annotation, where it stands in the files; None for dicts without files.
    """

    dicts: Sequence[Dict[str, Any]]
    class_names: Optional[Sequence[str]]
    places: Optional[Sequence[Sequence[str]]] = None


class Needs(NamedTuple):
    """
    What a model and its evaluation need apart from boxes and classes.

    Attributes:
        mask_format: "polygon" or "bitmask"; "" for no masks.
        num_keypoints: of an object; 0 for none.
        image_ids: detections are told apart by them.
        sizes: the evaluator makes a COCO file of the dicts.
    """

    mask_format: str = ""
    num_keypoints: int = 0
    image_ids: bool = False
    sizes: bool = False


class Counts(NamedTuple):
    """
    Attributes:
        classes: up to the last that an object has.
        objects: annotations that are no crowd; None for a set without annotations.
    """

    classes: int
    objects: Optional[int]


def inspect_dicts(
    records: Records, findings: Findings, files: ImageFiles, needs: Needs = Needs(), title: Optional[str] = None
) -> Counts:
    """
    Checks images, boxes and classes. Nothing is changed.

    Args:
        findings: takes problems and notes.
        files: what is wrong with those that were looked at is reported.
        title: looks at all files first; of the progress bar.
    """
    images = [each for each in records.dicts if isinstance(each, dict)]
    if title is not None:
        files.look_at([str(each["file_name"]) for each in images if each.get("file_name")], title)
    has_annotations = any("annotations" in each for each in images)
    inspection = _Inspection(findings, files, needs, len(records.class_names or ()) or math.inf, has_annotations)
    for position, image in enumerate(records.dicts):
        inspection.image(image, f"image {position}", records.places and records.places[position])
    return inspection.counts()


def load_usable(read: Callable[[Findings, ImageFiles], Records], what: str) -> Sequence[Dict[str, Any]]:
    """
    The dicts of a reader.

    Raises:
        DataSetError: they cannot be used; has every problem of ``what``.
    """
    findings, files = Findings(), ImageFiles()
    records = read(findings, files)
    inspect_dicts(records, findings, files)
    findings.raise_problems(what)
    return records.dicts


class _Inspection:
    """What is inspected image by image, and what only all of them show."""

    def __init__(
        self, findings: Findings, files: ImageFiles, needs: Needs, num_classes: float, has_annotations: bool
    ):
        self._findings, self._files, self._needs = findings, files, needs
        self._num_classes, self._has_annotations = num_classes, has_annotations
        self._ids: Set[Hashable] = set()
        self._id_of_file: Dict[str, Hashable] = {}
        self._labels: Set[int] = set()
        self._num_objects = self._num_boxes = 0
        self._largest, self._first_box = -math.inf, ""

    def counts(self) -> Counts:
        if 0 < self._largest <= _ONE:
            what = "boxes are all between 0 and 1, as if divided by the size of the image"
            self._findings.refuse(what, "Multiply them: boxes are in pixels", self._first_box, self._num_boxes)
        return Counts(max(self._labels, default=-1) + 1, self._num_objects if self._has_annotations else None)

    def image(self, image: Any, where: str, places: Optional[Sequence[str]]) -> None:
        refuse = self._findings.refuse
        if not isinstance(image, dict):
            fix = "Give a list of dicts with file_name, image_id, height, width"
            refuse("entries are no dicts of an image", fix, f"{where}: {type(image).__name__}")
            return
        image_id, sides = image.get("image_id"), (image.get("width"), image.get("height"))
        size = whole_size(*sides)
        if image.get("file_name"):
            path = str(image["file_name"])
            where = repr(path)
            self._files.check(path, size, self._findings)
            if isinstance(image_id, Hashable) and self._id_of_file.setdefault(path, image_id) != image_id:
                both = f"{where}: {self._id_of_file[path]!r} and {image_id!r}"
                self._findings.note("image files have several ids", "Each id counts as an image of its own", both)
        elif "image" not in image:  # for a mapper of the user's own
            refuse("images have no file_name", "Name their files", where)
        if size is None and (self._needs.sizes or sides != (None, None)):
            fix = "Give them in pixels, as whole numbers"
            refuse("images have no usable height and width", fix, f"{where}: {sides[0]!r} x {sides[1]!r}")
        if image_id is None and self._needs.image_ids:
            what = "images have no image_id, by which detections are kept apart"
            refuse(what, "Give each an id of its own", where)
        elif image_id is not None and isinstance(image_id, Hashable):
            if image_id in self._ids:
                fix = "List each image once, and give it an id of its own, also in image_id of its annotations"
                what = "image ids occur more than once, as in files that were joined"
                refuse(what, fix, f"{image_id!r} ({where})")
            self._ids.add(image_id)
        annotations = image.get("annotations")
        if isinstance(annotations, (list, tuple)):
            for index, annotation in enumerate(annotations):
                self._annotation(annotation, size, places[index] if places else f"{where}, annotation {index}")
        elif self._has_annotations:
            refuse("images have no list of annotations, while others have", "Give an empty list", where)

    def _annotation(self, annotation: Any, size: Optional[Tuple[int, int]], where: str) -> None:
        if not isinstance(annotation, dict):
            fix = "Give dicts with bbox, bbox_mode, category_id"
            self._findings.refuse("annotations are no dicts", fix, f"{where}: {type(annotation).__name__}")
            return
        is_crowd = bool(annotation.get("iscrowd", 0))
        self._box(annotation, is_crowd, size, where)
        label = number(annotation.get("category_id"))
        if label is None or not label.is_integer() or not 0 <= label < self._num_classes:
            shown = f"{where}: {annotation.get('category_id')!r}"
            self._findings.refuse("annotations have a class that is not declared", _DECLARE_IT, shown)
        elif not is_crowd:
            self._num_objects += 1
            self._labels.add(int(label))
            self._masks_and_keypoints(annotation, where)

    def _box(
        self, annotation: Dict[str, Any], is_crowd: bool, size: Optional[Tuple[int, int]], where: str
    ) -> None:
        def shown() -> str:
            text = repr(annotation.get("bbox"))
            text = text if len(text) <= 80 else text[:77] + "..."
            return f"{where} has {text}" + (f" in {size[0]} x {size[1]} pixels" if size else "")

        refuse, note = self._findings.refuse, self._findings.note
        mode, box = annotation.get("bbox_mode"), numbers(annotation.get("bbox"))
        if mode not in _MODES:
            what = "annotations have no bbox_mode that Detectron2 can convert"
            refuse(what, "Give BoxMode.XYXY_ABS or XYWH_ABS", f"{where}: {mode!r}")
        elif box is None or len(box) != 4 + (mode == BoxMode.XYWHA_ABS):
            what = "annotations have a box that is no list of four finite numbers, or five finite numbers with an angle"
            refuse(what, "Write them in pixels, or take the annotation out", shown())
        elif not is_crowd and len(box) == 4:  # nothing is trained on a crowd
            x, y, width, height = box
            if mode == BoxMode.XYXY_ABS:
                width, height = width - x, height - y
            self._num_boxes += 1
            self._largest = max(self._largest, x + width, y + height)
            self._first_box = self._first_box or shown()
            if width < 0 or height < 0:
                refuse("boxes have a negative width or height", "Correct the order of the numbers", shown())
            elif width == 0 or height == 0:
                note("boxes have no area", "Training leaves them out", shown())
            elif size and (x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0):
                note("boxes lie wholly outside of their image", "Training leaves them out", shown())
            elif size and (
                min(x, y) < -_MARGIN or x + width > size[0] + _MARGIN or y + height > size[1] + _MARGIN
            ):
                meaning = (
                    "Training cuts them off there. If most boxes do, see whether they are corners instead of x, y, "
                    "width, height"
                )
                note("boxes reach over the border of their image", meaning, shown())

    def _masks_and_keypoints(self, annotation: Dict[str, Any], where: str) -> None:
        refuse, mask, num_keypoints = self._findings.refuse, annotation.get("segmentation"), self._needs.num_keypoints
        if self._needs.mask_format:
            if mask is None or (isinstance(mask, (list, dict)) and not mask):
                fix = "Add it, set MODEL.MASK_ON False, or give the data in COCO's format"
                refuse("objects have no usable segmentation, and MODEL.MASK_ON is True", fix, where)
            elif isinstance(mask, dict) and self._needs.mask_format == "polygon":
                what = "objects have run-length masks, and INPUT.MASK_FORMAT is 'polygon'"
                refuse(what, "Set INPUT.MASK_FORMAT bitmask", where)
        if num_keypoints and np.size(annotation.get("keypoints", ())) != 3 * num_keypoints:
            what = "objects do not have the keypoints of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            fix = "Add them, correct the number, set MODEL.KEYPOINT_ON False, or give the data in COCO's format"
            refuse(f"{what}, and MODEL.KEYPOINT_ON is True", fix, where)
