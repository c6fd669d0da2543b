"""Children that end when their parent does, even when it was killed and could end nobody."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Callable, Optional, Sequence

__all__ = ["die_with_parent", "start_tied", "tie_worker"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# Its standard input ends when the process at the other end does. It is gone by itself when the watched one is.
_WATCHDOG = """
import os, select, signal, sys
watched = int(sys.argv[1])
try:
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        os.kill(watched, 0)
    os.kill(watched, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


def die_with_parent() -> None:
    """
    Ends this process, which :mod:`multiprocessing` or torchrun started, as soon as its parent has ended.

    On Linux the kernel does it; everywhere a thread watches a parent that :mod:`multiprocessing` knows.
    """
    parent = multiprocessing.parent_process()

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=end, daemon=True, name="die_with_parent").start()
    request = _request_of_the_kernel(os.getppid() if parent is None else parent.pid)
    if request is not None:
        request()


def tie_worker(worker_id: int) -> None:
    """
    As ``worker_init_fn`` of a data loader: the worker ends with the process that started it.

    PyTorch's own watchdog asks for its parent too late where that one is killed while the worker is still importing.
    """
    die_with_parent()


def start_tied(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """
    Starts a command that is killed when this process ends without having waited for it.

    On Linux the kernel does it, at the end of the thread that calls this; elsewhere a small watching process.

    Args:
        command, options: as for :class:`subprocess.Popen`.
    """
    request = _request_of_the_kernel(os.getpid())
    if request is not None:
        return subprocess.Popen(command, preexec_fn=request, **options)
    process = subprocess.Popen(command, **options)
    # kept with the process: its input ends when this process does
    process.watchdog = subprocess.Popen(
        [sys.executable, "-c", _WATCHDOG, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
    )
    return process


def _request_of_the_kernel(parent: int) -> Optional[Callable[[], None]]:
    """What a child of ``parent`` calls, so that the kernel kills it when its parent ends; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def request() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return request
