"""
Detections drawn on an image, by Pillow.

Shape letters:
    H, W: height and width of an image, in pixels.
    N: number of detections.
"""

import colorsys
import math
from typing import Any, List, Sequence, Tuple

import numpy as np

from qmimic_d2.inference.categories import Category
from qmimic_d2.inference.fonts import find_font, load_font, unprintable_characters

__all__ = ["draw_detections", "label_names", "missing_characters_note"]

# An image whose longer side is shorter, in pixels, is enlarged for drawing, so that its labels can be read.
_DRAWN_SIZE = 640
# Names are cut behind so many characters.
_LONGEST_NAME = 40


def label_names(categories: Sequence[Category]) -> List[str]:
    """
    What labels call the classes: their names on one line, cut where they are very long, and "#" with the id for
    a name that no font of this machine has the characters of.
    """
    return [_label_name(each) for each in categories]


def missing_characters_note(categories: Sequence[Category]) -> str:
    """What to install for the names that cannot be drawn; "" where all can."""
    missing = unprintable_characters("".join(_one_line(each.name) for each in categories))
    if not missing:
        return ""
    return (
        f"no font of this machine has the characters {missing[:20]!r} of the class names, so the drawings show "
        "class ids in place of these names (predictions.json has the names). Install a font that has them, for "
        "example Noto: apt-get install fonts-noto fonts-noto-cjk"
    )


def draw_detections(
    image: np.ndarray, boxes: np.ndarray, scores: Sequence[float], classes: Sequence[int], names: Sequence[str]
) -> np.ndarray:
    """
    Args:
        image: shape (H, W, 3), BGR, uint8.
        boxes: shape (N, 4), XYXY in pixels of the image.
        scores: N numbers, 0 to 1.
        classes: N indices into ``names``.
        names: of the classes, as :func:`label_names` makes them.

    Returns:
        The image with boxes, names and scores, one colour per class. RGB, uint8. One whose longer side is
        below 640 pixels is enlarged by the least whole factor that changes this.
    """
    from PIL import Image, ImageDraw

    factor = max(1, math.ceil(_DRAWN_SIZE / max(image.shape[:2])))
    pixels = image[:, :, ::-1]
    if factor > 1:
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(picture)
    height, width = pixels.shape[:2]
    font_size = min(max(round(math.sqrt(height * width) / 45), 12), 40)
    line = max(2, font_size // 6)
    enlarged = np.asarray(boxes, np.float64).reshape(-1, 4) * factor
    order = sorted(range(len(enlarged)), key=lambda index: scores[index])  # the surest on top
    for index in order:
        draw.rectangle(_corners(enlarged[index], width, height), outline=_class_color(classes[index]), width=line)
    for index in order:
        text = f"{names[classes[index]]} {scores[index]:.0%}"
        _draw_label(draw, text, _corners(enlarged[index], width, height), (width, height), font_size, classes[index])
    return np.asarray(picture)


def _corners(box: np.ndarray, width: int, height: int) -> Tuple[int, int, int, int]:
    """Whole pixels within the picture, the second corner not before the first."""
    x0, y0 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    return x0, y0, max(min(round(box[2]), width - 1), x0), max(min(round(box[3]), height - 1), y0)


def _draw_label(
    draw: Any, text: str, box: Tuple[int, int, int, int], size: Tuple[int, int], font_size: int, index: int
) -> None:
    """White or black on the class's colour, above the box where there is room and else inside it."""
    font = load_font(find_font(text) or ("", 0), font_size)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, font_size // 6)
    label_width, label_height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(min(box[0], size[0] - label_width), 0)
    y = box[1] - label_height if box[1] >= label_height else min(box[1], max(size[1] - label_height, 0))
    color = _class_color(index)
    draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=color)
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=(0, 0, 0) if brightness > 110 else (255,) * 3)


def _class_color(index: int) -> Tuple[int, int, int]:
    """Bright, and of another hue than its neighbours': the golden ratio spreads any number of them. RGB."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _label_name(category: Category) -> str:
    name = _one_line(category.name)
    if find_font(name) is None:
        return f"#{category.id}"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _one_line(name: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in name).split())
