"""
Images as every detector of this package takes them, read without torch and Detectron2.

Training, evaluation, calibration, ``predict``, ``export`` and the exported detectors all read by this module, so that
one file has one set of pixels. Files of 8 bits per channel have the pixels of Detectron2's own reader.

Grey files of more bits do not say how their values are scaled. The largest value of the image decides:

==============  ============================  ==========================
type            largest value                 8-bit pixel
==============  ============================  ==========================
integer         up to 255                     the value
integer         up to 4095 (12 bits)          value // 16
integer         up to 65535 (16 bits)         value // 256
float           up to 1.0                     round(255 * value)
float           up to 255.0                   round(value)
float           up to 65535.0                 value // 256
==============  ============================  ==========================

Negative values count as 0. Larger values, NaN and infinity are refused. Colour files of 16 bits per channel keep
the upper 8 bits. A warning, once for each row but the first and the third, names the file.

Shape letters:
    H, W: height and width of an image, in pixels.
"""

import logging
from typing import BinaryIO, Set, Tuple, Union

import numpy as np

try:
    from PIL import Image
except ImportError as error:
    raise ImportError("images are read and resized by Pillow, which is not installed: pip install Pillow") from error

__all__ = ["Image", "UnusableImageError", "as_bgr_image", "image_size", "open_image", "read_bgr_image"]

_DTYPES = (np.uint8, np.uint16, np.int32, np.float32)
_EXIF_ORIENTATION = 0x0112
_TIFF_SIZE = (256, 257)  # tags of width and height
_QUARTER_TURNS = (5, 6, 7, 8)

# Kinds of scaling that this process has warned of.
_warned: Set[str] = set()


class UnusableImageError(ValueError):
    """A file that is no image, or a damaged one."""


def as_bgr_image(image: np.ndarray) -> np.ndarray:
    """
    Brings what ``cv2.imread`` gives, with any of its flags, into one form.

    Args:
        image: shape (H, W), (H, W, 1), (H, W, 3) in BGR or (H, W, 4) in BGRA; uint8 or uint16, grey also int32 or
            float32.

    Returns:
        shape (H, W, 3), BGR, uint8: a grey image as three equal channels, alpha dropped, more than 8 bits scaled as
        the module says.

    Raises:
        ValueError: another shape or dtype, no pixel, or values that no rule covers.
    """
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    is_grey = image.ndim == 2 or image.shape[-1] == 1
    dtypes = _DTYPES if is_grey else _DTYPES[:2]
    if not is_image or image.dtype not in dtypes or not image.size:
        raise ValueError(
            f"give an image of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in uint8 or uint16, or a grey one in "
            f"int32 or float32, not {image.shape} in {image.dtype}"
        )
    if image.dtype != np.uint8:
        image = _eight_bits(image, "an array") if is_grey else (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    return image[:, :, :3]


def read_bgr_image(path: str) -> np.ndarray:
    """
    Reads an image: turned once as its EXIF data or TIFF tags say, three channels, an alpha channel dropped, the first
    frame of several, more than 8 bits scaled as the module says.

    Returns:
        shape (H, W, 3), BGR, uint8.

    Raises:
        UnusableImageError: it cannot be opened or decoded, or is too large; says why.
    """
    image = open_image(path, path)
    try:
        return np.asarray(image.convert("RGB"))[:, :, ::-1]
    except Exception as error:
        raise _unusable(error) from error


def open_image(source: Union[str, BinaryIO], name: str):
    """
    A decoded Pillow image of 8 bits per channel, upright, in the mode of the file; grey ("L") where that has more bits.

    Args:
        source: path, or a file that is open for reading bytes.
        name: of the file, for warnings.

    Raises:
        UnusableImageError: as :func:`read_bgr_image`.
    """
    try:
        with Image.open(source) as image:
            image.load()  # turns a TIFF, in recent versions of Pillow: what is left to be turned is known after it
            is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
            return _upright(Image.fromarray(_eight_bits(np.asarray(image), name)) if is_deep else image, image)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise _unusable(error) from error


def image_size(source: Union[str, BinaryIO]) -> Tuple[int, int]:
    """
    Width and height in pixels as :func:`read_bgr_image` gives them, from the file's header alone.

    Raises:
        UnusableImageError: the header is no image's, or the image is too large.
    """
    try:
        with Image.open(source) as image:
            size = image.size
            if image.format == "TIFF":  # some versions of Pillow give the size after turning
                size = tuple(int(image.tag_v2[tag]) for tag in _TIFF_SIZE)
            is_turned = _orientation(image) in _QUARTER_TURNS
    except Exception as error:
        raise _unusable(error) from error
    return size[::-1] if is_turned else size


def _orientation(image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be parsed count as none, as in Detectron2
        return 1


def _upright(image, header):
    """Turns an image as the EXIF data of ``header`` say; what Detectron2 does."""
    methods = {
        2: Image.FLIP_LEFT_RIGHT,
        3: Image.ROTATE_180,
        4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE,
        6: Image.ROTATE_270,
        7: Image.TRANSVERSE,
        8: Image.ROTATE_90,
    }
    method = methods.get(_orientation(header))
    return image if method is None else image.transpose(method)


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Scales grey values of any shape to uint8 by the table above."""
    is_float = values.dtype.kind == "f"
    if is_float and not np.isfinite(values).all():
        raise UnusableImageError("it has pixels that are NaN or infinite")
    lowest, highest = values.min(), values.max()
    kind = "floating-point values" if is_float else "integers of more than 8 bits"
    if highest > 0xFFFF:
        raise UnusableImageError(f"it has {kind} up to {highest}; scale them to 8 or 16 bits")
    if lowest < 0:
        _warn_once(f"{kind} below 0, which count as 0", name)
        values = values.clip(0, None)
    if is_float:
        values = values.astype(np.float64)
        if highest <= 1:
            _warn_once(f"{kind} from 0 to 1, which are multiplied by 255", name)
            return np.rint(255.0 * values).astype(np.uint8)
        if highest <= 255:
            _warn_once(f"{kind} from 0 to 255, which are rounded", name)
            return np.rint(values).astype(np.uint8)
        _warn_once(f"{kind} up to 65535, which are divided by 256", name)
        return (values // 256).astype(np.uint8)
    shift = 0 if highest <= 0xFF else 4 if highest <= 0xFFF else 8
    if values.dtype != np.uint8 and shift < 8:
        meaning = "at most 255: taken as they are" if shift == 0 else "at most 4095: 12 bits, divided by 16"
        _warn_once(f"{kind} whose largest is {meaning}", name)
    return (values.astype(np.int64) >> shift).astype(np.uint8)


def _warn_once(kind: str, name: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logging.getLogger(__name__).warning(
            "%s has %s. All images of this kind are read so, in training and everywhere else; save them with 8 bits "
            "per pixel to scale them yourself",
            *(name, kind),
        )


def _unusable(error: Exception) -> UnusableImageError:
    if isinstance(error, UnusableImageError):
        return error
    return UnusableImageError(f"it cannot be read: {type(error).__name__}: {error}")
