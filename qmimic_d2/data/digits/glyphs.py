"""
The handwriting behind the ``digits_det`` data sets: real digits, and pieces of them.

A glyph is one 8x8 scan as scikit-learn ships it: integers from 0 (paper) to 16 (ink).

Shape letters used in this module:

    S   number of scans
    D   number of distractors
    C   number of classes (10)
    E   elements of a normalised glyph (64)
"""

from typing import Dict, List, Tuple

import numpy as np

__all__ = ["GLYPH_SIZE", "INK_MAX", "load_scans", "load_photographs", "make_distractors"]

GLYPH_SIZE = 8
INK_MAX = 16

# Scans before this one are for training, the rest for validation: 1,297 and 500 digits. A split by
# position is stricter than a random one, because scans that stand close together resemble each
# other: the nearest training scan names 96% of these validation digits, 98.5% of random ones.
FIRST_VAL_SCAN = 1297

_HALF = GLYPH_SIZE // 2
_SIDES: Dict[str, Tuple[slice, slice]] = {
    "top": (slice(0, _HALF), slice(None)),
    "bottom": (slice(_HALF, None), slice(None)),
    "left": (slice(None), slice(0, _HALF)),
    "right": (slice(None), slice(_HALF, None)),
}
_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}

# What a distractor may be made of. Halves that read as a digit by themselves are left out after
# looking at them: the loop of a 6, 8 or 9 is a small 0; the stem of a 4, 7 or 9 is a 1; mirrored
# halves of 0, 1, 3 and 8 are whole digits again; the top of a 2 over the bottom of a 3 is a 3.
_HALVES = {
    "top": (0, 2, 3, 4, 5),
    "bottom": (0, 2, 3, 4, 5),
    "left": (2, 3, 5, 9),
    "right": (5, 6),
}
_MIRRORED = {
    "top": (4, 5),
    "bottom": (2,),
    "left": (2, 7),
    "right": (2, 4),
}
_PAIRS = {
    "top": ((4, 1), (4, 2), (5, 2), (5, 7), (6, 1)),
    "left": ((2, 4), (3, 4), (7, 4)),
}

# A candidate is dropped when it still comes too near to a real digit: cosine distance to the
# three nearest scans of a class, and that distance relative to the second nearest class. Of the
# real scans, each compared with all others, these two limits recognise 98.6%.
_MIN_DISTANCE = 0.05
_MIN_RATIO = 0.7
_NEAREST = 3
# Ink from which a pixel counts when the extent of a glyph is measured.
_INK_THRESHOLD = 4
# A candidate with fewer dark pixels than this is a speck.
_MIN_DARK_PIXELS = 8


def _import_sklearn_datasets():
    try:
        import sklearn.datasets
    except ImportError as e:
        raise ImportError(
            "The digits_det data sets are made from the scans and photographs that come with "
            "scikit-learn, which is not installed. Install it with: pip install scikit-learn"
        ) from e
    return sklearn.datasets


def load_scans(split: str) -> Tuple[np.ndarray, np.ndarray]:
    """
    The handwritten digits of one split. No scan is in both.

    Args:
        split: "train", "val", or "all" for both.

    Returns:
        scans: (S, 8, 8) int64, 0 is paper and 16 is ink.
        labels: (S,) int64, the digit written, 0 to 9.

    Raises:
        ValueError: for another split.
        ImportError: scikit-learn is not installed.
    """
    parts = {
        "train": slice(0, FIRST_VAL_SCAN),
        "val": slice(FIRST_VAL_SCAN, None),
        "all": slice(None),
    }
    if split not in parts:
        raise ValueError(f"Unknown split {split!r}; use one of {sorted(parts)}.")
    digits = _import_sklearn_datasets().load_digits()
    part = parts[split]
    return digits.images[part].astype(np.int64), digits.target[part].astype(np.int64)


def load_photographs() -> List[np.ndarray]:
    """
    Returns:
        The two photographs that come with scikit-learn (a temple, a flower), each
        (427, 640, 3) uint8 in BGR order.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images = _import_sklearn_datasets().load_sample_images().images
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in images]


def make_distractors(
    scans: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Pieces of digits that are no digit: half a digit, two halves of different digits, and half a
    digit with its own mirror image. What lies too near to any real scan is not used.

    Args:
        scans: (S, 8, 8) scans to take the pieces from, all ten digits among them.
        labels: (S,) their digits.
        count: D, how many to make.
        rng: source of randomness; the same state gives the same distractors.

    Returns:
        (D, 8, 8) int64, ink as in the scans.
    """
    by_class = [scans[labels == digit] for digit in range(10)]
    digits = _DigitLikeness()
    distractors = []
    while len(distractors) < count:
        # Kinds take turns, so that the strictness of the test below does not change their shares.
        make = (_half, _two_halves, _mirrored_half)[len(distractors) % 3]
        candidate = make(by_class, rng)
        if (candidate >= INK_MAX // 2).sum() < _MIN_DARK_PIXELS:
            continue
        if not digits.resembles(candidate):
            distractors.append(candidate)
    return np.stack(distractors) if distractors else np.zeros((0, 8, 8), dtype=np.int64)


def _choose(options, rng):
    return options[int(rng.integers(len(options)))]


def _recipe(table, rng):
    return _choose([(side, what) for side in sorted(table) for what in table[side]], rng)


def _half(by_class, rng):
    side, digit = _recipe(_HALVES, rng)
    glyph = np.zeros((GLYPH_SIZE, GLYPH_SIZE), dtype=np.int64)
    glyph[_SIDES[side]] = _choose(by_class[digit], rng)[_SIDES[side]]
    return glyph


def _two_halves(by_class, rng):
    side, (digit, other) = _recipe(_PAIRS, rng)
    glyph = _choose(by_class[other], rng).copy()
    glyph[_SIDES[side]] = _choose(by_class[digit], rng)[_SIDES[side]]
    return glyph


def _mirrored_half(by_class, rng):
    side, digit = _recipe(_MIRRORED, rng)
    glyph = _choose(by_class[digit], rng).copy()
    mirrored = glyph[::-1] if side in ("top", "bottom") else glyph[:, ::-1]
    opposite = _SIDES[_OPPOSITE[side]]
    glyph[opposite] = mirrored[opposite].copy()
    return glyph


class _DigitLikeness:
    """Tells whether a glyph lies so near to the real scans that it may be read as a digit."""

    def __init__(self):
        scans, labels = load_scans("all")
        self._by_class = [
            np.stack([_normalise(scan) for scan in scans[labels == digit]]) for digit in range(10)
        ]

    def resembles(self, glyph: np.ndarray) -> bool:
        normalised = _normalise(glyph)
        distances = np.sort(
            [
                np.sort(2.0 - 2.0 * references @ normalised)[:_NEAREST].mean()
                for references in self._by_class
            ]
        )
        return bool(distances[0] < _MIN_DISTANCE or distances[0] < _MIN_RATIO * distances[1])


def _normalise(glyph: np.ndarray) -> np.ndarray:
    """
    Crops to the ink, scales the longer side to 8 pixels, centres, blurs, and scales to unit
    length, so that neither size, place nor darkness count in a comparison.

    Args:
        glyph: (8, 8) with some ink.

    Returns:
        (E,) float64 of unit length.
    """
    ink = glyph >= _INK_THRESHOLD
    rows, cols = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    crop = glyph[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].astype(np.float64)
    scale = GLYPH_SIZE / max(crop.shape)
    height, width = (max(1, int(side * scale + 0.5)) for side in crop.shape)
    resized = _linear_weights(crop.shape[0], height) @ crop @ _linear_weights(crop.shape[1], width).T

    framed = np.zeros((GLYPH_SIZE + 2, GLYPH_SIZE + 2))
    top, left = 1 + (GLYPH_SIZE - height) // 2, 1 + (GLYPH_SIZE - width) // 2
    framed[top : top + height, left : left + width] = resized
    framed = framed[:-2] + 2 * framed[1:-1] + framed[2:]
    framed = framed[:, :-2] + 2 * framed[:, 1:-1] + framed[:, 2:]
    return framed.reshape(-1) / np.linalg.norm(framed)


def _linear_weights(size_in: int, size_out: int) -> np.ndarray:
    """Linear interpolation between pixel centres as a (size_out, size_in) matrix."""
    at = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    at = np.clip(at, 0, size_in - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(size_in)[None, :]))
