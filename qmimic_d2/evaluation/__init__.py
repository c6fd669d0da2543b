"""Evaluators of the paper's data sets."""

from qmimic_d2.evaluation.pascal_voc import PascalVOCEvaluator
from qmimic_d2.evaluation.wider_face.evaluator import WiderFaceEvaluator
from qmimic_d2.evaluation.wider_face.ground_truth import SUBSETS, WiderFaceGroundTruth, load_ground_truth
from qmimic_d2.evaluation.wider_face.predictions import read_predictions, write_predictions
from qmimic_d2.evaluation.wider_face.protocol import evaluate_predictions

__all__ = [
    "SUBSETS",
    "PascalVOCEvaluator",
    "WiderFaceEvaluator",
    "WiderFaceGroundTruth",
    "evaluate_predictions",
    "load_ground_truth",
    "read_predictions",
    "write_predictions",
]
