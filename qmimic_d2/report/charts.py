"""Which plots the page shows, with their titles and what they say in words."""

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from qmimic_d2.report import plots
from qmimic_d2.report.collect import Run
from qmimic_d2.report.cost import Cost
from qmimic_d2.report.metrics import Series

__all__ = ["Chart", "agreement_charts", "histogram_charts", "size_charts", "training_charts"]


@dataclass
class Chart:
    """
    A plot.

    Attributes:
        title: its heading.
        hint: what to know of it.
        alt: what it shows, in words.
        svg: the element.
        numbers: of the runs in it.
    """

    title: str
    hint: str
    alt: str
    svg: str
    numbers: List[int]


def training_charts(runs: Sequence[Run]) -> List[Chart]:
    """Losses and AP over iterations; what no run has is left out."""
    found = [
        _lines(
            runs,
            "Detection loss",
            "All losses but the mimic's, medians of 20 iterations.",
            lambda run: run.metrics.detection_loss(),
            y_label="loss",
            logarithmic=True,
        ),
        _lines(
            runs,
            "Mimic loss",
            "λ included, so runs of another weight or normalisation have another scale.",
            lambda run: run.metrics.mimic_loss(),
            y_label="loss",
            logarithmic=True,
        ),
    ]
    if any(len(run.ap_series) > 1 for run in runs):
        found.append(_lines(runs, "AP", "At every evaluation.", lambda run: run.ap_series, y_label="AP"))
    return [chart for chart in found if chart]


def agreement_charts(runs: Sequence[Run]) -> List[Chart]:
    """Match ratio and gradient share over iterations; what no run has is left out."""
    figures = (
        ("Match ratio", "match_ratio", "Entries of the RoIs on which teacher and student have the same code."),
        ("Match ratio, not both 0", "match_ratio_nonzero", "The same among entries where either code is not 0."),
        (
            "Gradient share on the feature map",
            "grad_share_map",
            "Norm of the mimic loss's gradient in the sum of its and the detection losses' norms.",
        ),
        ("Gradient share on the backbone", "grad_share_backbone", "The same over all parameters of the backbone."),
    )
    found = [
        _lines(
            runs,
            title,
            hint,
            lambda run, key=key: run.metrics.of(f"qmimic/{key}", run.levels),
            y_label="share",
            is_share=True,
        )
        for title, key, hint in figures
    ]
    found.append(
        _lines(
            runs,
            "Angle between the gradients",
            "Cosine of the mimic's and the detection losses' gradient on the backbone; below 0 they are at odds.",
            lambda run: run.metrics.of("qmimic/grad_cosine_backbone", run.levels),
            y_label="cosine",
        )
    )
    return [chart for chart in found if chart]


def _lines(
    runs: Sequence[Run], title: str, hint: str, series_of: Callable[[Run], Series], y_label: str, **style
) -> Optional[Chart]:
    curves = [(number, series_of(run)) for number, run in enumerate(runs)]
    curves = [(number, series) for number, series in curves if series]
    if not curves:
        return None
    ends = []
    for number, series in curves:
        last = list(series.values())[-1]
        ends.append(f"{runs[number].name} ends at {f'{100 * last:.1f} %' if style.get('is_share') else f'{last:.3g}'}")
    name = "plot-" + "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    svg = plots.lines(name, curves, y_label, **style)
    return Chart(title, hint, f"{title} over iterations: {'; '.join(ends)}.", svg, [number for number, _ in curves])


def size_charts(runs: Sequence[Run], costs: Sequence[Optional[Cost]]) -> List[Chart]:
    """AP against parameters, FLOPs, and the time of an image."""
    kinds: Tuple = (
        ("parameters", "Parameters", lambda cost: float(cost.parameters)),
        ("FLOPs", "FLOPs of an image", lambda cost: float(cost.flops)),
        ("time", "CPU time of an image, ms", lambda cost: None if cost.seconds is None else 1e3 * cost.seconds),
    )
    found = []
    for key, label, value_of in kinds:
        points, words = [], []
        for number, (run, cost) in enumerate(zip(runs, costs)):
            value = value_of(cost) if cost else None
            if value is not None and "AP" in run.figures:
                points.append(plots.Point(number, value, run.figures["AP"]))
                words.append(f"{run.name}: AP {run.figures['AP']:.1f} at {value:,.4g}")
        if points:
            svg = plots.scatter(f"plot-size-{key}", points, label, "AP")
            numbers = [point.number for point in points]
            found.append(Chart(f"AP against {key}", "", f"AP against {label}. {'; '.join(words)}.", svg, numbers))
    return found


def histogram_charts(runs: Sequence[Run]) -> List[Chart]:
    """How often teacher and student use each code, per run and map."""
    found = []
    for number, run in enumerate(runs):
        for level, codes in (run.held_out.histograms if run.held_out else {}).items():
            totals = [sum(counts) for counts in (codes.teacher, codes.student)]
            if not all(totals):
                continue
            zeros = [
                sum(count for code, count in zip(codes.codes, counts) if code == 0.0) / total
                for counts, total in zip((codes.teacher, codes.student), totals)
            ]
            alt = (
                f"Histogram of {len(codes.codes)} codes of {run.name}, {level}: zero are {100 * zeros[0]:.1f} % of "
                f"the teacher's entries and {100 * zeros[1]:.1f} % of the student's."
            )
            svg = plots.histogram(f"plot-codes-{number}-{len(found)}", codes)
            hint = f"Held-out images, zero: teacher {100 * zeros[0]:.1f} %, student {100 * zeros[1]:.1f} %."
            found.append(Chart(f"Codes of {run.name}, {level}", hint, alt, svg, [number]))
    return found
