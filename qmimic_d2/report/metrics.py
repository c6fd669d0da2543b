"""A training's ``metrics.json``: figures by iteration."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

from qmimic_d2.run_folder import read_metrics_rows

__all__ = ["Metrics", "Series", "is_number", "last_mean", "read_metrics", "thinned"]

# A figure's value by iteration, in rising order of the iterations.
Series = Dict[int, float]

# Bound of what a page can show. Beyond it, sums and the margins of a plot leave the range of a float.
_LARGEST = 1e100


def is_number(value: Any) -> bool:
    """Whether it is an int or float, finite, no boolean, and at most 1e100 in size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


@dataclass
class Metrics:
    """
    What a ``metrics.json`` holds.

    Attributes:
        series: figures by their names in the file; values that are not finite are left out.
        iterations: that were done, the resumed ones counted once.
        num_unreadable: lines that are no JSON object; an unfinished last one does not count.
    """

    series: Dict[str, Series] = field(default_factory=dict)
    iterations: int = 0
    num_unreadable: int = 0

    def of(self, name: str, levels: Sequence[str] = ()) -> Series:
        """A figure, or the mean over levels of ``<name>_<level>``; empty where the file has neither."""
        if name in self.series:
            return self.series[name]
        values = _by_iteration([self.series.get(f"{name}_{level}", {}) for level in levels])
        return {iteration: sum(each) / len(each) for iteration, each in values.items()}

    def detection_loss(self) -> Series:
        """Sum of all losses but the mimic's: what runs with and without a teacher have in common."""
        return self._sum_of([name for name in self.series if name.startswith("loss_") and not _is_mimic_loss(name)])

    def mimic_loss(self) -> Series:
        """Sum of the mimic's losses of all levels, lambda included; empty without a teacher."""
        return self._sum_of(list(filter(_is_mimic_loss, self.series)))

    def _sum_of(self, names: Sequence[str]) -> Series:
        values = _by_iteration([self.series[name] for name in names])
        return {iteration: sum(each) for iteration, each in values.items()}


def _is_mimic_loss(name: str) -> bool:
    return name.startswith("loss_mimic")


def _by_iteration(parts: Sequence[Series]) -> Dict[int, List[float]]:
    iterations = sorted({iteration for part in parts for iteration in part})
    return {each: [part[each] for part in parts if each in part] for each in iterations}


def read_metrics(path: str) -> Metrics:
    """
    Reads a ``metrics.json``.

    Where a resumed training goes back to an earlier iteration, what the file had after that one is dropped.

    Raises:
        OSError: the file cannot be read.
    """
    metrics = Metrics()
    latest = -1
    for row in read_metrics_rows(path):
        if row is None:
            metrics.num_unreadable += 1
            continue
        iteration = row.pop("iteration")
        # Figures that are written now and then have rows of their own, which are not in order.
        if "total_loss" in row:
            if iteration <= latest:
                for name, each in metrics.series.items():
                    metrics.series[name] = {key: value for key, value in each.items() if key <= iteration}
            latest = iteration
        for name, value in row.items():
            if is_number(value):
                metrics.series.setdefault(name, {})[iteration] = float(value)
    metrics.series = {name: dict(sorted(each.items())) for name, each in metrics.series.items() if each}
    metrics.iterations = latest + 1
    return metrics


def last_mean(series: Series, count: int = 10) -> float:
    """Mean of the last measurements, because one alone depends on its batch; NaN for an empty series."""
    values = list(series.values())[-count:]
    return sum(values) / len(values) if values else math.nan


def thinned(series: Series, count: int) -> Series:
    """
    At most ``count`` points: the means of neighbours in equally large groups, each at the group's last iteration.

    So a plot of a long training stays small. A series that is short enough is returned as it is.
    """
    if len(series) <= count:
        return series
    iterations = list(series)
    edges = [index * len(iterations) // count for index in range(count + 1)]
    groups = [iterations[begin:end] for begin, end in zip(edges, edges[1:])]
    return {group[-1]: sum(series[each] for each in group) / len(group) for group in groups}
