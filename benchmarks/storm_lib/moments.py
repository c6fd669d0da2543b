"""The moments at which a training is killed: seen from outside, by its files and by what it writes."""

import os
import random
import time
from pathlib import Path
from typing import Callable, Dict, Set, Tuple

__all__ = ["MAX_ITER", "MOMENTS", "Moment", "Watch"]

MAX_ITER = 40
_EVALUATION = b"Start inference on"


class Watch:
    """What has changed in an output folder since this process of a training began."""

    def __init__(self, output: Path, text_file: Path):
        self._output, self._text_file = output, text_file
        self._began = time.monotonic()
        self._before = self._names()
        self._tag = self._content("last_checkpoint")
        self._rows = self._size("metrics.json")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def is_writing(self) -> bool:
        """A checkpoint, or its tag, has a temporary name."""
        return any(".part" in name and ("pth" in name or "checkpoint" in name) for name in self._names())

    def has_new_tag(self) -> bool:
        return self._content("last_checkpoint") not in (self._tag, b"")

    def has_new_row(self) -> bool:
        return self._size("metrics.json") > self._rows

    def has_new(self, name: str) -> bool:
        return name in self._names() - self._before

    def has_new_checkpoint_of_the_end(self) -> bool:
        """The last periodic checkpoint, which comes before ``model_final.pth``."""
        return self.has_new(f"model_{MAX_ITER - 1:07d}.pth")

    def is_evaluating(self) -> bool:
        try:
            return _EVALUATION in self._text_file.read_bytes()
        except OSError:
            return False

    def _names(self) -> Set[str]:
        try:
            return set(os.listdir(self._output))
        except OSError:
            return set()

    def _content(self, name: str) -> bytes:
        try:
            return (self._output / name).read_bytes()
        except OSError:
            return b""

    def _size(self, name: str) -> int:
        try:
            return (self._output / name).stat().st_size
        except OSError:
            return 0


# By name: what is waited for, and the longest delay after it in seconds. A share of the training's time where the
# condition is None. In the order in which a training reaches them.
MOMENTS: Dict[str, Tuple[Callable[[Watch], bool], float]] = {
    "at the start": (None, 0.3),
    "at random, early": (None, 0.7),
    "while a checkpoint is written": (Watch.is_writing, 0.0),
    "after a checkpoint's tag": (Watch.has_new_tag, 0.02),
    "in an evaluation": (Watch.is_evaluating, 0.4),
    "at random": (None, 1.0),
    "after a row of metrics": (Watch.has_new_row, 0.1),
    "before model_final.pth": (Watch.has_new_checkpoint_of_the_end, 0.003),
    "after model_final.pth": (lambda watch: watch.has_new("model_final.pth"), 0.3),
}


class Moment:
    """
    One moment of :data:`MOMENTS` for one process.

    Args:
        name: of the moment.
        rng: draws the delay.
        seconds: of an uninterrupted training.

    Attributes:
        pause: seconds between two looks.
    """

    def __init__(self, name: str, rng: random.Random, seconds: float):
        self._condition, longest = MOMENTS[name]
        self._delay = rng.uniform(0.0, longest) * (seconds if self._condition is None else 1.0)
        self._seen_at = None
        self.pause = 0.001 if self._condition is not None else 0.01

    def has_come(self, watch: Watch) -> bool:
        if self._condition is None:
            return watch.seconds >= self._delay
        if self._seen_at is None and self._condition(watch):
            self._seen_at = watch.seconds
        return self._seen_at is not None and watch.seconds - self._seen_at >= self._delay
