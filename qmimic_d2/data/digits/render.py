"""
Paints the images of the ``digits_det`` data sets: what a data set is (:class:`DigitsSpec`), and
image number i of it (:class:`DigitsPainter`).

Where things stand is decided in numpy alone, from the scans and the random numbers, so that the
annotations are the same on every machine; OpenCV only touches pixels.

Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.

Shape letters used in this module:

    H, W    height and width of an image or of one painted glyph, pixels
"""

import hashlib
import math
from dataclasses import dataclass
from typing import List, Tuple

import cv2
import numpy as np

from qmimic_d2.data.digits.glyphs import (
    GLYPH_SIZE,
    INK_MAX,
    load_photographs,
    load_scans,
    make_distractors,
)

__all__ = ["DigitsSpec", "DigitsPainter"]

Box = Tuple[int, int, int, int]

# Ink where a glyph is at least half opaque: that is what boxes enclose.
INK_ALPHA = 128
# Share of full ink at which a stroke ends, and how sharply it ends.
_STROKE_LEVEL = 0.5
_STROKE_SLOPE = 1.5
# Glyphs are interpolated to this many samples per scan pixel before they are rotated, with a
# margin of scan pixels for the interpolation to run out in.
_OVERSAMPLING = 8
_MARGIN = 2
# Width of a glyph relative to its scan.
_ASPECT = (0.85, 1.15)
# Side of the crop taken from a photograph, relative to the image it becomes.
_CROP_SCALE = (1.0, 2.0)
_COLOR_SPREAD = 70.0
_LUMA_BGR = np.array([0.114, 0.587, 0.299])

_NUM_DISTRACTORS = 1500
_POSITION_TRIALS = 30
_LAYOUT_TRIALS = 200


@dataclass(frozen=True)
class DigitsSpec:
    """
    One data set of handwritten digits on photographs, to the last pixel: the same spec gives
    the same data. All ranges include both ends.

    Attributes:
        name: name of the data set, also of its directory, and the seed of its randomness.
        split: "train" or "val": whose handwriting is used; no scan is in both.
        num_images: number of images.
        image_size: side of the square images, pixels.
        digits_per_image: range of the number of digits.
        distractors_per_image: range of the number of unlabelled pieces of digits.
        size: range of the side of a scan once painted, pixels. The height of an upright digit.
        max_rotation: largest rotation to either side, degrees. Below 90 for 6 to differ from 9.
        contrast: range of the difference in brightness between a digit and what is behind it,
            grey levels of 255; as much of it as fits where black or white are reached.
        max_iou: largest IoU of the boxes of two objects.
        max_cover: largest share of a box that another one may cover.

    Raises:
        ValueError: for values that make no data set.
    """

    name: str
    split: str
    num_images: int
    image_size: int = 128
    digits_per_image: Tuple[int, int] = (5, 8)
    distractors_per_image: Tuple[int, int] = (0, 0)
    size: Tuple[int, int] = (24, 40)
    max_rotation: float = 12.0
    contrast: Tuple[float, float] = (110.0, 200.0)
    max_iou: float = 0.1
    max_cover: float = 0.25

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(f"DigitsSpec {self.name!r}: {message}")

        require(
            self.name and not set(self.name) & set("/\\:") and self.name.strip(". "),
            "name must be usable as the name of a directory.",
        )
        require(self.split in ("train", "val"), f"split is {self.split!r}; use 'train' or 'val'.")
        require(self.num_images > 0, f"num_images is {self.num_images}; use 1 or more.")
        for key, least in (
            ("digits_per_image", 0),
            ("distractors_per_image", 0),
            ("size", GLYPH_SIZE),
            ("contrast", 0),
        ):
            low, high = getattr(self, key)
            require(
                least <= low <= high,
                f"{key} is {(low, high)}; it must be (low, high) with {least} <= low <= high.",
            )
        require(
            2 * self.size[1] <= self.image_size,
            f"size goes up to {self.size[1]}; use at most half the image_size {self.image_size}.",
        )
        require(0 <= self.max_rotation < 90, "max_rotation must be in [0, 90) degrees.")


class DigitsPainter:
    """Paints the images of a :class:`DigitsSpec`, each on its own and in any order."""

    def __init__(self, spec: DigitsSpec):
        """
        Args:
            spec: the data set.

        Raises:
            ImportError: scikit-learn, which brings the scans and photographs, is not installed.
        """
        self._spec = spec
        self._scans, self._labels = load_scans(spec.split)
        self._photographs = load_photographs()
        with_distractors = spec.distractors_per_image[1] > 0
        self._distractors = make_distractors(
            self._scans,
            self._labels,
            _NUM_DISTRACTORS if with_distractors else 0,
            _random(spec.name, "distractors"),
        )

    def paint(self, index: int) -> Tuple[np.ndarray, List[Tuple[int, Box]]]:
        """
        Args:
            index: number of the image, from 0.

        Returns:
            image: (H, W, 3) uint8, BGR.
            digits: for each digit, what was written (0 to 9) and the tight box around its ink,
                inside the image, as if nothing were painted over it. Distractors are not listed.

        Raises:
            ValueError: the objects do not fit into the image.
        """
        rng = _random(self._spec.name, index)
        for _ in range(_LAYOUT_TRIALS):
            objects = self._layout(rng)
            if objects is not None:
                break
        else:
            raise ValueError(
                f"DigitsSpec {self._spec.name!r}: the objects of image {index} do not fit; use "
                "fewer or smaller ones, or a larger image_size, max_iou or max_cover."
            )
        image = self._background(rng)
        for _, alpha, box, ink in objects:
            self._blend(image, alpha, (box[0] - ink[0], box[1] - ink[1]), rng)
        return image, [(label, box) for label, _, box, _ in objects if label >= 0]

    def _layout(self, rng):
        """
        Glyphs and their places, in the order of painting: (label, alpha, box in the image, ink
        box in alpha), label -1 for distractors. None if one found no place.
        """
        spec = self._spec
        num_digits = int(rng.integers(spec.digits_per_image[0], spec.digits_per_image[1] + 1))
        low, high = spec.distractors_per_image
        num_distractors = int(rng.integers(low, high + 1))
        is_digit = np.arange(num_digits + num_distractors) < num_digits
        rng.shuffle(is_digit)

        objects = []
        for digit in is_digit:
            source = self._scans if digit else self._distractors
            number = int(rng.integers(len(source)))
            alpha, ink = _render_glyph(
                source[number],
                size=float(rng.integers(spec.size[0], spec.size[1] + 1)),
                aspect=float(rng.uniform(*_ASPECT)),
                rotation=float(rng.uniform(-spec.max_rotation, spec.max_rotation)),
            )
            box = self._place(ink, [box for _, _, box, _ in objects], rng)
            if box is None:
                return None
            objects.append((int(self._labels[number]) if digit else -1, alpha, box, ink))
        return objects

    def _place(self, ink, placed, rng):
        spec = self._spec
        width, height = ink[2] - ink[0], ink[3] - ink[1]
        for _ in range(_POSITION_TRIALS):
            x = int(rng.integers(spec.image_size - width + 1))
            y = int(rng.integers(spec.image_size - height + 1))
            box = (x, y, x + width, y + height)
            overlaps = [_overlap(box, other) for other in placed]
            if all(iou <= spec.max_iou and cover <= spec.max_cover for iou, cover in overlaps):
                return box
        return None

    def _background(self, rng):
        size = self._spec.image_size
        photograph = self._photographs[int(rng.integers(len(self._photographs)))]
        height, width = photograph.shape[:2]
        largest = min(height, width, int(size * _CROP_SCALE[1]))
        side = int(rng.integers(min(largest, int(size * _CROP_SCALE[0])), largest + 1))
        y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = photograph[y : y + side, x : x + side]
        if rng.integers(2):
            crop = crop[:, ::-1]
        return cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=cv2.INTER_AREA)

    def _blend(self, image, alpha, corner, rng):
        """Paints one glyph into image (H, W, 3), the upper left of alpha at corner (x, y)."""
        contrast, lighter = rng.uniform(*self._spec.contrast), bool(rng.integers(2))
        hue = rng.uniform(-_COLOR_SPREAD, _COLOR_SPREAD, size=3)

        # The soft rim of a glyph may reach over the border; its ink does not.
        x0, y0 = max(corner[0], 0), max(corner[1], 0)
        x1 = min(corner[0] + alpha.shape[1], image.shape[1])
        y1 = min(corner[1] + alpha.shape[0], image.shape[0])
        alpha = alpha[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        window = image[y0:y1, x0:x1].astype(np.int64)

        behind = float((window[alpha >= INK_ALPHA] @ _LUMA_BGR).mean())
        color = np.rint(_contrasting_color(behind, contrast, lighter, hue)).astype(np.int64)
        opacity = alpha.astype(np.int64)[:, :, None]
        blended = (window * (255 - opacity) + color * opacity + 127) // 255
        image[y0:y1, x0:x1] = blended.astype(np.uint8)


def _random(*key) -> np.random.Generator:
    """A stream of its own for every key, so that no image depends on those before it."""
    seed = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    # PCG64 by name: numpy may change what default_rng() is.
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "little")))


def _overlap(box: Box, other: Box) -> Tuple[float, float]:
    """IoU of two boxes, and the share of the smaller one that the other covers."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0, 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    shared = width * height
    return shared / (sum(areas) - shared), shared / min(areas)


def _contrasting_color(
    behind: float, contrast: float, lighter: bool, hue: np.ndarray
) -> np.ndarray:
    """
    A colour whose luma is ``contrast`` grey levels from ``behind``, on the wanted side if there
    is room for it, else on the side with more room.

    Returns:
        (3,) float64 in [0, 255], BGR.
    """
    room = {True: 255.0 - behind, False: behind}
    if room[lighter] < contrast:
        lighter = room[True] > room[False]
    step = min(contrast, room[lighter])
    luma = behind + step if lighter else behind - step
    # The hue leaves the luma as it is and shrinks where a channel would leave its range.
    hue = hue - hue @ _LUMA_BGR
    limits = np.where(hue > 0, 255.0 - luma, luma)
    return luma + hue * min(1.0, float(np.min(limits / np.maximum(np.abs(hue), 1e-6))))


def _render_glyph(
    glyph: np.ndarray, size: float, aspect: float, rotation: float
) -> Tuple[np.ndarray, Box]:
    """
    Args:
        glyph: (8, 8), 0 is paper and 16 is ink.
        size: side of the scan once painted, pixels.
        aspect: its width is ``aspect * size``.
        rotation: degrees, clockwise.

    Returns:
        alpha: (H, W) uint8, opacity of the stroke.
        ink: tight box in alpha of what is at least half opaque.
    """
    smooth = _CUBIC @ np.pad(glyph / INK_MAX, _MARGIN) @ _CUBIC.T
    side = int(math.ceil(size * 1.6))
    offsets = np.arange(side) - (side - 1) / 2
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    x = (cos * offsets[None, :] + sin * offsets[:, None]) / aspect
    y = cos * offsets[:, None] - sin * offsets[None, :]
    to_samples = _OVERSAMPLING * GLYPH_SIZE / size
    value = _sample(smooth, x * to_samples, y * to_samples)

    # Strokes keep an edge about one pixel wide however much the scan is enlarged.
    opacity = 0.5 + (value - _STROKE_LEVEL) * _STROKE_SLOPE * size / GLYPH_SIZE
    alpha = np.rint(np.clip(opacity, 0.0, 1.0) * 255).astype(np.uint8)
    ink = alpha >= INK_ALPHA
    columns, rows = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
    return alpha, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _sample(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of a square array at (x, y) from its centre; zero outside."""
    last = len(values) - 1
    x, y = x + last / 2, y + last / 2
    inside = (x >= 0) & (x <= last) & (y >= 0) & (y <= last)
    x, y = np.clip(x, 0, last), np.clip(y, 0, last)
    x0 = np.minimum(x.astype(np.int64), last - 1)
    y0 = np.minimum(y.astype(np.int64), last - 1)
    fx, fy = x - x0, y - y0
    upper = values[y0, x0] * (1 - fx) + values[y0, x0 + 1] * fx
    lower = values[y0 + 1, x0] * (1 - fx) + values[y0 + 1, x0 + 1] * fx
    return np.where(inside, upper * (1 - fy) + lower * fy, 0.0)


def _cubic_weights(size_in: int, factor: int) -> np.ndarray:
    """Cubic convolution (Keys, a = -0.5) by ``factor``, as a (factor * size_in, size_in) matrix."""
    at = (np.arange(factor * size_in) + 0.5) / factor - 0.5
    t = np.abs(at[:, None] - np.arange(size_in)[None, :])
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


_CUBIC = _cubic_weights(GLYPH_SIZE + 2 * _MARGIN, _OVERSAMPLING)
