"""The official evaluation of WIDER FACE."""

from qmimic_d2.evaluation.wider_face.evaluator import WiderFaceEvaluator

__all__ = ["WiderFaceEvaluator"]
