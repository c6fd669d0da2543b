"""Runs an exported ONNX detector with numpy and onnxruntime; torch is not needed, nor is Detectron2."""

import os
from typing import Optional, Sequence

import numpy as np

from qmimic_d2.export.description import METADATA_KEY
from qmimic_d2.export.exported_detector import ExportedDetector

__all__ = ["OnnxDetector"]


class OnnxDetector(ExportedDetector):
    """
    A detector in an ONNX file that ``python -m qmimic_d2 export`` wrote, float or int8::

        detector = OnnxDetector("model.onnx")
        found = detector(cv2.imread("photo.jpg"))
        for box, score, index in zip(found.boxes, found.scores, found.classes):
            print(detector.names[index], score, box)
    """

    def __init__(self, path: str, threads: int = 0, providers: Optional[Sequence[str]] = None):
        """
        Args:
            path: of the ``.onnx`` file.
            threads: that one operator may use; 0 leaves it to onnxruntime.
            providers: execution providers of onnxruntime, in order of preference; the CPU when left out.

        Raises:
            ImportError: onnxruntime is not installed.
            FileNotFoundError: there is no such file.
            ValueError: onnxruntime cannot read it, or it is not one of this package's.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                "an ONNX detector runs in onnxruntime, which is not installed: pip install onnxruntime, or this "
                "package with its extra, qmimic_d2[export]"
            ) from error
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no ONNX file {path!r}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # warnings about shapes that depend on the image
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=list(providers or ["CPUExecutionProvider"])
            )
        except Exception as error:  # onnxruntime has an exception of its own for every kind of damage
            raise ValueError(f"{path!r} is no ONNX file that onnxruntime can run: {error}") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        super().__init__(path, text)

    def run_network(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        return self._session.run(["boxes", "scores", "classes"], {"image": pixels})
