"""What a check finds in a data set, gathered by kind: a summary instead of one error at a time."""

from typing import Dict, List, NamedTuple, Tuple

__all__ = ["DataSetError", "Findings", "Kind"]

# Places of one kind that a summary names.
_NUM_NAMED = 10

# By kind: how many, and the first places.
_Places = Dict["Kind", Tuple[List[int], List[str]]]


class DataSetError(ValueError):
    """Data that a run cannot use; the message is the summary of every problem."""


class Kind(NamedTuple):
    """
    A kind of finding.

    Attributes:
        what: a statement in the plural: "annotations have no box".
        fix: what to do, or what was done, as a sentence without its full stop.
    """

    what: str
    fix: str


class Findings:
    """
    What was found in one data set.

    Problems stop a run. Repairs happen while the data are loaded and change no file of the user's. Notes change
    nothing.

    Attributes:
        has_problems: a run must not start.
        is_repaired: what is loaded differs from the files.
    """

    def __init__(self) -> None:
        self._problems: _Places = {}
        self._notes: _Places = {}
        self.has_problems = False
        self.is_repaired = False

    def refuse(self, kind: Kind, where: str, count: int = 1) -> None:
        """Adds a problem; ``where`` names the element, the first of ``count``."""
        self.has_problems = True
        _add(self._problems, kind, where, count)

    def repair(self, kind: Kind, where: str) -> None:
        """Adds a repair that the caller has made."""
        self.is_repaired = True
        _add(self._notes, kind, where, 1)

    def note(self, kind: Kind, where: str) -> None:
        """Adds what is worth knowing."""
        _add(self._notes, kind, where, 1)

    def problems(self) -> str:
        """A line for each kind of problem: number, fix and the first ten places."""
        return _text(self._problems)

    def notes(self) -> str:
        """A line for each kind of repair and note, likewise; "" for none."""
        return _text(self._notes)


def _add(kinds: _Places, kind: Kind, where: str, number: int) -> None:
    count, places = kinds.setdefault(kind, ([0], []))
    count[0] += number
    if len(places) < _NUM_NAMED:
        places.append(where)


def _text(kinds: _Places) -> str:
    lines = []
    for kind, ((count,), places) in kinds.items():
        first = "The first" if count > len(places) else "These"
        lines.append(f"- {kind.what} ({count}). {kind.fix}. {first}: {'; '.join(places)}")
    return "\n".join(lines)
