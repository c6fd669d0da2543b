"""metrics.json: no row of it is lost when a training is killed and resumed."""

import json
import logging
import os
from collections import defaultdict
from typing import Any, Callable, Dict

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["WINDOW_SIZE", "MetricsWriter", "WriteMetrics"]

# Iterations over which the median of a smoothed figure is taken, as Detectron2's writers do.
WINDOW_SIZE = 20


class MetricsWriter(EventWriter):
    """
    Detectron2's ``JSONWriter``, which may be called at any time.

    Detectron2's writes an iteration once, and leaves out what comes later, such as an evaluation. This one writes the
    whole row again; the later line counts.

    Args:
        path: of the file, to which it appends. A half line at its end, left by a kill, is removed.
    """

    def __init__(self, path: str):
        _remove_half_line(path)
        self._file = open(path, "a", encoding="utf-8")
        self._last_written: Dict[str, int] = {}

    def write(self) -> None:
        rows: Dict[int, Dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(WINDOW_SIZE)
        for key, (value, iteration) in latest.items():
            rows[iteration][key] = value
        text = ""
        for iteration in sorted(rows):
            row = rows[iteration]
            if any(self._last_written.get(key, -1) < iteration for key in row):
                text += json.dumps({**row, "iteration": iteration}, sort_keys=True) + "\n"
                self._last_written.update(dict.fromkeys(row, iteration))
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class WriteMetrics(HookBase):
    """
    Writes metrics.json after certain iterations: before a checkpoint, or after an evaluation.

    A resumed training begins after its checkpoint, so the rows up to it have to be written before it.

    Args:
        writer: of the file.
        is_due: called with the number of iterations that are done, and of all iterations.
    """

    def __init__(self, writer: MetricsWriter, is_due: Callable[[int, int], bool]):
        self._writer = writer
        self._is_due = is_due

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1, self.trainer.max_iter):
            self._writer.write()


def _remove_half_line(path: str) -> None:
    if not os.path.isfile(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            logging.getLogger(__name__).warning("%s ends in half a line, left by a kill: it is removed", path)
            file.truncate(end)
