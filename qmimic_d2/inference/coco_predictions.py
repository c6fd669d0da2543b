"""
Detections of many images in COCO's format.

Shape letters:
    N: number of detections of an image.
"""

import json
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from qmimic_d2.export.preprocessing import Detections
from qmimic_d2.files import whole_file
from qmimic_d2.inference.categories import Category

__all__ = ["CocoPredictions", "PredictedImage"]


@dataclass
class PredictedImage:
    """
    What is kept of an image: plain numbers, about 28 bytes for each detection.

    Attributes:
        file_name: the image's path.
        height, width: in pixels.
        drawn_file: the drawn image's path; "" where there is none.
        classes: shape (N,), int32, class indices.
        rows: shape (N, 5), float32: x, y, width and height of the box, and the score.
    """

    file_name: str
    height: int
    width: int
    drawn_file: str
    classes: np.ndarray
    rows: np.ndarray


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
        self._images: List[PredictedImage] = []
        self._skipped: List[Dict[str, str]] = []
        self._incomplete: List[Dict[str, str]] = []

    @property
    def num_images(self) -> int:
        """Added so far."""
        return len(self._images)

    @property
    def num_detections(self) -> int:
        """Of all images together."""
        return sum(len(each.rows) for each in self._images)

    def add(self, file_name: str, size: Tuple[int, int], found: Detections, drawn_file: str = "") -> PredictedImage:
        """
        Args:
            file_name: the image's path.
            size: (H, W).
            found: in this image.
            drawn_file: the drawn image's path.

        Returns:
            The record, whose ``drawn_file`` may be set later.
        """
        boxes = np.asarray(found.boxes, np.float32).reshape(-1, 4)
        extents = boxes[:, 2:] - boxes[:, :2]
        rows = np.concatenate([boxes[:, :2], extents, np.asarray(found.scores, np.float32)[:, None]], axis=1)
        height, width = (int(side) for side in size)
        image = PredictedImage(file_name, height, width, drawn_file, np.asarray(found.classes, np.int32), rows)
        self._images.append(image)
        return image

    def skip(self, file_name: str, reason: str) -> None:
        """Records an image that could not be used."""
        self._skipped.append({"file_name": file_name, "reason": reason})

    def note_incomplete(self, file_name: str, reason: str) -> None:
        """Records what is missing of an input whose detections are kept: its drawing, or some of its frames."""
        self._incomplete.append({"file_name": file_name, "reason": reason})

    def to_dict(self) -> Dict[str, Any]:
        """The content of the JSON file."""
        return {name: list(each) if isinstance(each, Iterator) else each for name, each in self._sections().items()}

    def write(self, path: str) -> None:
        """Writes the JSON record by record, so that it never stands in memory as a whole."""
        encode = json.JSONEncoder(allow_nan=False).encode
        with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
            start = "{"
            for name, section in self._sections().items():
                file.write(f"{start}\n{encode(name)}: ")
                start = ","
                if isinstance(section, dict):
                    file.write(encode(section))
                    continue
                file.write("[")
                for index, record in enumerate(section):
                    file.write(("," if index else "") + "\n  " + encode(record))
                file.write("\n]")
            file.write("\n}\n")

    def _sections(self) -> Dict[str, Any]:
        return {
            "info": self._info,
            "images": self._image_records(),
            "annotations": self._annotations(),
            "categories": [{"id": each.id, "name": each.name} for each in self._categories],
            "skipped": self._skipped,
            "incomplete": self._incomplete,
        }

    def _image_records(self) -> Iterator[Dict[str, Any]]:
        for index, each in enumerate(self._images):
            yield {
                "id": index + 1,
                "file_name": each.file_name,
                "width": each.width,
                "height": each.height,
                "drawn_file": each.drawn_file,
            }

    def _annotations(self) -> Iterator[Dict[str, Any]]:
        number = 0
        for index, image in enumerate(self._images):
            for class_index, (*bbox, score) in zip(image.classes.tolist(), image.rows.tolist()):
                number += 1
                yield {
                    "id": number,
                    "image_id": index + 1,
                    "category_id": self._categories[class_index].id,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": 0,
                    "score": score,
                }
