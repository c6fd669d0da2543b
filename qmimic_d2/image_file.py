"""
Images as every detector of this package takes them, read without torch and Detectron2.

Shape letters:
    H, W: height and width of an image, in pixels.
"""

import numpy as np

__all__ = ["UnusableImageError", "as_bgr_image", "read_bgr_image"]



class UnusableImageError(ValueError):
    """A file that is no image, or a damaged one."""


def as_bgr_image(image: np.ndarray) -> np.ndarray:
    """
    Brings what ``cv2.imread`` gives, with any of its flags, into one form.

    Args:
        image: shape (H, W), (H, W, 1), (H, W, 3) in BGR or (H, W, 4) in BGRA; uint8 or uint16.

    Returns:
        shape (H, W, 3), BGR, uint8: a grey image as three equal channels, alpha dropped, the upper 8 bits of 16.

    Raises:
        ValueError: another shape or dtype, or no pixel.
    """
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    if not is_image or image.dtype not in (np.uint8, np.uint16) or not image.size:
        raise ValueError(
            f"give an image of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in uint8 or uint16, not "
            f"{image.shape} in {image.dtype}"
        )
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    return image[:, :, :3]


def read_bgr_image(path: str) -> np.ndarray:
    """
    Reads an image as Detectron2 does in training: turned as its EXIF data say, three channels, an alpha
    channel dropped, the first frame of several. Beyond that, 16 bits per pixel are scaled to 8 instead of
    being cut off at 255.

    Pillow decodes it, as in training. Where that is not installed, OpenCV does; its JPEG decoder may differ
    by a grey level here and there.

    Returns:
        shape (H, W, 3), BGR, uint8.

    Raises:
        UnusableImageError: it cannot be opened or decoded; says why.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        return _read_with_opencv(path)
    try:
        return as_bgr_image(_read_with_pillow(path))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise UnusableImageError(f"it cannot be read: {type(error).__name__}: {error}") from error


def _read_with_pillow(path: str) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        is_deep = image.mode == "I" or image.mode.startswith("I;16")
        image = ImageOps.exif_transpose(image)
        if is_deep:
            return np.asarray(image).astype(np.int64).clip(0, 0xFFFF).astype(np.uint16)
        return np.asarray(image.convert("RGB"))[:, :, ::-1]


def _read_with_opencv(path: str) -> np.ndarray:
    import cv2

    image = cv2.imread(path, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    if image is None:
        raise UnusableImageError("it cannot be read: OpenCV finds no image in it")
    try:
        return as_bgr_image(image)
    except ValueError as error:
        raise UnusableImageError(f"it cannot be read: {error}") from error
