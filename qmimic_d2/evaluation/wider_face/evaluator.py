"""WIDER FACE's official figures for a model, as one of Detectron2's evaluators."""

import logging
import os
from collections import OrderedDict
from typing import Any, Dict, List, Optional

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from qmimic_d2.evaluation.wider_face.ground_truth import load_ground_truth, require_ground_truth
from qmimic_d2.evaluation.wider_face.predictions import as_written, write_predictions
from qmimic_d2.evaluation.wider_face.protocol import evaluate_predictions

__all__ = ["WiderFaceEvaluator"]

logger = logging.getLogger(__name__)


class WiderFaceEvaluator(DatasetEvaluator):
    """
    Evaluates detections by the official protocol (:mod:`qmimic_d2.evaluation.wider_face.protocol`) and writes
    them in the official text format. It synchronizes, so every process has to call it.
    """

    def __init__(self, dataset_name: str, output_dir: str = ""):
        """
        Args:
            dataset_name: registered, with ``ground_truth_dir`` in its metadata, and with "<event>/<image>" as the
                image ids of its dicts.
            output_dir: text files are written to ``<output_dir>/<dataset_name>``; "" = nowhere.

        Raises:
            ValueError: the metadata name no ground truth.
            FileNotFoundError: one of its files is missing.
        """
        folder = MetadataCatalog.get(dataset_name).get("ground_truth_dir", "")
        if not folder:
            raise ValueError(
                f"DATASETS.TEST names {dataset_name!r}, whose metadata has no ground_truth_dir; officially there is "
                "ground truth of the validation set alone: use 'wider_face_val', or set "
                "MetadataCatalog.get(name).ground_truth_dir to a folder of the four .mat files"
            )
        require_ground_truth(folder)
        self._ground_truth_dir = folder
        self._predictions_dir = os.path.join(output_dir, dataset_name) if output_dir else ""
        self.reset()

    def reset(self) -> None:
        self._predictions: Dict[str, np.ndarray] = {}

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``: ``pred_boxes`` (XYXY, pixels of the image as it is on disk) and
                ``scores``; there is one class, so ``pred_classes`` is not looked at.
        """
        for each, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy()
            scores = instances.scores.numpy()[:, None]
            self._predictions[each["image_id"]] = np.concatenate(
                [boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores], axis=1
            ).astype(np.float32)

    def evaluate(self) -> Optional[Dict[str, Dict[str, float]]]:
        """
        Returns:
            In the main process: "bbox" with AP_easy, AP_medium, AP_hard and their mean AP (which is this
            project's, for choosing a checkpoint by one figure), all in points, 0 to 100. None in the others.

        Raises:
            ValueError: an image, or its event, is not in the ground truth, or a .mat file is not as it should be.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        predictions = {image_id: each for part in gathered for image_id, each in part.items()}
        ground_truth = load_ground_truth(self._ground_truth_dir)
        for image_id in predictions:
            ground_truth.require_image(image_id)
        num_missing = len(ground_truth.boxes) - len(predictions)
        if num_missing:
            logger.warning(
                "%d of %d images of the ground truth were not predicted, and count as images without detections",
                *(num_missing, len(ground_truth.boxes)),
            )
        if self._predictions_dir:
            write_predictions(self._predictions_dir, predictions)
        # What is scored is what the files say.
        results = evaluate_predictions(ground_truth, {each: as_written(rows) for each, rows in predictions.items()})
        points = {f"AP_{subset}": 100 * value for subset, value in results.items()}
        return OrderedDict(bbox={"AP": float(np.mean(list(points.values()))), **points})
