"""
The official evaluation of WIDER FACE: average precision on the subsets easy, medium and hard.

What it does, as the evaluation tool at http://shuoyang1213.me/WIDERFACE/ and its Python port
(https://github.com/wondervictor/WiderFace-Evaluation/blob/53474e0d35ecdd019052d4fff0813ea4037bd0cd/evaluation.py) do:

1. Scores are mapped to 0 .. 1 by the least and the greatest score of the whole set.
2. In the order of falling scores, each detection of an image takes the face with which its IoU is greatest, taken or
   not; from 0.5 on it is a hit. A hit on a face outside of the subset is not counted at all. The first hit on a face
   of the subset recalls it. Everything else counts as a wrong detection.
3. At each of 1000 thresholds 1 - t / 1000, t = 1 .. 1000, the counted detections and the recalled faces of all images
   give precision and recall. Images of which the ground truth has no box are left out.
4. AP is the area under the curve, each precision replaced by the greatest at equal or higher recall (Pascal VOC 2010).

Widths are x1 - x0 + 1 in the IoU, x1 = x + w. docs/wider_face.md tells where the tool and its port differ.

Shape letters used in this module:

    D   detections of one image
    G   faces of one image
    T   thresholds
"""

import logging
from typing import Dict, List, Mapping, Tuple

import numpy as np

from qmimic_d2.evaluation.wider_face.ground_truth import SUBSETS, WiderFaceGroundTruth

__all__ = ["average_precision", "evaluate_predictions", "pairwise_iou"]

logger = logging.getLogger(__name__)

IOU_THRESHOLD = 0.5
NUM_THRESHOLDS = 1000

# Rising, each as the tool computes it: 1 - t / 1000.
_THRESHOLDS = 1 - np.arange(NUM_THRESHOLDS, 0, -1) / NUM_THRESHOLDS


def evaluate_predictions(
    ground_truth: WiderFaceGroundTruth, predictions: Mapping[str, np.ndarray]
) -> Dict[str, float]:
    """
    Args:
        ground_truth: of the validation set, or of any other.
        predictions: per image id (D, 5): x, y, w, h in pixels and the score, in any order. An image without
            any may be missing; one that is not in the ground truth does not count, not even in step 1.

    Returns:
        AP, 0 to 1, by the name of the subset. NaN for a subset without a face. 0.0 where all scores are equal:
        they cannot be mapped to 0 .. 1, and no detection then reaches a threshold.
    """
    scores = _Scores([predictions[each][:, 4] for each in ground_truth.boxes if each in predictions])
    counted: Dict[str, np.ndarray] = {subset: np.zeros(NUM_THRESHOLDS + 1, dtype=np.int64) for subset in SUBSETS}
    recalled: Dict[str, np.ndarray] = {subset: np.zeros(NUM_THRESHOLDS + 1, dtype=np.int64) for subset in SUBSETS}
    for image_id, boxes in ground_truth.boxes.items():
        detections = predictions.get(image_id)
        if not scores.are_usable or detections is None or not len(detections) or not len(boxes):
            continue
        # Equal scores stay in their order.
        detections = detections[np.argsort(-detections[:, 4], kind="stable")]
        levels = scores.levels(detections[:, 4])
        iou = pairwise_iou(detections[:, :4], boxes)
        faces = iou.argmax(axis=1)
        is_hit = iou[np.arange(len(faces)), faces] >= IOU_THRESHOLD
        for subset in SUBSETS:
            is_kept = ground_truth.kept[subset][image_id][faces]
            counted[subset] += np.bincount(levels[~is_hit | is_kept], minlength=NUM_THRESHOLDS + 1)
            hits = np.flatnonzero(is_hit & is_kept)
            _, first = np.unique(faces[hits], return_index=True)
            recalled[subset] += np.bincount(levels[hits[first]], minlength=NUM_THRESHOLDS + 1)
    results = {}
    for subset in SUBSETS:
        num_faces = sum(int(kept.sum()) for kept in ground_truth.kept[subset].values())
        num_counted, num_recalled = (np.cumsum(each[subset])[:NUM_THRESHOLDS] for each in (counted, recalled))
        # No detection: the tool has 0 / 0 there, which its curve passes over; no face is recalled at that point.
        precision = num_recalled / np.maximum(num_counted, 1)
        results[subset] = average_precision(num_recalled / num_faces, precision) if num_faces else float("nan")
    return results


class _Scores:
    """
    Step 1, and which threshold a score is the first to reach.

    Attributes:
        are_usable: whether two scores differ.
    """

    def __init__(self, scores: List[np.ndarray]):
        limits = np.finfo(np.float32)  # the tool begins its search with realmin('single') and realmax('single')
        self._least = min([float(limits.max), *(float(each.min()) for each in scores if each.size)])
        self._greatest = max([float(limits.tiny), *(float(each.max()) for each in scores if each.size)])
        self.are_usable = self._greatest > self._least
        if not self.are_usable and any(each.size for each in scores):
            logger.warning("All scores are equal, so no detection counts and the AP is 0")

    def levels(self, scores: np.ndarray) -> np.ndarray:
        """(D,) scores -> (D,) t - 1 of the greatest threshold that each reaches; 1000 for none."""
        normalized = (scores - self._least) / (self._greatest - self._least)
        return NUM_THRESHOLDS - np.searchsorted(_THRESHOLDS, normalized, side="right")


def pairwise_iou(detections: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    Args:
        detections: (D, 4) x, y, w, h.
        faces: (G, 4) x, y, w, h.

    Returns:
        (D, G) IoU, where both corners belong to a box: its width is w + 1.
    """
    x0, y0, x1, y1 = _corners(detections[:, None])
    face_x0, face_y0, face_x1, face_y1 = _corners(faces[None])
    width = np.minimum(x1, face_x1) - np.maximum(x0, face_x0) + 1
    height = np.minimum(y1, face_y1) - np.maximum(y0, face_y0) + 1
    overlaps = (width > 0) & (height > 0)
    shared = width * height
    union = (x1 - x0 + 1) * (y1 - y0 + 1) + (face_x1 - face_x0 + 1) * (face_y1 - face_y0 + 1) - shared
    return np.divide(shared, union, out=np.zeros(overlaps.shape), where=overlaps)


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """
    Args:
        recall: (T,) rising.
        precision: (T,) at these.

    Returns:
        The area under the curve, each precision replaced by the greatest at equal or higher recall.
    """
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))


def _corners(boxes: np.ndarray) -> Tuple[np.ndarray, ...]:
    x, y, width, height = np.moveaxis(boxes, -1, 0)
    return x, y, x + width, y + height
