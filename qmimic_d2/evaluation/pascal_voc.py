"""Detectron2's Pascal VOC evaluator, with both of Pascal's definitions of average precision at IoU 0.5."""

import contextlib
import os
import tempfile
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation
from detectron2.evaluation.pascal_voc_evaluation import voc_ap, voc_eval
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from qmimic_d2.data.pascal_voc import load_pascal_voc, voc_image_ids

__all__ = ["PascalVOCEvaluator"]


class PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """
    As Detectron2's, whose AP, AP50 and AP75 follow the rule of the data set's year, and besides

    - ``AP50_11point``: mean precision at recall 0, 0.1, ..., 1, the rule of 2007;
    - ``AP50_area``: area under the precision-recall curve, the rule since 2010.

    M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2, and the VOC
    2010 development kit. Papers on VOC 2007 report either; the second is usually the higher one.

    It takes the files of users that :mod:`qmimic_d2.data.pascal_voc` takes, reads them at every evaluation, and takes
    any class name and image id. Detectron2's own keeps annotations by name for the life of the process.
    """

    def __init__(self, dataset_name: str):
        """
        Args:
            dataset_name: registered with ``dirname``, ``split``, ``year`` and ``thing_classes``.
        """
        super().__init__(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self._folder = PathManager.get_local_path(metadata.dirname)
        self._split = metadata.split
        # Detectron2 makes files of class names and lines of image ids: numbers are safe in both.
        self._true_names = list(metadata.thing_classes)
        self._class_names = [str(index) for index in range(len(self._true_names))]
        self._anno_file_template = "{}"
        self._numbers: Dict[str, str] = {}

    def reset(self) -> None:
        """As Detectron2's; reads the list of images."""
        super().reset()
        ids = voc_image_ids(self._folder, self._split)
        self._numbers = {image_id: str(index) for index, image_id in enumerate(ids)}

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        """As Detectron2's."""
        super().process([{"image_id": self._numbers[each["image_id"]]} for each in inputs], outputs)

    def evaluate(self) -> Optional[Dict[str, Dict[str, float]]]:
        """
        Returns:
            In the main process: "bbox" with five figures in points, 0 to 100, means over the classes. A class
            without an object to be found counts 0 in the two figures that are added here. None in other processes.

        Raises:
            DataSetError: the annotations have become unusable since the run was checked.
        """
        with self._annotations() if comm.is_main_process() else contextlib.nullcontext():
            results = super().evaluate()
            gathered = comm.gather(self._predictions, dst=0)
            if results is None:
                return None
            results["bbox"].update(self._both_rules(gathered))
        return results

    @contextlib.contextmanager
    def _annotations(self) -> Iterator[None]:
        """In the block, Detectron2's functions get the objects that this package has read, under numbers for names."""
        objects: Dict[str, List[Dict[str, Any]]] = {number: [] for number in self._numbers.values()}
        for image in load_pascal_voc(self._folder, self._split, self._true_names):
            for each in image["annotations"]:
                x0, y0, x1, y1 = each["bbox"]
                as_read = {"name": str(each["category_id"]), "difficult": each["difficult"]}
                objects[self._numbers[image["image_id"]]].append({**as_read, "bbox": [x0 + 1.0, y0 + 1.0, x1, y1]})
        original = pascal_voc_evaluation.parse_rec
        with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
            self._image_set_path = os.path.join(folder, "images.txt")
            with open(self._image_set_path, "w", encoding="utf-8") as file:
                file.write("\n".join(objects))
            pascal_voc_evaluation.parse_rec = objects.__getitem__
            try:
                yield
            finally:
                pascal_voc_evaluation.parse_rec = original

    def _both_rules(self, gathered: List[Dict[int, List[str]]]) -> Dict[str, Any]:
        by_points, by_area = [], []
        with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
            template = os.path.join(folder, "{}.txt")
            for index, name in enumerate(self._class_names):
                lines = [line for part in gathered for line in part.get(index, ())]
                with open(template.format(name), "w", encoding="utf-8") as file:
                    file.write("\n".join(lines))
                with np.errstate(invalid="ignore"):  # 0 / 0 for a class without an object
                    recall, precision, _ = voc_eval(
                        template, self._anno_file_template, self._image_set_path, name, ovthresh=0.5
                    )
                recall = np.nan_to_num(recall)
                by_points.append(voc_ap(recall, precision, use_07_metric=True))
                by_area.append(voc_ap(recall, precision, use_07_metric=False))
        return {"AP50_11point": 100 * float(np.mean(by_points)), "AP50_area": 100 * float(np.mean(by_area))}
