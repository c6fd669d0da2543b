"""Frames of a video file in and out, by OpenCV."""

import math
import os
import tempfile
from typing import Iterator, Optional, Tuple

import cv2
import numpy as np

from qmimic_d2.image_file import UnusableImageError

__all__ = ["VideoFrames", "VideoWriter"]

_DEFAULT_RATE = 25.0
# Codecs that the wheels of OpenCV bring, by the ending that holds them.
_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
# The number of frames of these is written in the file; of others it is the duration times the rate.
_COUNTED = (".avi", ".m4v", ".mov", ".mp4")
_MOST_FRAMES = 1 << 40


class VideoFrames:
    """
    Iterates once over the frames of a video, shape (H, W, 3), BGR, uint8. They may differ in size.

    Attributes:
        rate: frames per second.
        num_announced: how many frames the file says it has; 0 where it does not say.
        num_read: how many were given so far.
    """

    def __init__(self, path: str):
        """
        Raises:
            UnusableImageError: OpenCV cannot open it, or it has no frame.
        """
        self._suffix = os.path.splitext(path)[1].lower()
        self._capture, self._first = _open(path)
        rate, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _DEFAULT_RATE
        self.num_announced = int(count) if math.isfinite(count) and 0 < count < _MOST_FRAMES else 0
        self.num_read = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self._first
        try:
            while frame is not None:
                self.num_read += 1
                yield frame
                ok, following = self._capture.read()
                frame = following if ok else None
        finally:
            self._capture.release()

    @property
    def missing(self) -> str:
        """After the last frame: what the video lacks of the frames that it announces; "" for none."""
        counted_alike = 0 if self._suffix in _COUNTED else max(2, self.num_announced // 100)
        if self.num_read >= self.num_announced - counted_alike:
            return ""
        return f"{self.num_read} of {self.num_announced} frames: the video is cut short or damaged"


def _open(path: str) -> Tuple[cv2.VideoCapture, np.ndarray]:
    """The opened video and its first frame. OpenCV gets a plain name: some names are patterns or protocols to it."""
    with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
        plain = os.path.join(folder, f"video{os.path.splitext(path)[1].lower()}")
        try:
            os.symlink(os.path.abspath(path), plain)
        except OSError:  # a system that lets nobody make links
            plain = os.path.abspath(path)
        capture = cv2.VideoCapture(plain)
        ok, first = capture.read() if capture.isOpened() else (False, None)
    if not ok:
        capture.release()
        raise UnusableImageError("it cannot be read: OpenCV finds no video in it")
    return capture, first


class VideoWriter:
    """
    Writes frames one after the other into a file, all in the size of the first.

    A frame of another size is fitted into that with its aspect ratio kept. Sides are made even, which most codecs
    demand, and a rate that the codec does not take is replaced by the nearest whole one or 25.

    Attributes:
        num_written: frames so far.
    """

    def __init__(self, path: str, rate: float):
        """
        Args:
            path: ending in ".mp4" or ".avi".
            rate: in 1/s.
        """
        self._path, self._rate = path, rate
        self._writer: Optional[cv2.VideoWriter] = None
        self._size = (0, 0)
        self.num_written = 0

    def write(self, frame: np.ndarray) -> None:
        """
        Args:
            frame: shape (H, W, 3), RGB, uint8.

        Raises:
            OSError: OpenCV cannot write the file.
        """
        if self._writer is None:
            height, width = frame.shape[:2]
            self._size = (height + height % 2, width + width % 2)
            self._writer = self._opened()
        self._writer.write(np.ascontiguousarray(_fitted(frame, *self._size)[:, :, ::-1]))
        self.num_written += 1

    def close(self) -> None:
        """
        Raises:
            OSError: the file does not hold every frame that was written, for example on a full disk.
        """
        self.release()
        reader = cv2.VideoCapture(self._path)
        count = reader.get(cv2.CAP_PROP_FRAME_COUNT) if reader.isOpened() else 0
        reader.release()
        if count != self.num_written:
            raise OSError(f"OpenCV wrote {max(0, int(count))} of {self.num_written} frames; is the disk full?")

    def release(self) -> None:
        """Ends the file, complete or not."""
        if self._writer is not None:
            self._writer.release()

    def _opened(self) -> cv2.VideoWriter:
        codec = cv2.VideoWriter_fourcc(*_CODECS[os.path.splitext(self._path)[1]])
        height, width = self._size
        for rate in (self._rate, float(min(max(round(self._rate), 1), 1000)), _DEFAULT_RATE):
            writer = cv2.VideoWriter(self._path, codec, rate, (width, height))
            if writer.isOpened():
                return writer
            writer.release()
        raise OSError(f"OpenCV cannot write a video of {width} x {height} pixels")


def _fitted(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """At the top left of a black frame of this size, made smaller where it does not fit."""
    if frame.shape[:2] == (height, width):
        return frame
    scale = min(height / frame.shape[0], width / frame.shape[1], 1.0)
    if scale < 1.0:
        size = (max(1, int(frame.shape[1] * scale)), max(1, int(frame.shape[0] * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    below, beside = height - frame.shape[0], width - frame.shape[1]
    # a single row or column that makes a side even repeats its neighbour
    border = cv2.BORDER_REPLICATE if max(below, beside) == 1 else cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(frame, 0, below, 0, beside, border)
