"""What a command did with a mutated file, and whether that is right."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple

from storm_lib.cases import ESCAPE, Command

__all__ = ["Outcome", "judge"]

# A message may list the first of many faults; a flood is none.
_MAX_LINES = 60
_SHOWN_NAMES = 3
# Lines of loggers ("[11/25 21:00:55 d2.engine]: ..." and "WARNING ..."), of warnings, and of progress bars.
_LOG = re.compile(
    r"^(\x1b\[[0-9;]*m)*(\[\d\d/\d\d \d\d:\d\d:\d\d|[WIE]\d{4} \d\d:|WARNING |INFO |.*Warning: |\s+warnings\.warn)"
)


@dataclass
class Outcome:
    """
    Attributes:
        status: exit status; -1 after a signal.
        signal: that ended the command; 0 for none.
        timed_out: it was killed because it did not end.
        seconds: that it took.
        peak_mib: of the process, its libraries included.
    """

    status: int
    signal: int
    timed_out: bool
    seconds: float
    peak_mib: float


def judge(command: Command, outcome: Outcome, folder: Path, marker: Path) -> Tuple[str, str]:
    """
    Args:
        command: that ran.
        outcome: of it.
        folder: of the case, with "stdout" and "stderr".
        marker: file that smuggled code would have made.

    Returns:
        "refused", "handled" or "FAILED", and the reason of a failure.
    """
    stdout, stderr = (_read(folder / name) for name in ("stdout", "stderr"))
    fault = _fault(outcome, stdout, stderr, marker)
    if fault:
        return "FAILED", fault
    if outcome.status == 0 or (outcome.status == 1 and command.record and Path(command.record).exists()):
        if command.must == "refuse":
            return "FAILED", f"accepted with status {outcome.status}: {_last(stderr or stdout)}"
        fault = _record_fault(command) if command.record else None
        return ("FAILED", fault) if fault else ("handled", "")
    if command.must == "handle":
        return "FAILED", f"refused with status {outcome.status}: {_last(stderr)}"
    fault = _message_fault(command, outcome, stderr)
    return ("FAILED", fault) if fault else ("refused", "")


def _fault(outcome: Outcome, stdout: str, stderr: str, marker: Path) -> Optional[str]:
    """What is wrong whatever the file holds."""
    if marker.exists():
        return "code of the file ran"
    if outcome.timed_out:
        return f"no end after {outcome.seconds:.0f} s"
    if outcome.signal:
        return f"ended by signal {outcome.signal}"
    for text in (stderr, stdout):
        if "Traceback (most recent call last)" in text:
            return f"traceback: {_last(text)}"
        if ESCAPE in text:
            return "a terminal escape in a name was printed raw"
    return None


def _record_fault(command: Command) -> Optional[str]:
    path = Path(command.record)
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        return f"{path.name} is not there, or not whole: {type(error).__name__}"
    missing = [name for name in command.record_names if name not in text]
    return f"{path.name} does not name {missing}" if missing else None


def _message_fault(command: Command, outcome: Outcome, stderr: str) -> Optional[str]:
    if outcome.status not in (1, 2):
        return f"ended with status {outcome.status}: {_last(stderr)}"
    message = [line for line in stderr.splitlines() if line.strip() and not _LOG.match(line)]
    if not message:
        return f"status {outcome.status} without a message"
    if len(message) > _MAX_LINES:
        return f"a message of {len(message)} lines"
    text = "\n".join(message)
    if not any(name in text for name in command.names):
        return f"the message names none of {command.names[:_SHOWN_NAMES]}: {_last(stderr)}"
    return None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _LOG.match(line)]
    return lines[-1][:300] if lines else "no message"
