"""
From a trained student to a detector on a device.

``OnnxDetector`` and what it stands on need numpy, Pillow and onnxruntime; the rest, which makes the files, is
imported when it is asked for, and needs torch and Detectron2.
"""

import importlib

from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.onnx.detector import OnnxDetector
from qmimic_d2.export.preprocessing import Detections, InputSpec
from qmimic_d2.export.raw.decoding import Decoding
from qmimic_d2.export.torchscript.detector import TorchScriptDetector

# Names whose modules import torch, and those modules.
_WITH_TORCH = {
    "StudentExport": "student",
    "build_student": "student",
    "describe_model": "network",
    "describe_raw": "raw.network",
    "export_onnx": "onnx.file",
    "export_student": "student",
    "export_torchscript": "torchscript.file",
    "quantize_onnx": "onnx.int8",
}

__all__ = [
    "Decoding",
    "Detections",
    "InputSpec",
    "ModelDescription",
    "OnnxDetector",
    "TorchScriptDetector",
    *_WITH_TORCH,
]


def __getattr__(name: str):
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"qmimic_d2.export.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
