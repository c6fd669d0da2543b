"""
Means, paired differences and their intervals.

All intervals are Student's t. Those that hold for a whole family of contrasts at a time are Bonferroni's: with m
contrasts each has the confidence 1 - (1 - c)/m. The p values are those of the paired t test, two-sided, and the
adjusted ones Holm's (1979), which reject no fewer contrasts than the intervals exclude 0.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from scipy import stats

__all__ = ["Contrast", "Sample", "describe", "family", "holm"]

Interval = Tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        n: number of values.
        mean: None without values.
        sd: with n - 1 in the denominator; None with fewer than two values.
        interval: of the mean; None with fewer than two values.
    """

    n: int
    mean: Optional[float]
    sd: Optional[float]
    interval: Optional[Interval]


@dataclass(frozen=True)
class Contrast:
    """
    a minus b, over the seeds that both have.

    Attributes:
        differences: by seed.
        sample: of the differences, with the interval of this contrast by itself.
        simultaneous: the interval that holds for the family; None with fewer than two pairs.
        p, p_holm: that the mean difference is 0, by itself and adjusted; None with fewer than two pairs.
    """

    differences: Dict[int, float]
    sample: Sample
    simultaneous: Optional[Interval]
    p: Optional[float]
    p_holm: Optional[float]


def describe(values: Sequence[float], confidence: float = 0.95) -> Sample:
    """Mean, standard deviation and the mean's t interval."""
    n = len(values)
    if n == 0:
        return Sample(0, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Sample(1, mean, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf((1.0 + confidence) / 2.0, n - 1)) * sd / math.sqrt(n)
    return Sample(n, mean, sd, (mean - half, mean + half))


def family(
    pairs: Sequence[Tuple[Mapping[int, float], Mapping[int, float]]], confidence: float = 0.95
) -> List[Contrast]:
    """
    The contrasts of a family.

    Args:
        pairs: for every contrast a's and b's values by seed. A seed that one of them lacks does not count.
        confidence: of each interval by itself, and of all simultaneous ones together.

    Returns:
        In the same order. The size of the family is the number of contrasts given, those without pairs included,
        so that what is corrected for does not depend on how far the runs have got.
    """
    differences = [{seed: a[seed] - b[seed] for seed in sorted(set(a) & set(b))} for a, b in pairs]
    single = [describe(list(each.values()), confidence) for each in differences]
    together = 1.0 - (1.0 - confidence) / max(len(pairs), 1)
    simultaneous = [describe(list(each.values()), together).interval for each in differences]
    p_values = [_p_value(sample) for sample in single]
    return [
        Contrast(*fields) for fields in zip(differences, single, simultaneous, p_values, holm(p_values))
    ]


def holm(p_values: Sequence[Optional[float]]) -> List[Optional[float]]:
    """Holm's adjusted p values. None stays None and counts as one more hypothesis."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: List[Optional[float]] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _p_value(sample: Sample) -> Optional[float]:
    if sample.sd is None:
        return None
    if sample.sd == 0.0:
        return 1.0 if sample.mean == 0.0 else 0.0
    t = sample.mean / (sample.sd / math.sqrt(sample.n))
    return float(2.0 * stats.t.sf(abs(t), sample.n - 1))
