"""Runs an exported ONNX detector with numpy and onnxruntime; torch is not needed, nor is Detectron2."""

import os
from typing import Optional, Sequence

import numpy as np

from qmimic_d2.error_text import one_line
from qmimic_d2.export.description import METADATA_KEY
from qmimic_d2.export.exported_detector import ExportedDetector

__all__ = ["OnnxDetector"]

# Names of what the network gives, if it is no raw one.
_OUTPUTS = ("boxes", "scores", "classes")


class OnnxDetector(ExportedDetector):
    """
    A detector in an ONNX file that ``python -m qmimic_d2 export`` wrote, float or int8, raw or not::

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
        options.log_severity_level = 4  # it writes errors to stderr besides raising them
        try:  # a fallback would print, and try the same again
            self._session = onnxruntime.InferenceSession(
                path, options, providers=list(providers or ["CPUExecutionProvider"]), enable_fallback=0
            )
            text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
            inputs = {each.name: (each.type, len(each.shape)) for each in self._session.get_inputs()}
            outputs = {each.name: tuple(each.shape) for each in self._session.get_outputs()}
        except Exception as error:  # onnxruntime has an exception of its own for every kind of damage
            raise ValueError(f"{path!r} is no ONNX file that onnxruntime can run: {one_line(error)}") from error
        super().__init__(path, text, [threads, providers])
        decoding = self.description.decoding
        # Type and number of axes of what the network takes, by name.
        takes = {"image": ("tensor(float)", 4 if decoding else 3)}
        if inputs != takes or not outputs.keys() >= set(decoding.output_shapes if decoding else _OUTPUTS):
            raise ValueError(
                f"{path!r} has the inputs {inputs} and the outputs {sorted(outputs)}; an exported detector has "
                f"{takes} and {sorted(decoding.output_shapes if decoding else _OUTPUTS)}"
            )
        for name, shape in decoding.output_shapes.items() if decoding else ():
            if outputs[name] != shape:
                raise ValueError(f"{path!r} gives {name!r} of shape {outputs[name]}, and its description says {shape}")

    def run_network(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        decoding = self.description.decoding
        names = list(decoding.output_shapes if decoding else _OUTPUTS)
        outputs = self._session.run(names, {"image": self.description.as_input(pixels)})
        return decoding.decode(outputs) if decoding else outputs
