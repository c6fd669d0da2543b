"""Detectron2's Pascal VOC evaluator, with both of Pascal's definitions of average precision at IoU 0.5."""

import os
import tempfile
from typing import Any, Dict, List, Optional

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap, voc_eval
from detectron2.utils import comm

__all__ = ["PascalVOCEvaluator"]


class PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """
    As Detectron2's, whose AP, AP50 and AP75 follow the rule of the data set's year, and besides

    - ``AP50_11point``: mean precision at recall 0, 0.1, ..., 1, the rule of 2007;
    - ``AP50_area``: area under the precision-recall curve, the rule since 2010.

    M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2, and the VOC
    2010 development kit. Papers on VOC 2007 report either; the second is usually the higher one.
    """

    def evaluate(self) -> Optional[Dict[str, Dict[str, float]]]:
        """
        Returns:
            In the main process: "bbox" with five figures in points, 0 to 100, means over the classes. A class
            without an object to be found counts 0 in the two figures that are added here. None in other processes.
        """
        results = super().evaluate()
        gathered = comm.gather(self._predictions, dst=0)
        if results is None:
            return None
        results["bbox"].update(self._both_rules(gathered))
        return results

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
