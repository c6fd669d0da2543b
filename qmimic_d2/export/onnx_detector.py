"""Runs an exported ONNX detector with numpy and onnxruntime; torch is not needed, nor is Detectron2."""

import os
from typing import List, Optional, Sequence

import numpy as np

from qmimic_d2.export.description import METADATA_KEY, ModelDescription
from qmimic_d2.export.preprocessing import Detections, InputSpec
from qmimic_d2.image_file import as_bgr_image

__all__ = ["OnnxDetector"]


class OnnxDetector:
    """
    A detector in an ONNX file that ``python -m qmimic_d2 export`` wrote, float or int8::

        detector = OnnxDetector("model.onnx")
        found = detector(cv2.imread("photo.jpg"))
        for box, score, index in zip(found.boxes, found.scores, found.classes):
            print(detector.names[index], score, box)

    Attributes:
        description: what the file tells about itself.
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
        try:
            self.description = ModelDescription.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path!r} was not written by `python -m qmimic_d2 export`: it holds {error}") from error

    @property
    def names(self) -> List[str]:
        """Class names, in the order of the indices in ``Detections.classes``."""
        return self.description.names

    @property
    def input_spec(self) -> InputSpec:
        """How an image becomes the network's input."""
        return self.description.input_spec

    def __call__(self, image: np.ndarray) -> Detections:
        """
        Args:
            image: as ``cv2.imread`` gives it: shape (H, W), (H, W, 1), (H, W, 3) in BGR or (H, W, 4) in BGRA,
                uint8 or uint16.

        Returns:
            Detections in pixels of the image, by falling score.

        Raises:
            ValueError: another shape or dtype.
        """
        pixels, placement = self.input_spec.prepare(as_bgr_image(image))
        return placement.restore(*self.run_network(pixels))

    def run_network(self, pixels: np.ndarray):
        """
        The network alone.

        Args:
            pixels: shape (3, h, w), float32, as ``input_spec.prepare`` makes it.

        Returns:
            Boxes (N, 4) in pixels of the input, scores (N,), classes (N,).
        """
        return self._session.run(["boxes", "scores", "classes"], {"image": pixels})
