"""Trainings in processes of their own: start, observe, kill, and find what is left of them. For Linux (/proc)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

__all__ = ["ROOT", "Stopped", "Training", "marked_processes", "stop_marked", "wait_until_gone"]

ROOT = Path(__file__).resolve().parents[2]
_RECORDING = Path(__file__).resolve().parent / "recording"

# Every process that belongs to one training has this variable with the training's name.
_MARK = "QMIMIC_STORM_JOB"


class Stopped(Exception):
    """The storm is being stopped."""


class Training:
    """
    ``train_net.py`` in processes of its own; leaving the block kills what is left of them.

    Attributes:
        text_file: what it writes to stdout and stderr.
    """

    def __init__(
        self,
        arguments: Sequence[Any],
        *,
        mark: str,
        record: Path,
        datasets: Sequence[Sequence[str]],
        text_file: Path,
        script: Path = ROOT / "train_net.py",
    ):
        """
        Args:
            arguments: of the script.
            mark: unique name; :func:`marked_processes` finds the processes by it.
            record: file that the steps' losses are appended to.
            datasets: (name, annotation file, image folder) of COCO data sets to register.
            text_file: is written anew.
            script: that is run.
        """
        self.mark, self.text_file = mark, text_file
        environment = {
            **os.environ,
            _MARK: mark,
            "QMIMIC_STORM_RECORD": str(record),
            "QMIMIC_STORM_DATASETS": json.dumps([[str(each) for each in row] for row in datasets]),
            "PYTHONPATH": os.pathsep.join([str(_RECORDING), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        with open(text_file, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
                cwd=record.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exc_info) -> None:
        self.kill(whole_group=True)
        stop_marked(self.mark)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, whole_group: bool) -> None:
        """SIGKILL to the main process alone, or to every process of its group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> int:
        """
        Its status.

        Raises:
            subprocess.TimeoutExpired: it has not ended by then.
        """
        return self._process.wait(timeout=seconds)

    def text(self) -> str:
        return self.text_file.read_text(errors="replace")


def marked_processes(mark: str) -> Dict[int, str]:
    """Command lines of the living processes of a training, by process id."""
    wanted = f"{_MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of another user, or gone
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


def wait_until_gone(mark: str, seconds: float) -> List[str]:
    """Waits until no process of a training lives; returns the command lines of those that still do."""
    end = time.monotonic() + seconds
    while True:
        left = marked_processes(mark)
        if not left or time.monotonic() > end:
            return list(left.values())
        time.sleep(0.05)


def stop_marked(mark: str) -> None:
    """Kills what is left of a training."""
    while True:
        left = marked_processes(mark)
        if not left:
            return
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)
