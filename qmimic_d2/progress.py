"""
How far long work is: live bars on a terminal, by rich, and now and then a plain line where there is none.

Every command shows its progress through this module, on stderr, so that results on stdout stay clean. Nothing is
shown of work that takes less than a second.
"""

import contextlib
import sys
import time
from typing import Generic, Iterable, Iterator, List, Optional, Sized, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["Row", "is_live", "seconds_text", "track"]

_SECONDS_UNTIL_SHOWN = 1.0
_SECONDS_BETWEEN_FRAMES = 0.2
_SECONDS_BETWEEN_LINES = 15.0

T = TypeVar("T")


class Row:
    """
    One line of the display, until it is closed, or the block ends.

    Attributes:
        title: of the work.
        total: number of its parts; 0 where it is not known.
        done: parts.
        text: behind the bar; the time left where it is empty.
    """

    def __init__(self, title: str, total: int = 0, *, delay: float = _SECONDS_UNTIL_SHOWN):
        """
        Args:
            title, total: as above.
            delay: seconds until it is shown.
        """
        self.title, self.total, self.done, self.text = _plain(title), total, 0, ""
        self._begun = time.perf_counter()
        self._delay = delay
        _board.add(self)

    def __enter__(self) -> "Row":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes it off the display."""
        _board.remove(self)

    def update(self, done: int, text: str = "") -> None:
        """Shows that so many parts are done."""
        self.done, self.text = done, _plain(text)
        _board.refresh(self)

    @property
    def is_due(self) -> bool:
        """Whether the work has taken long enough to be shown."""
        return time.perf_counter() - self._begun >= self._delay

    @property
    def status(self) -> str:
        """What stands behind the bar."""
        if self.text or not 0 < self.done < self.total:
            return self.text
        seconds = (time.perf_counter() - self._begun) * (self.total - self.done) / self.done
        return f"{seconds_text(seconds)} left"

    @property
    def line(self) -> str:
        """All of it in plain text."""
        count = f"{self.done}/{self.total}" if self.total else ""
        return f"{self.title}: {', '.join(each for each in (count, self.status) if each)}"


class _Board:
    """All rows that are shown at a time; rich takes no second display beside one."""

    def __init__(self):
        self._rows: List[Row] = []
        self._progress: Optional[Progress] = None
        self._frame_at = self._line_at = 0.0

    def add(self, new: Row) -> None:
        if not self._rows:
            self._line_at = time.perf_counter()
        self._rows.append(new)

    def remove(self, old: Row) -> None:
        self._rows.remove(old)
        if self._progress is not None and not self._rows:
            self._progress.stop()
            self._progress = None
        elif self._progress is not None:
            self._draw()

    def refresh(self, changed: Row) -> None:
        now = time.perf_counter()
        if now - self._frame_at < _SECONDS_BETWEEN_FRAMES or not changed.is_due:
            return
        self._frame_at = now
        if self._progress is not None or is_live():
            self._draw()
        elif now - self._line_at >= _SECONDS_BETWEEN_LINES:
            self._line_at = now
            with contextlib.suppress(OSError, ValueError):  # a stream that is closed or full stops no work
                sys.stderr.write(changed.line + "\n")
                sys.stderr.flush()

    def _draw(self) -> None:
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
        for number in list(self._progress.task_ids):
            self._progress.remove_task(number)
        for each in [row for row in self._rows if row.is_due]:
            count = f"{each.done:,}/{each.total:,}" if each.total else ""
            total = each.total or None
            self._progress.add_task(each.title, total=total, completed=each.done, count=count, text=each.status)
        self._progress.refresh()


class _Tracked(Generic[T]):
    def __init__(self, items: Iterable[T], title: str, total: int):
        self._items, self._title, self._total = items, title, total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[T]:
        with Row(self._title, self._total) as shown:
            for number, item in enumerate(self._items, 1):
                yield item
                shown.update(number)


def track(items: Iterable[T], title: str, total: Optional[int] = None) -> Iterable[T]:
    """
    The same items, with a row that shows how many are done.

    Args:
        items: may be a data loader; what is returned has its length.
        title: of the row.
        total: number of items, where ``items`` has no length.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    return _Tracked(items, title, total)


def is_live() -> bool:
    """Whether stderr is a terminal that can redraw its lines."""
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


def seconds_text(seconds: float) -> str:
    """A time for people: "45 s", "12 min", "3.5 h"."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def _plain(text: str) -> str:
    """Without the characters that a terminal would act on, or that the stream cannot show."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    shown = "".join(each if each.isprintable() else "?" for each in text)
    return shown.encode(encoding, "replace").decode(encoding)


def _new_progress() -> Progress:
    # drawn by the work itself: a thread that draws would be there when a training forks
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True, soft_wrap=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )


_board = _Board()
