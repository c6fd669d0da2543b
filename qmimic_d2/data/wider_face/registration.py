"""
WIDER FACE, registered as ``wider_face_train`` and ``wider_face_val``; docs/wider_face.md says where its files go.

S. Yang, P. Luo, C. C. Loy, X. Tang, "WIDER FACE: A Face Detection Benchmark", CVPR 2016,
http://shuoyang1213.me/WIDERFACE/
"""

import functools
import logging
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from qmimic_d2.data.wider_face.annotations import ATTRIBUTES
from qmimic_d2.data.wider_face.index import IndexedImage, load_index

__all__ = ["FOLDER", "GROUND_TRUTH", "load_wider_face", "register_wider_face"]

logger = logging.getLogger(__name__)

# Below DETECTRON2_DATASETS; torchvision's WIDERFace has the same folder.
FOLDER = "widerface"
# Below FOLDER: where the official evaluation tool, unpacked, has its .mat files.
GROUND_TRUTH = os.path.join("eval_tools", "ground_truth")

_SPLITS = ("train", "val")


def register_wider_face(root: Optional[str] = None) -> None:
    """
    Registers the two sets with Detectron2's catalogs. No file is read before a set is used. A name that is
    already registered is left as it is.

    Args:
        root: folder that holds ``widerface/``; None for the environment variable ``DETECTRON2_DATASETS``, or
            "datasets" without it, as for Detectron2's own data sets.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root)
    folder = os.path.join(root, FOLDER)
    for split in _SPLITS:
        name = f"wider_face_{split}"
        if name in DatasetCatalog:
            continue
        annotation_file = os.path.join(folder, "wider_face_split", f"wider_face_{split}_bbx_gt.txt")
        image_root = os.path.join(folder, f"WIDER_{split}", "images")
        DatasetCatalog.register(name, functools.partial(load_wider_face, annotation_file, image_root))
        MetadataCatalog.get(name).set(
            annotation_file=annotation_file,
            image_root=image_root,
            evaluator_type="wider_face",
            thing_classes=["face"],
        )
        if split == "val":  # of the training images there is no official ground truth in easy, medium and hard
            MetadataCatalog.get(name).ground_truth_dir = os.path.join(folder, GROUND_TRUTH)


def load_wider_face(annotation_file: str, image_root: str) -> List[Dict[str, Any]]:
    """
    Args:
        annotation_file: ``wider_face_{train,val}_bbx_gt.txt``.
        image_root: ``WIDER_{train,val}/images``.

    Returns:
        Detectron2's dataset dicts in the order of the file. ``image_id`` is "<event>/<name>", without ".jpg".
        A face is an annotation with ``bbox`` (XYWH_ABS, pixels) and its six attributes by name, as integers.

        Every face of the file is kept. What the official ground truth has in none of its subsets is marked
        ``iscrowd`` 1, and so left out of training by Detectron2's mapper: faces flagged invalid, and boxes
        without width or height. A box that reaches over the image's border is clipped to it; one wholly
        outside stays as it is and is marked too.

    Raises:
        FileNotFoundError, ValueError: as :func:`qmimic_d2.data.wider_face.index.load_index`.
    """
    dicts = []
    num_clipped = num_outside = 0
    for image in load_index(annotation_file, image_root):
        annotations = []
        for face in image.record.faces:
            annotation, is_clipped, is_outside = _annotation(face, image)
            annotations.append(annotation)
            num_clipped += is_clipped
            num_outside += is_outside
        dicts.append(
            {
                "file_name": os.path.join(image_root, image.record.image),
                "image_id": os.path.splitext(image.record.image)[0],
                "height": image.height,
                "width": image.width,
                "annotations": annotations,
            }
        )
    if num_clipped or num_outside:
        logger.warning(
            "%s: %d boxes reach over the border of their image and were clipped; %d lie wholly outside and are "
            "left out of training",
            *(annotation_file, num_clipped, num_outside),
        )
    return dicts


def _annotation(face: Sequence[int], image: IndexedImage) -> Tuple[Dict[str, Any], bool, bool]:
    """The annotation of a face, whether its box was clipped, and whether it lies outside of the image."""
    x, y, width, height = face[:4]
    attributes = dict(zip(ATTRIBUTES, face[4:]))
    has_area = width > 0 and height > 0
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + width, image.width), min(y + height, image.height)
    is_inside = x0 < x1 and y0 < y1
    box = (x0, y0, x1 - x0, y1 - y0) if is_inside else (x, y, width, height)
    annotation = {
        "bbox": [float(value) for value in box],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": int(bool(attributes["invalid"]) or not is_inside),
        **attributes,
    }
    return annotation, is_inside and box != (x, y, width, height), has_area and not is_inside
