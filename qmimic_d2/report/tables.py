"""The columns of the page's tables: what is shown, and what is sorted by."""

import math
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from qmimic_d2.report.collect import Run
from qmimic_d2.report.cost import Cost
from qmimic_d2.report.metrics import last_mean

__all__ = ["Column", "class_columns", "class_names", "held_out_columns", "held_out_rows", "result_columns"]

NOT_KNOWN = "–"
_CLASS = "AP-"


@dataclass
class Column:
    """
    Attributes:
        heading: of the column.
        hint: what it means.
        values: per row, what is sorted by; None = not known.
        texts: per row, what is shown.
    """

    heading: str
    hint: str
    values: List[Optional[float]]
    texts: List[str]


def _column(heading: str, hint: str, text: Callable[[float], str], values: Sequence[Optional[float]]) -> Column:
    values = [None if value is None or not math.isfinite(value) else float(value) for value in values]
    return Column(heading, hint, values, [NOT_KNOWN if value is None else text(value) for value in values])


def _filled(columns: Sequence[Column]) -> List[Column]:
    return [column for column in columns if any(value is not None for value in column.values)]


def result_columns(runs: Sequence[Run], costs: Sequence[Optional[Cost]]) -> List[Column]:
    """AP, size, cost and match ratio of every run; a column that no run fills is left out."""
    sizes = sorted({(cost.width, cost.height) for cost in costs if cost})
    pixels = " or ".join(f"{width} × {height}" for width, height in sizes)
    threads = " or ".join(str(each) for each in sorted({cost.threads for cost in costs if cost and cost.seconds}))
    in_threads = f"CPU ms, {threads} thread{'' if threads == '1' else 's'}"

    def figure(name):
        return [run.figures.get(name) for run in runs]

    def cost(name):
        return [getattr(each, name) if each else None for each in costs]

    def match(name):
        return [last_mean(run.metrics.of(f"qmimic/{name}", run.levels)) for run in runs]

    flops = f"multiply-adds of one image of {pixels} pixels"
    checkpoint = "the file on disk: the weights, the adapter, and the optimizer's state"
    seconds = "median time of one image where this page was written, batch 1, resizing included; all runs in turn"
    ratio = "same code in training; mean of the last 10 measurements"
    nonzero = "the same where either code is not 0"
    return _filled(
        [
            _column("AP", "box AP, mean over IoU 0.5 to 0.95, in points", _point, figure("AP")),
            _column("AP50", "box AP at IoU 0.5", _point, figure("AP50")),
            _column("parameters", "learned values; no teacher, no adapter", _amount, cost("parameters")),
            _column("FLOPs", flops, _amount, cost("flops")),
            _column("weights", "the detector's tensors, 32-bit", size_text, cost("weight_bytes")),
            _column("checkpoint", checkpoint, size_text, cost("file_bytes")),
            _column(in_threads, seconds, _point, [each and 1e3 * each for each in cost("seconds")]),
            _column("match", ratio, _percent, match("match_ratio")),
            _column("match, not both 0", nonzero, _percent, match("match_ratio_nonzero")),
        ]
    )


def class_names(runs: Sequence[Run]) -> List[str]:
    """Classes of which any run has an AP, in the order of the evaluation."""
    names = [name[len(_CLASS) :] for run in runs for name in run.figures if name.startswith(_CLASS)]
    return list(dict.fromkeys(names))


def class_columns(runs: Sequence[Run]) -> List[Column]:
    """One column per run, one row per class."""
    names = class_names(runs)
    return [_column(run.name, "", _point, [run.figures.get(_CLASS + name) for name in names]) for run in runs]


def held_out_rows(runs: Sequence[Run]) -> List[Tuple[int, str]]:
    """(number of the run, map) for every map that was measured on held-out images."""
    return [(number, level) for number, run in enumerate(runs) if run.held_out for level in run.held_out.figures]


def held_out_columns(runs: Sequence[Run]) -> List[Column]:
    """One row per :func:`held_out_rows`; a column that nothing fills is left out."""
    rows = [runs[number].held_out.figures[level] for number, level in held_out_rows(runs)]
    return _filled([_column(*about, [row.get(key) for row in rows]) for key, *about in _HELD_OUT])


def _point(value: float) -> str:
    return f"{value:.1f}"


def _fraction(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _amount(value: float) -> str:
    """592400 -> "592 k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what three digits show as 1
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def size_text(value: float) -> str:
    """Bytes: 2400000 -> "2.4 MB"."""
    return f"{_amount(value)}B" if value >= 1e3 else f"{value:.0f} B"


# By the key in mimic.json: heading, hint and form.
_HELD_OUT = (
    ("match_ratio", "match", "same code", _percent),
    ("match_ratio_nonzero", "match, not both 0", "same code where either is not 0", _percent),
    ("within_one", "within one", "codes at most one step apart", _percent),
    ("within_one_nonzero", "within one, not both 0", "the same where either is not 0", _percent),
    ("cosine", "cosine", "of the features before they become codes", _fraction),
    ("relative_error", "relative error", "‖s − t‖ / ‖t‖ of the features before they become codes", _fraction),
    ("teacher_sparsity", "zero, teacher", "share of zero codes", _percent),
    ("student_sparsity", "zero, student", "share of zero codes", _percent),
    ("teacher_saturation", "saturated, teacher", "share at or above the last code", _percent),
    ("student_saturation", "saturated, student", "share at or above the last code", _percent),
    ("teacher_dead_channels", "dead, teacher", "channels that are 0 everywhere", _percent),
    ("student_dead_channels", "dead, student", "channels that are 0 everywhere", _percent),
    ("student_at_threshold", "at the threshold", "share of r in 0 to s within s/10 of s/2; even: 20 %", _percent),
    ("teacher_rms", "rms, teacher", "root mean square of the teacher's features", _fraction),
)
