"""
What the miniature data sets share: painted digits, and a folder that is there whole or not at all.

Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Tuple

import cv2
import numpy as np

from qmimic_d2.data.digits.render import DigitsPainter, DigitsSpec
from qmimic_d2.files import write_json

__all__ = ["LEAST_IMAGES", "PaintedImage", "covered_share", "paint_images", "publish"]

Box = Tuple[int, int, int, int]

# With fewer images per split, not every class and kind of record would be in each.
LEAST_IMAGES = 8

_MARKER = "miniature.json"
_JPEG_QUALITY = 95
_ATTEMPTS = 200
# To be raised with every change of what a set contains: folders made before are then refused.
_GENERATOR_VERSION = 1


@dataclass(frozen=True)
class PaintedImage:
    """
    One image with its digits.

    Attributes:
        jpeg: the encoded file.
        width, height: pixels.
        brightness: mean grey level, 0 to 255.
        objects: digit and box of each; later ones are painted over earlier ones.
    """

    jpeg: bytes
    width: int
    height: int
    brightness: float
    objects: Tuple[Tuple[int, Box], ...]


def paint_images(
    spec: DigitsSpec,
    is_usable: Callable[[List[PaintedImage]], bool],
    is_turned: Callable[[int], bool] = lambda index: False,
    is_empty: Callable[[int], bool] = lambda index: False,
) -> List[PaintedImage]:
    """
    Args:
        spec: of the images; its name is the seed.
        is_usable: whether a list of them will do. Others are painted until it does.
        is_turned: whether the image of that number is turned clockwise by a quarter.
        is_empty: whether it has no digits.

    Returns:
        ``spec.num_images`` images.

    Raises:
        ImportError: scikit-learn is needed and not installed.
        ValueError: no list was usable.
    """
    painter = DigitsPainter(spec)
    empty_painter = DigitsPainter(replace(spec, digits_per_image=(0, 0)))
    for attempt in range(_ATTEMPTS):
        images = []
        for index in range(spec.num_images):
            # Every attempt has images of its own.
            number = attempt * spec.num_images + index
            pixels, objects = (empty_painter if is_empty(index) else painter).paint(number)
            if is_turned(index):
                height = pixels.shape[0]
                pixels = np.ascontiguousarray(np.rot90(pixels, k=-1))
                objects = [(digit, (height - y1, x0, height - y0, x1)) for digit, (x0, y0, x1, y1) in objects]
            images.append(_encode(pixels, objects))
        if is_usable(images):
            return images
    raise ValueError(f"{spec.num_images} images are too few for {spec.name}; use more (--images)")


def covered_share(image: PaintedImage, number: int) -> float:
    """The largest share of an object's box that the box of one painted over it covers."""
    x0, y0, x1, y1 = image.objects[number][1]
    shares = [0.0]
    for _, (left, top, right, bottom) in image.objects[number + 1 :]:
        width, height = min(x1, right) - max(x0, left), min(y1, bottom) - max(y0, top)
        shares.append(max(width, 0) * max(height, 0) / ((x1 - x0) * (y1 - y0)))
    return max(shares)


def publish(folder: str, settings: Dict[str, Any], write: Callable[[str], None]) -> bool:
    """
    Makes a data set under another name and renames it when it is whole.

    Args:
        folder: of the data set.
        settings: all that decides its contents, as JSON has it. It is kept in ``miniature.json`` in the folder.
        write: fills a new folder of the name that it is given.

    Returns:
        Whether it was made; False if it is there already, of the same settings.

    Raises:
        ValueError: the folder is there and holds something else, which is left alone; or the data set cannot be
            written there.
    """
    note = "handwritten digits in the layout of a real data set"
    settings = {"note": note, "version": _GENERATOR_VERSION, **settings}
    if os.path.lexists(folder):
        if _read_marker(folder) == settings:
            return False
        raise ValueError(
            f"{folder!r} is in the way: it is no miniature of these settings and is not overwritten. Choose another "
            "--out, or move it away"
        )
    partial = f"{folder}.partial-{os.getpid()}"
    try:
        os.makedirs(partial)
        write(partial)
        write_json(os.path.join(partial, _MARKER), settings)
        os.rename(partial, folder)
    except OSError as error:
        raise ValueError(f"{folder!r} cannot be written ({error}); choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _encode(pixels: np.ndarray, objects: List[Tuple[int, Box]]) -> PaintedImage:
    is_encoded, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert is_encoded
    return PaintedImage(data.tobytes(), pixels.shape[1], pixels.shape[0], float(pixels.mean()), tuple(objects))


def _read_marker(folder: str) -> Any:
    try:
        with open(os.path.join(folder, _MARKER), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
