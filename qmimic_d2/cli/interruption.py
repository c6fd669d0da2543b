"""Signals that end a command after the work at hand, so that what was done until then can be written."""

import contextlib
import signal
import threading
from typing import Iterator

__all__ = ["Interruption", "noted_interruption"]


class Interruption:
    """Its ``reason`` is "" until a signal comes, then such as "stopped by SIGTERM"."""

    reason = ""

    def note(self, number: int, frame: object) -> None:
        """The signals' handler. A second signal raises KeyboardInterrupt, in case the work at hand does not end."""
        if self.reason:
            raise KeyboardInterrupt
        self.reason = f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def noted_interruption() -> Iterator[Interruption]:
    """Within the block, Ctrl-C and a request to end are noted; in a thread that gets no signals, nothing changes."""
    interruption, earlier = Interruption(), {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                earlier[number] = signal.signal(number, interruption.note)
    try:
        yield interruption
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
