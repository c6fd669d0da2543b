"""Signals that end a command after the work at hand, so that what was done until then can be written."""

import contextlib
import signal
import threading
from typing import Iterator

__all__ = ["Interruption", "noted_interruption"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interruption:
    """
    Attributes:
        reason: such as "stopped by SIGTERM"; "" as long as nothing came.
    """

    def __init__(self):
        self.reason = ""

    def note(self, number: int, frame: object) -> None:
        """
        A signal's handler.

        Raises:
            KeyboardInterrupt: at the second signal, should the work at hand not end.
        """
        if self.reason:
            raise KeyboardInterrupt
        self.reason = f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def noted_interruption() -> Iterator[Interruption]:
    """Within the block, Ctrl-C and a request to end are noted; in a thread that gets no signals, nothing changes."""
    interruption, earlier = Interruption(), {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                earlier[number] = signal.signal(number, interruption.note)
    try:
        yield interruption
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
