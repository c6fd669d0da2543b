"""A training's ``metrics.json``: figures by iteration."""

import math
from dataclasses import dataclass, field
from typing import Dict, List, Sequence

from qmimic_d2.report.numbers import is_number
from qmimic_d2.run_folder import read_metrics_rows

__all__ = ["Metrics", "Series", "last_mean", "read_metrics", "thinned"]

# A figure's value by iteration, in rising order of the iterations.
Series = Dict[int, float]

_MIMIC_LOSS = "loss_mimic"


@dataclass
class Metrics:
    """
    What a ``metrics.json`` holds.

    Attributes:
        series: figures by their names in the file; values that are not finite are left out.
        iterations: that were done, the resumed ones counted once.
        num_unreadable: lines, besides an unfinished last one, that are no JSON object.
    """

    series: Dict[str, Series] = field(default_factory=dict)
    iterations: int = 0
    num_unreadable: int = 0

    def of(self, name: str, levels: Sequence[str] = ()) -> Series:
        """
        A figure, or the mean over levels of one that is written for each of them as ``<name>_<level>``.

        Returns:
            Empty where the file has neither.
        """
        if name in self.series:
            return self.series[name]
        return _combined([self.series.get(f"{name}_{level}", {}) for level in levels], mean=True)

    def detection_loss(self) -> Series:
        """Sum of all losses but the mimic's: what runs with and without a teacher have in common."""
        return self._sum_of([name for name in self._losses() if not name.startswith(_MIMIC_LOSS)])

    def mimic_loss(self) -> Series:
        """Sum of the mimic's losses of all levels, lambda included; empty without a teacher."""
        return self._sum_of([name for name in self._losses() if name.startswith(_MIMIC_LOSS)])

    def _losses(self) -> List[str]:
        return [name for name in self.series if name.startswith("loss_")]

    def _sum_of(self, names: Sequence[str]) -> Series:
        return _combined([self.series[name] for name in names], mean=False)


def _combined(parts: Sequence[Series], mean: bool) -> Series:
    values: Dict[int, List[float]] = {}
    for part in parts:
        for iteration, value in part.items():
            values.setdefault(iteration, []).append(value)
    return {each: sum(values[each]) / (len(values[each]) if mean else 1) for each in sorted(values)}


def read_metrics(path: str) -> Metrics:
    """
    Reads a ``metrics.json``.

    Where a resumed training goes back to an earlier iteration, what the file had beyond that one is dropped.

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
        # Figures that are written now and then stand in rows of their own, which are not in order.
        if "total_loss" in row:
            if iteration <= latest:
                _drop_beyond(metrics.series, iteration)
            latest = iteration
        for name, value in row.items():
            if is_number(value):
                metrics.series.setdefault(name, {})[iteration] = float(value)
    metrics.series = {name: dict(sorted(each.items())) for name, each in metrics.series.items() if each}
    metrics.iterations = latest + 1
    return metrics


def _drop_beyond(series: Dict[str, Series], iteration: int) -> None:
    for each in series.values():
        for later in [key for key in each if key > iteration]:
            del each[later]


def last_mean(series: Series, count: int = 10) -> float:
    """
    Mean of the last measurements: one alone depends on its batch.

    Returns:
        NaN for an empty series.
    """
    values = [series[each] for each in sorted(series)][-count:]
    return sum(values) / len(values) if values else math.nan


def thinned(series: Series, count: int) -> Series:
    """
    At most ``count`` points: the means of neighbours in equally large groups, each at the group's last iteration.

    So a plot of a long training stays small. A series that is short enough is returned as it is.
    """
    if len(series) <= count:
        return series
    iterations = sorted(series)
    edges = [index * len(iterations) // count for index in range(count + 1)]
    groups = [iterations[begin:end] for begin, end in zip(edges, edges[1:])]
    return {group[-1]: sum(series[each] for each in group) / len(group) for group in groups}
