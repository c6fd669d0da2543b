"""
Whether an exported file detects what the training's model detects: AP, boxes, scores, size, time.

Shape letters:
    H, W: height and width of an image, in pixels.
    N, M: numbers of detections.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.export.finite import watch_outputs
from qmimic_d2.export.preprocessing import NOT_FINITE, Detections
from qmimic_d2.image_file import UnusableImageError, read_bgr_image
from qmimic_d2.inference.prediction import as_instances
from qmimic_d2.progress import track

__all__ = [
    "VERIFICATION_NAME",
    "Difference",
    "EvaluatorAdapter",
    "ModelRecorder",
    "Verification",
    "VerifiedModel",
    "difference",
    "read_named_image",
]

Detect = Callable[[np.ndarray], Detections]

# Two detections of one class are the same object from this overlap on.
_SAME_OBJECT_IOU = 0.5
# Times are taken in a row, so that each detector finds its own data in the caches.
_RUNS_IN_A_ROW = 10
_WARM_UP_RUNS = 2

# What the figures of an export are written to, beside its files.
VERIFICATION_NAME = "verification.json"


@dataclass(frozen=True)
class Difference:
    """
    How far the detections of two models of the same images are apart.

    Attributes:
        boxes: largest difference of a coordinate of matched boxes, in pixels of the image.
        scores: largest difference of the scores of matched boxes.
        matched: pairs of the same class that overlap by an IoU of 0.5 or more, best overlap first.
        unmatched: detections of either side without a partner.
        unmatched_score: the highest score among these.
    """

    boxes: float = 0.0
    scores: float = 0.0
    matched: int = 0
    unmatched: int = 0
    unmatched_score: float = 0.0

    def worst(self, other: "Difference") -> "Difference":
        """Of both together."""
        return Difference(
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            self.matched + other.matched,
            self.unmatched + other.unmatched,
            max(self.unmatched_score, other.unmatched_score),
        )


def difference(one: Detections, other: Detections) -> Difference:
    """Matches the detections of one image, N with M; each has one partner at most."""
    overlap = pairwise_iou(*(Boxes(torch.tensor(each.boxes)) for each in (one, other))).numpy()
    overlap[one.classes[:, None] != other.classes[None]] = 0.0
    free_one, free_other = np.ones(len(one), bool), np.ones(len(other), bool)
    boxes = scores = 0.0
    matched = 0
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(other))
        if overlap[i, j] < _SAME_OBJECT_IOU:
            break
        if free_one[i] and free_other[j]:
            free_one[i] = free_other[j] = False
            matched += 1
            boxes = max(boxes, float(np.abs(one.boxes[i] - other.boxes[j]).max()))
            scores = max(scores, float(abs(one.scores[i] - other.scores[j])))
    alone = np.concatenate([one.scores[free_one], other.scores[free_other]])
    return Difference(boxes, scores, matched, len(alone), float(alone.max(initial=0.0)))


@dataclass(frozen=True)
class VerifiedModel:
    """
    Attributes:
        name: for the table.
        AP: of boxes, in points; NaN where nothing was detected.
        difference: from the reference; None for the reference itself.
        file_bytes: what is shipped.
        milliseconds: median time of one image, from pixels to detections, resizing included; NaN before
            :meth:`Verification.timed`.
        detections: in all images together.
    """

    name: str
    AP: float
    difference: Optional[Difference]
    file_bytes: int
    milliseconds: float = math.nan
    detections: int = 0

    def to_dict(self) -> Dict[str, Any]:
        """As plain numbers and strings, for JSON."""
        return asdict(self)


class Verification:
    """
    Evaluates detectors, one after the other, on the images of a data set; the first is the reference.

    What each found is kept, so that the others can be compared with the reference image by image.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str, *, max_images: int = 0, threads: int = 1, runs: int = 50):
        """
        Args:
            cfg: for the evaluator.
            dataset_name: registered, with an evaluator that reports "bbox" "AP".
            max_images: evaluate on so many images only, evenly spaced over the set; 0 = all.
            threads: of torch and of the exported file, while times are taken.
            runs: how many times are taken.

        Raises:
            KeyError, ValueError: as :class:`APEvaluation`.
        """
        self._files_evaluation = APEvaluation(cfg, dataset_name, max_images, mapper=dict)
        self._model_evaluation = APEvaluation(cfg, dataset_name, max_images)
        self.dataset_name = dataset_name
        self.num_images = self._files_evaluation.num_images
        self.threads = threads
        self._runs = runs
        self._reference: List[Detections] = []
        self._files: List[str] = []
        self._detects: List[Detect] = []

    def __call__(
        self,
        name: str,
        detect: Detect,
        file_bytes: int = 0,
        is_compared: bool = True,
        model: Optional[nn.Module] = None,
    ) -> VerifiedModel:
        """
        Args:
            name: for the table.
            detect: from an image (H, W, 3), BGR, uint8, to its detections.
            file_bytes: what is shipped.
            is_compared: box by box with the reference; AP and time are, whatever it is.
            model: a training's, whose AP is measured as its evaluation does: images come from the evaluation's own
                loader, and ``detect`` is for the times alone. None = ``detect`` reads the images by itself.

        Raises:
            ValueError: an image cannot be detected on.
        """
        if model is None:
            adapter = EvaluatorAdapter(detect)
            ap = self._files_evaluation(adapter, name)
        else:
            adapter = ModelRecorder(model)
            ap = self._model_evaluation(adapter, name)
        apart = None
        if self._detects and is_compared:
            apart = Difference()
            for one, other in zip(self._reference, adapter.found):
                apart = apart.worst(difference(one, other))
        if not self._detects:
            self._reference = adapter.found
            self._files = adapter.files
        self._detects.append(detect)
        return VerifiedModel(name, ap, apart, file_bytes, detections=sum(map(len, adapter.found)))

    def timed(self, rows: Sequence[VerifiedModel]) -> List[VerifiedModel]:
        """
        Takes the times of all detectors in turns, some images each, so that what else the machine does meets all.

        Args:
            rows: of every call so far, in order.
        """
        images = [read_named_image(path) for path in self._files[: self._runs]]
        times: List[List[float]] = [[] for _ in rows]
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for first in track(range(0, self._runs, _RUNS_IN_A_ROW), "measuring times"):
                for detect, own in zip(self._detects, times):
                    for run in range(first - _WARM_UP_RUNS, min(first + _RUNS_IN_A_ROW, self._runs)):
                        start = time.perf_counter()
                        detect(images[run % len(images)])
                        if run >= first:
                            own.append(time.perf_counter() - start)
        finally:
            torch.set_num_threads(threads)
        medians = [1000.0 * statistics.median(own) for own in times]
        return [replace(row, milliseconds=median) for row, median in zip(rows, medians)]


def read_named_image(path: str) -> np.ndarray:
    """
    As :func:`read_bgr_image`, for one image of many.

    Raises:
        UnusableImageError: it cannot be read; names it.
    """
    try:
        return read_bgr_image(path)
    except UnusableImageError as error:
        raise UnusableImageError(f"{path!r}: {error}. Replace the file, or take it out of the data set") from error


class EvaluatorAdapter:
    """Gives a detector the inputs and outputs of a Detectron2 model, and keeps what it found."""

    def __init__(self, detect: Detect):
        self._detect = detect
        self.found: List[Detections] = []
        self.files: List[str] = []

    def __call__(self, inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        outputs = []
        for each in inputs:
            image = read_named_image(each["file_name"])
            found = self._detect(image)
            self.found.append(found)
            self.files.append(each["file_name"])
            outputs.append({"instances": as_instances(found, image.shape[:2])})
        return outputs


class ModelRecorder:
    """Runs a Detectron2 model, and keeps what it found."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.found: List[Detections] = []
        self.files: List[str] = []

    def __call__(self, inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """
        Raises:
            ValueError: the model gives numbers that are not finite.
        """
        with watch_outputs(self._model) as watch:
            outputs = self._model(inputs)
        if not watch.is_finite:
            raise ValueError(NOT_FINITE)
        for each, output in zip(inputs, outputs):
            found = output["instances"].to("cpu")
            boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
            self.found.append(Detections(boxes.numpy(), scores.numpy(), classes.numpy()))
            self.files.append(each["file_name"])
        return outputs
