"""Names that a misspelt one may have been meant for, and the check that data sets are registered."""

import difflib
from typing import Iterable, List

from detectron2.data import DatasetCatalog

__all__ = ["check_registered", "near_names"]


def near_names(name: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> List[str]:
    """
    Args:
        name: as it was given; a config key with its dots, a data set, a class.
        known: the names that there are.
        count: most names to return.
        cutoff: least likeness, from 0.0 (any) to 1.0 (the same).

    Returns:
        The nearest first: those that end alike (``SOLVER.LOSS_WEIGHT`` and ``MODEL.QMIMIC.MIMIC.LOSS_WEIGHT``), then
        those that are spelt alike, whatever the case of their letters. Empty where none is near.
    """
    known = list(dict.fromkeys(known))
    last = name.rpartition(".")[2].lower()
    same_end = [each for each in known if "." in each and each.rpartition(".")[2].lower() == last]
    by_lower = {each.lower(): each for each in reversed(known)}
    spelt_alike = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=cutoff)
    alike = same_end if len(same_end) <= count else []  # NAME and IN_FEATURES end many keys, and say nothing
    return list(dict.fromkeys([*alike, *(by_lower[each] for each in spelt_alike)]))[:count]


def check_registered(key: str, names: Iterable[str], advice: str) -> None:
    """
    Args:
        key: of the config or the command line that names the data sets.
        advice: what to do, as the message's last sentence.

    Raises:
        KeyError: a data set is not registered; has near names.
    """
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            near = near_names(name, known, count=5, cutoff=0.4)
            hint = f"near names are {near}" if near else f"registered are {sorted(known)}"
            raise KeyError(f"{key} names {name!r}, which is not registered; {hint}. {advice}")
