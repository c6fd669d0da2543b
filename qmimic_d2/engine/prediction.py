"""
Predictions on images that belong to no data set: reading, detecting, drawing, COCO's JSON.

Shape letters:
    H, W: height and width of an image, in pixels.
    N: number of detections.
"""

import colorsys
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from qmimic_d2.engine.trainer import build_checkpointer
from qmimic_d2.export.network import input_spec_of
from qmimic_d2.export.preprocessing import Detections, InputSpec
from qmimic_d2.image_file import UnusableImageError, as_bgr_image, read_bgr_image
from qmimic_d2.modeling.head_features import head_node

__all__ = [
    "Category",
    "CocoPredictions",
    "Predictor",
    "UnusableImageError",
    "as_instances",
    "dataset_categories",
    "draw_detections",
    "find_images",
    "read_bgr_image",
    "unique_names",
]

# Endings of the files that count as images in a folder; a file that is named itself may have any.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# An image whose longer side is shorter, in pixels, is enlarged for drawing, so that its labels can be read.
_DRAWN_SIZE = 640


class Predictor:
    """
    A trained detector for single images: the student alone, whatever it was trained with.

    As Detectron2's ``DefaultPredictor``, with these differences: the checkpoint is read without running code
    in it, it must fill the whole model, and images so narrow that nothing of them would reach the network are
    padded. Exported files prepare their images by the same code.
    """

    def __init__(self, cfg: CfgNode, weights_key: str = "MODEL.WEIGHTS"):
        """
        Args:
            cfg: of the detector; no file of a teacher is needed.
            weights_key: where the user gave ``cfg.MODEL.WEIGHTS``, for error messages.

        Raises:
            FileNotFoundError, ValueError: there are no weights, or they do not fit the model.
        """
        student = cfg.clone()
        student.defrost()
        student.MODEL.QMIMIC.TEACHER.CONFIG_FILE = ""
        student.freeze()
        model = build_model(student).eval()
        build_checkpointer(model, "").load_for_evaluation(cfg.MODEL.WEIGHTS, weights_key)
        self._model, self._spec = model, input_spec_of(cfg, model)

    @classmethod
    def of_model(cls, cfg: CfgNode, model: nn.Module, spec: Optional[InputSpec] = None) -> "Predictor":
        """Of a model that has its weights already, in evaluation mode; ``spec`` takes the place of the config's."""
        predictor = cls.__new__(cls)
        predictor._model, predictor._spec = model, spec or input_spec_of(cfg, model)
        return predictor

    @property
    def model(self) -> nn.Module:
        """The detector, in evaluation mode."""
        return self._model

    def __call__(self, image: np.ndarray, image_format: str = "BGR") -> Instances:
        """
        Args:
            image: shape (H, W, 3), uint8, or what else :func:`qmimic_d2.image_file.as_bgr_image` takes.
            image_format: order of its channels, "BGR" or "RGB".

        Returns:
            N detections on the CPU, by falling score, with ``pred_boxes`` (XYXY, in pixels of ``image``),
            ``scores`` and ``pred_classes``.

        Raises:
            ValueError: another shape, dtype or format.
        """
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"image_format is {image_format!r}; give 'BGR' or 'RGB'")
        image = as_bgr_image(image)
        bgr = image if image_format == "BGR" else image[:, :, ::-1]
        return as_instances(self.detect(bgr), image.shape[:2])

    def detect(self, image: np.ndarray) -> Detections:
        """
        As ``qmimic_d2.export.OnnxDetector`` does it.

        Args:
            image: shape (H, W, 3), BGR, uint8.
        """
        pixels, placement = self._spec.prepare(image)
        height, width = pixels.shape[1:]
        inputs = {"image": torch.from_numpy(pixels), "height": height, "width": width}
        with torch.no_grad():
            found = self._model([inputs])[0]["instances"].to("cpu")
        return placement.restore(
            found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()
        )


def as_instances(found: Detections, size: Tuple[int, int]) -> Instances:
    """Detections of an image of ``size`` (H, W) in Detectron2's class."""
    return Instances(
        size,
        pred_boxes=Boxes(torch.from_numpy(found.boxes)),
        scores=torch.from_numpy(found.scores),
        pred_classes=torch.from_numpy(found.classes),
    )


@dataclass(frozen=True)
class Category:
    """
    A class of the detector.

    Attributes:
        id: as the data set's annotation file has it, or else the model's class index.
        name: as labels show it.
    """

    id: int
    name: str


def dataset_categories(cfg: CfgNode) -> List[Category]:
    """
    The classes of a config's detector, in the order of its outputs.

    Names come from the metadata of the first data set of ``DATASETS.TEST`` and ``TRAIN`` that has as many
    classes as the detector, and the ids from its ``thing_dataset_id_to_contiguous_id``. No file of the data
    set is read. Ids that the metadata does not tell are class indices, from 0 on; so are names.
    """
    num_classes = head_node(cfg).NUM_CLASSES
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        names = metadata.get("thing_classes", None) or []
        if len(names) == num_classes:
            contiguous = metadata.get("thing_dataset_id_to_contiguous_id", None) or {}
            ids = {index: dataset_id for dataset_id, index in contiguous.items()}
            return [Category(int(ids.get(index, index)), str(each)) for index, each in enumerate(names)]
    return [Category(index, str(index)) for index in range(num_classes)]


def find_images(paths: Sequence[str], excluded_folder: str = "") -> List[str]:
    """
    Args:
        paths: files, taken as they are, and folders, searched with their subfolders for files with an
            ending of :data:`IMAGE_SUFFIXES`. Hidden files and folders are passed over.
        excluded_folder: not searched; where the results go, so that they are no input the next time.

    Returns:
        Paths in the order given, those of each folder sorted, and none twice.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no image.
    """
    excluded = os.path.realpath(excluded_folder) if excluded_folder else None
    found: Dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            images = _images_below(path, excluded)
            if not images:
                raise ValueError(
                    f"the folder {path!r} holds no image; looked for files ending in {', '.join(IMAGE_SUFFIXES)}"
                )
        elif os.path.exists(path):
            images = [path]
        else:
            raise FileNotFoundError(f"there is no image or folder {path!r}")
        for image in images:
            found.setdefault(os.path.realpath(image), image)
    return list(found.values())


def _images_below(folder: str, excluded: Optional[str]) -> List[str]:
    images = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            each
            for each in folders
            if not each.startswith(".") and os.path.realpath(os.path.join(parent, each)) != excluded
        )
        images += [
            os.path.join(parent, file)
            for file in sorted(files)
            if not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return images


def unique_names(paths: Sequence[str], suffix: str) -> List[str]:
    """
    A file name for the result of each image: its own without its ending, and ``suffix``.

    Where several have the same (or one that differs in upper and lower case alone), the later ones get
    "_2", "_3" and so on, which no other one has.
    """
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    own = {stem.casefold() for stem in stems}
    taken = set()
    names = []
    for stem in stems:
        candidate, number = stem, 1
        while candidate.casefold() in taken or (number > 1 and candidate.casefold() in own):
            number += 1
            candidate = f"{stem}_{number}"
        taken.add(candidate.casefold())
        names.append(candidate + suffix)
    return names


def draw_detections(image: np.ndarray, detections: Instances, categories: Sequence[Category]) -> np.ndarray:
    """
    Args:
        image: shape (H, W, 3), BGR, uint8.
        detections: with ``pred_boxes``, ``scores`` and ``pred_classes``, on the CPU.
        categories: of the detector, in the order of its class indices.

    Returns:
        The image with boxes, names and scores, one colour per class. RGB, uint8. One whose longer side is
        below 640 pixels is enlarged by the least whole factor that changes this.

    Raises:
        ImportError: matplotlib, which Detectron2 draws with, is not installed.
    """
    from detectron2.utils.visualizer import Visualizer  # needs matplotlib, which nothing else here does

    factor = max(1, math.ceil(_DRAWN_SIZE / max(image.shape[:2])))
    enlarged = image[:, :, ::-1].repeat(factor, axis=0).repeat(factor, axis=1)
    boxes = detections.pred_boxes.clone()
    boxes.scale(factor, factor)
    classes, scores = detections.pred_classes.tolist(), detections.scores.tolist()
    drawn = Visualizer(enlarged).overlay_instances(
        boxes=boxes,
        labels=[f"{categories[index].name} {score:.0%}" for index, score in zip(classes, scores)],
        assigned_colors=[_class_color(index) for index in classes],
    )
    return drawn.get_image()


def _class_color(index: int) -> Tuple[float, float, float]:
    """Bright, and of another hue than its neighbours': the golden ratio spreads any number of them."""
    return colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.9, 1.0)


class CocoPredictions:
    """
    Detections in COCO's format, as a data set: ``pycocotools`` and ``load_coco_json`` read it.

    Args:
        categories: of the detector, in the order of its class indices.
        info: what the file tells about its origin.
    """

    def __init__(self, categories: Sequence[Category], info: Dict[str, Any]):
        self._categories = list(categories)
        self._info = dict(info)
        self._images: List[Dict[str, Any]] = []
        self._annotations: List[Dict[str, Any]] = []
        self._skipped: List[Dict[str, str]] = []

    @property
    def num_detections(self) -> int:
        """Of all images together."""
        return len(self._annotations)

    def add(self, file_name: str, size: Tuple[int, int], detections: Instances, drawn_file: str = "") -> None:
        """
        Args:
            file_name: the image's path.
            size: (H, W).
            detections: of this image.
            drawn_file: the drawn image's path.
        """
        image_id = len(self._images) + 1
        height, width = size
        self._images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": int(width),
                "height": int(height),
                "drawn_file": drawn_file,
            }
        )
        for result in instances_to_coco_json(detections, image_id):
            result["category_id"] = self._categories[result["category_id"]].id
            result.update(
                id=len(self._annotations) + 1, area=result["bbox"][2] * result["bbox"][3], iscrowd=0
            )
            self._annotations.append(result)

    def skip(self, file_name: str, reason: str) -> None:
        """Records an image that could not be used."""
        self._skipped.append({"file_name": file_name, "reason": reason})

    def to_dict(self) -> Dict[str, Any]:
        """The content of the JSON file."""
        return {
            "info": self._info,
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": each.id, "name": each.name} for each in self._categories],
            "skipped": self._skipped,
        }
