"""What a check finds in a data set, gathered by kind: a summary instead of one error at a time."""

from dataclasses import dataclass, field
from typing import Dict, List, Tuple

__all__ = ["DataSetError", "Findings"]

# Places of one kind that a summary names.
_NUM_NAMED = 10


class DataSetError(ValueError):
    """Data that a run cannot use; the message is the summary of every problem."""


@dataclass
class _Places:
    count: int = 0
    first: List[str] = field(default_factory=list)


# By statement and fix.
_Kinds = Dict[Tuple[str, str], _Places]


class Findings:
    """
    What was found in one data set.

    Problems stop a run. Repairs happen while the data are loaded and change no file of the user's. Notes change
    nothing. Each method takes a statement in the plural ("objects have no box"), what to do or what was done (a
    sentence without its full stop), and the place.

    Attributes:
        is_repaired: what is loaded differs from the files.
    """

    def __init__(self) -> None:
        self._problems: _Kinds = {}
        self._notes: _Kinds = {}
        self.is_repaired = False

    @property
    def has_problems(self) -> bool:
        """A run must not start."""
        return bool(self._problems)

    def refuse(self, what: str, fix: str, where: str, count: int = 1) -> None:
        """Adds a problem; ``where`` names the element, the first of ``count``."""
        _add(self._problems, what, fix, where, count)

    def repair(self, what: str, done: str, where: str) -> None:
        """Adds a repair that the caller has made."""
        self.is_repaired = True
        _add(self._notes, what, done, where)

    def note(self, what: str, meaning: str, where: str) -> None:
        """Adds what is worth knowing."""
        _add(self._notes, what, meaning, where)

    def problems(self) -> str:
        """A line for each kind of problem: number, fix and the first ten places."""
        return _text(self._problems)

    def notes(self) -> str:
        """A line for each kind of repair and note, likewise; "" for none."""
        return _text(self._notes)

    def raise_problems(self, what: str) -> None:
        """
        Raises:
            DataSetError: there are problems; ``what`` has them.
        """
        if self._problems:
            raise DataSetError(f"{what} cannot be used:\n{self.problems()}")


def _add(kinds: _Kinds, what: str, fix: str, where: str, count: int = 1) -> None:
    places = kinds.setdefault((what, fix), _Places())
    places.count += count
    if len(places.first) < _NUM_NAMED:
        places.first.append(where)


def _text(kinds: _Kinds) -> str:
    lines = []
    for (what, fix), places in kinds.items():
        first = "The first" if places.count > len(places.first) else "These"
        lines.append(f"- {what} ({places.count}). {fix}. {first}: {'; '.join(places.first)}")
    return "\n".join(lines)
