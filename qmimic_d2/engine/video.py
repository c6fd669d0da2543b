"""Frames of a video file in and out, by OpenCV."""

import os
from typing import Iterator, Tuple

import cv2
import numpy as np

from qmimic_d2.image_file import UnusableImageError
from qmimic_d2.whole_file import whole_file

__all__ = ["VIDEO_SUFFIXES", "is_video", "read_frames", "write_video"]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_DEFAULT_RATE = 25.0
# Codecs that the wheels of OpenCV bring, by the ending that holds them.
_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}


def is_video(path: str) -> bool:
    """Whether a file's ending is a video's."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def read_frames(path: str) -> Tuple[Iterator[np.ndarray], float]:
    """
    Returns:
        The frames, shape (H, W, 3), BGR, uint8, and their rate in 1/s.

    Raises:
        UnusableImageError: OpenCV cannot open it, or it has no frame.
    """
    capture = cv2.VideoCapture(path)
    ok, first = capture.read() if capture.isOpened() else (False, None)
    if not ok:
        capture.release()
        raise UnusableImageError("it cannot be read: OpenCV finds no video in it")
    rate = capture.get(cv2.CAP_PROP_FPS)

    def frames() -> Iterator[np.ndarray]:
        frame = first
        try:
            while frame is not None:
                yield frame
                ok, following = capture.read()
                frame = following if ok else None
        finally:
            capture.release()

    return frames(), rate if np.isfinite(rate) and rate > 0 else _DEFAULT_RATE


def write_video(path: str, frames: Iterator[np.ndarray], rate: float) -> int:
    """
    Writes frames of one size, one after the other; the file appears when it is complete.

    Args:
        path: ending in ".mp4" or ".avi".
        frames: shape (H, W, 3), RGB, uint8.
        rate: in 1/s.

    Returns:
        How many frames.

    Raises:
        OSError: OpenCV cannot write it.
    """
    codec = cv2.VideoWriter_fourcc(*_CODECS[os.path.splitext(path)[1]])
    count, writer = 0, None
    with whole_file(path) as partial:
        try:
            for frame in frames:
                # most codecs take even sides only
                frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
                if writer is None:
                    writer = cv2.VideoWriter(partial, codec, rate, (frame.shape[1], frame.shape[0]))
                    if not writer.isOpened():
                        raise OSError(f"OpenCV cannot write {path!r}")
                writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
                count += 1
        finally:
            if writer is not None:
                writer.release()
    return count
