"""Which plots the page shows, with their titles and what they say in words."""

from dataclasses import dataclass
from typing import List, Optional, Sequence

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
    detection = "All losses but the mimic's, medians of 20 iterations."
    mimic = "λ included, so runs of another weight or normalisation have another scale."
    aps = [run.ap_series for run in runs]
    return [
        *_lines(runs, "Detection loss", detection, "loss", [run.metrics.detection_loss() for run in runs]),
        *_lines(runs, "Mimic loss", mimic, "loss", [run.metrics.mimic_loss() for run in runs]),
        *_lines(runs, "AP", "At every evaluation.", "AP", aps if any(len(each) > 1 for each in aps) else []),
    ]


def agreement_charts(runs: Sequence[Run]) -> List[Chart]:
    """Match ratio and gradients over iterations; what no run has is left out."""
    found = []
    for key, title, hint in (
        ("match_ratio", "Match ratio", "Entries of the RoIs on which teacher and student have the same code."),
        ("match_ratio_nonzero", "Match ratio, not both 0", "The same among entries where either code is not 0."),
        (
            "grad_share_map",
            "Gradient share on the feature map",
            "Norm of the mimic loss's gradient in the sum of its and the detection losses' norms.",
        ),
        ("grad_share_backbone", "Gradient share on the backbone", "The same over all parameters of the backbone."),
        (
            "grad_cosine_backbone",
            "Angle between the gradients",
            "Cosine of the mimic's and the detection losses' gradient on the backbone; below 0 they are at odds.",
        ),
    ):
        series = [run.metrics.of(f"qmimic/{key}", run.levels) for run in runs]
        found += _lines(runs, title, hint, "cosine" if key == "grad_cosine_backbone" else "share", series)
    return found


def _lines(runs: Sequence[Run], title: str, hint: str, y_label: str, series: Sequence[Series]) -> List[Chart]:
    """One chart; none where the series of all runs are empty."""
    curves = {number: each for number, each in enumerate(series) if each}
    if not curves:
        return []
    is_share = y_label == "share"
    ends = []
    for number, each in curves.items():
        last = list(each.values())[-1]
        ends.append(f"{runs[number].name} ends at {f'{100 * last:.1f} %' if is_share else f'{last:.3g}'}")
    name = "plot-" + "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    svg = plots.lines(name, list(curves.items()), y_label, logarithmic=y_label == "loss", is_share=is_share)
    return [Chart(title, hint, f"{title} over iterations: {'; '.join(ends)}.", svg, list(curves))]


def size_charts(runs: Sequence[Run], costs: Sequence[Optional[Cost]]) -> List[Chart]:
    """AP against parameters, FLOPs, and the time of an image."""
    found = []
    for key, label, attribute, factor in (
        ("parameters", "Parameters", "parameters", 1.0),
        ("FLOPs", "FLOPs of an image", "flops", 1.0),
        ("time", "CPU time of an image, ms", "seconds", 1e3),
    ):
        points, words = [], []
        for number, (run, cost) in enumerate(zip(runs, costs)):
            value = getattr(cost, attribute, None)
            if value is not None and "AP" in run.figures:
                points.append((number, factor * value, run.figures["AP"]))
                words.append(f"{run.name}: AP {run.figures['AP']:.1f} at {factor * value:,.4g}")
        if points:
            svg = plots.scatter(f"plot-size-{key}", points, label, "AP")
            numbers = [number for number, *_ in points]
            found.append(Chart(f"AP against {key}", "", f"AP against {label}. {'; '.join(words)}.", svg, numbers))
    return found


def histogram_charts(runs: Sequence[Run]) -> List[Chart]:
    """How often teacher and student use each code, per run and map."""
    found = []
    for number, run in enumerate(runs):
        for level, codes in (run.held_out.histograms if run.held_out else {}).items():
            if not sum(codes.teacher) or not sum(codes.student):
                continue
            teacher, student = (
                f"{100 * sum(count for code, count in zip(codes.codes, counts) if code == 0.0) / sum(counts):.1f} %"
                for counts in (codes.teacher, codes.student)
            )
            alt = (
                f"Histogram of {len(codes.codes)} codes of {run.name}, {level}: zero are {teacher} of the teacher's "
                f"entries and {student} of the student's."
            )
            svg = plots.histogram(f"plot-codes-{number}-{len(found)}", codes)
            hint = f"Held-out images, zero: teacher {teacher}, student {student}."
            found.append(Chart(f"Codes of {run.name}, {level}", hint, alt, svg, [number]))
    return found
