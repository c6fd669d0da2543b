"""What every exported detector that is one file does, whatever its network runs in; torch is not needed."""

import abc
import os
from typing import Any, List, Sequence

import numpy as np

from qmimic_d2.error_text import one_line
from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.preprocessing import NOT_FINITE, Detections, InputSpec
from qmimic_d2.image_file import as_bgr_image

__all__ = ["ExportedDetector"]


class ExportedDetector(abc.ABC):
    """
    From an image to detections: preparation, network, and back to pixels of the image.

    It may be pickled, for example for ``multiprocessing``: the other process opens the file again.

    Attributes:
        description: what the file tells about itself.
    """

    def __init__(self, path: str, description: str, arguments: Sequence[Any]):
        """
        Args:
            path: of the file, for the error message.
            description: JSON, as the file holds it; "" where it holds none.
            arguments: of the class, behind the path, with which it is opened again.

        Raises:
            ValueError: the description is not one of this package's.
        """
        self._path = path
        self._arguments = (os.path.abspath(path), *arguments)
        try:
            self.description = ModelDescription.from_json(description)
        except ValueError as error:
            raise ValueError(f"{path!r} was not written by `python -m qmimic_d2 export`: it holds {error}") from error

    def __reduce__(self):
        return type(self), self._arguments

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
            ValueError: another shape or dtype; the network cannot run, or gives what is no detection; names the file.
        """
        pixels, placement = self.input_spec.prepare(as_bgr_image(image))
        return placement.restore(*self._checked(self._outputs(pixels)))

    def _outputs(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        try:
            return self.run_network(pixels)
        except Exception as error:  # every runtime has exceptions of its own
            raise ValueError(f"{self._path!r} cannot run: {one_line(error)}") from error

    def _checked(self, outputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs, which are boxes, scores and classes of one number of detections."""
        shapes = [np.shape(each) for each in outputs]
        count = shapes[1][0] if len(shapes) == 3 and len(shapes[1]) == 1 else -1
        if shapes != [(count, 4), (count,), (count,)]:
            raise ValueError(f"{self._path!r} gives outputs of shapes {shapes}, not boxes, scores and classes")
        boxes, scores, classes = outputs
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"{self._path!r}: {NOT_FINITE}")
        known = len(self.description.classes)
        if count and not (0 <= classes.min() and classes.max() < known):
            raise ValueError(
                f"{self._path!r} detects the class index {int(classes.max())}, and its description names {known} "
                "classes; export it again"
            )
        return outputs

    @abc.abstractmethod
    def run_network(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        """
        The network alone.

        Args:
            pixels: shape (3, h, w), float32, as ``input_spec.prepare`` makes it.

        Returns:
            Boxes (N, 4) in pixels of the input, scores (N,), classes (N,).
        """
