"""
What happens to an image before a network sees it, and to boxes afterwards: numpy and Pillow alone.

Every form of an exported detector, and the eager one, is fed by :meth:`InputSpec.prepare`, and none
imports torch for it.

Shape letters:
    H, W: height and width of an image in its own pixels.
    h, w: height and width of the network's input, in its pixels.
    N: number of detections.
"""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Tuple

import numpy as np

from qmimic_d2.image_file import Image

__all__ = ["NOT_FINITE", "Detections", "InputSpec", "Placement", "resize_bilinear"]

NOT_FINITE = (
    "the detector's outputs are NaN or infinite, so that it could find nothing; its training diverged, or the image "
    "holds values that it was never trained on"
)


@dataclass(frozen=True)
class Detections:
    """
    What a detector found in one image, by falling score.

    Attributes:
        boxes: shape (N, 4), float32, XYXY in pixels of the image itself.
        scores: shape (N,), float32, 0 to 1.
        classes: shape (N,), int64, indices into the detector's class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """Those whose score reaches the threshold."""
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.scores[keep], self.classes[keep])


@dataclass(frozen=True)
class Placement:
    """
    Where an image lies in the network's input: at its top left, resized.

    Attributes:
        height, width: of the image itself, in its pixels.
        resized_height, resized_width: of its copy in the network's input.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int

    def restore(self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> Detections:
        """
        The network's detections in pixels of the image, clipped to it; boxes that are then empty go.

        The same float32 arithmetic as Detectron2's ``detector_postprocess``.

        Args:
            boxes: shape (N, 4), XYXY in pixels of the network's input.
            scores, classes: shape (N,).

        Raises:
            ValueError: a number is not finite.
        """
        boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(scores, dtype=np.float32)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(NOT_FINITE)
        boxes[:, 0::2] *= np.float32(self.width / self.resized_width)
        boxes[:, 1::2] *= np.float32(self.height / self.resized_height)
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, self.width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, self.height)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(
            boxes[keep],
            scores[keep],
            np.asarray(classes, dtype=np.int64)[keep],
        )


@dataclass(frozen=True)
class InputSpec:
    """
    How an image becomes a network's input.

    Attributes:
        format: order of the network's channels, "BGR" or "RGB".
        min_size, max_size: the shorter side is brought to ``min_size`` pixels, unless the longer one would
            then exceed ``max_size``; ``min_size`` 0 leaves the image as it is. As Detectron2's
            ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``.
        fixed_height, fixed_width: of an input of one size, into which the image is fitted with its aspect
            ratio kept; 0 and 0 for an input of any size.
        least: neither side of the input is shorter, in pixels: the coarsest stride of the network, below
            which a feature map would have no cell.
        pixel_mean, pixel_std: per channel, in the order of ``format``, in grey levels. The network itself
            normalizes with them; here the mean fills what lies beside and below the image, so that it is
            0 behind the normalization, like Detectron2's own padding.
    """

    format: str
    min_size: int
    max_size: int
    fixed_height: int = 0
    fixed_width: int = 0
    least: int = 1
    pixel_mean: Tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: Tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT is {self.format!r}; images are given as BGR or RGB")
        if (self.fixed_height > 0) != (self.fixed_width > 0) or min(self.fixed_height, self.fixed_width) < 0:
            raise ValueError(f"a fixed size has both sides, not {self.fixed_height} x {self.fixed_width}")
        if self.min_size < 0 or (self.min_size > 0 and self.max_size < 1):
            raise ValueError(
                f"INPUT.MIN_SIZE_TEST is {self.min_size} and INPUT.MAX_SIZE_TEST {self.max_size}; give sizes in "
                "pixels, or MIN_SIZE_TEST 0 for images as they are"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether every input has one and the same size."""
        return self.fixed_height > 0

    def to_dict(self) -> Dict[str, Any]:
        """As plain numbers, strings and lists, for JSON."""
        return {key: list(each) if isinstance(each, tuple) else each for key, each in asdict(self).items()}

    def resized(self, height: int, width: int) -> Tuple[int, int]:
        """
        Height and width of the resized image, at least one pixel each.

        As Detectron2's ``ResizeShortestEdge``, or the largest that a fixed size holds.
        """
        if self.is_fixed:
            scale = min(self.fixed_height / height, self.fixed_width / width)
            new_height = min(int(height * scale + 0.5), self.fixed_height)
            new_width = min(int(width * scale + 0.5), self.fixed_width)
        elif self.min_size == 0:
            new_height, new_width = height, width
        else:
            scale = self.min_size * 1.0 / min(height, width)
            exact = (self.min_size, scale * width) if height < width else (scale * height, self.min_size)
            if max(exact) > self.max_size:
                shrink = self.max_size * 1.0 / max(exact)
                exact = (exact[0] * shrink, exact[1] * shrink)
            new_height, new_width = int(exact[0] + 0.5), int(exact[1] + 0.5)
        return max(new_height, 1), max(new_width, 1)

    def prepare(self, image: np.ndarray) -> Tuple[np.ndarray, Placement]:
        """
        Args:
            image: shape (H, W, 3), BGR, uint8.

        Returns:
            The network's input, shape (3, h, w), float32, in grey levels; and where the image lies in it.
        """
        height, width = image.shape[:2]
        new_height, new_width = self.resized(height, width)
        resized = resize_bilinear(np.ascontiguousarray(image), new_height, new_width)
        if self.format == "RGB":
            resized = resized[:, :, ::-1]
        pixels = np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32)
        padded_height = self.fixed_height or max(new_height, self.least)
        padded_width = self.fixed_width or max(new_width, self.least)
        if (padded_height, padded_width) != (new_height, new_width):
            canvas = np.empty((3, padded_height, padded_width), np.float32)
            canvas[:] = np.asarray(self.pixel_mean, np.float32)[:, None, None]
            canvas[:, :new_height, :new_width] = pixels
            pixels = canvas
        return pixels, Placement(height, width, new_height, new_width)


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    ``PIL.Image.resize`` with ``BILINEAR``: what Detectron2 resizes with.

    Args:
        image: shape (H, W, 3), uint8.

    Returns:
        shape (height, width, 3), uint8.
    """
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))
