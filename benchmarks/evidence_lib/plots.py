"""
Pictures of a group: every run with its mean, the paired differences, and AP over a quantity; and of the overview:
every claim in every setting.
"""

import os
from typing import Dict, List, Optional, Sequence, Tuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from evidence_lib.overview import OverviewSummary  # noqa: E402
from evidence_lib.statistics import Contrast, Interval, Sample  # noqa: E402
from evidence_lib.summary import ACCURACIES, EARLY_SHARE, SHARE, GroupSummary, VariantSummary  # noqa: E402

__all__ = ["draw_group", "draw_overview"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
GREY, BLACK = "#999999", "#222222"
LINE_COLORS, LINE_MARKERS = (BLUE, ORANGE, GREEN, PURPLE), ("o", "s", "^", "D")
SHARE_LINES = ((EARLY_SHARE, "-", "at the beginning"), (SHARE, ":", "whole training"))
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "svg.hashsalt": "evidence",
}
_ROW = 0.32  # inches
_BELOW = 0.22  # of a row: where the single runs stand, so that the mean hides none
_DPI = 110
_OVERVIEW_LIMITS = (-12.0, 16.0)  # AP; what varies between seeds by more would flatten the rest


def draw_group(summary: GroupSummary, folder: str) -> List[str]:
    """
    Writes ``<group>.png``: for every measure the runs on the left and the paired differences on the right; and
    ``<group>_over_x.png`` for a group with an axis.

    Returns:
        Paths of the files; none for a group without results.
    """
    measures = [
        measure
        for measure in summary.group.measures
        if any(each.values.get(measure) for each in summary.variants)
    ]
    if not measures:
        return []
    os.makedirs(folder, exist_ok=True)
    with plt.rc_context(_STYLE):
        paths = [_draw_measures(summary, measures, os.path.join(folder, f"{summary.group.name}.png"))]
        if summary.group.axis and _has_line(summary):
            paths.append(_draw_over_axis(summary, os.path.join(folder, f"{summary.group.name}_over_x.png")))
    return paths


def draw_overview(overview: OverviewSummary, folder: str) -> List[str]:
    """
    Writes ``overview.png``: one column per claim, one row per setting.

    Returns:
        Its path; nothing for an overview without results.
    """
    if not overview.has_results:
        return []
    os.makedirs(folder, exist_ok=True)
    columns = len(overview.claims)
    size = (2.6 + 2.1 * columns, 1.4 + _ROW * len(overview.settings))
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(1, columns, squeeze=False, sharey=True, figsize=size, layout="constrained")
        for axes, summary in zip(grid[0], overview.claims):
            _draw_contrasts(axes, summary.contrasts, "AP")
            if summary.claim.paper is not None:
                axes.axvline(summary.claim.paper, color=BLUE, linewidth=1.0, linestyle="--", zorder=1)
            axes.set_title(summary.claim.label.replace(" − ", " −\n"), fontsize=9)
            _label_rows(axes, [each.label for each in overview.settings])
            axes.set_xlim(*_OVERVIEW_LIMITS)
            _write_means_outside(axes, summary.contrasts)
        figure.supxlabel(
            "difference in AP (thick: 95 %, thin: 95 % for all settings together, dashed: the paper; a number is a "
            "mean outside the axes)",
            fontsize=9,
        )
        return [_save(figure, os.path.join(folder, "overview.png"))]


def _draw_measures(summary: GroupSummary, measures: Sequence[str], path: str) -> str:
    has_contrasts = bool(summary.group.contrasts)
    rows = max(len(summary.variants), len(summary.group.contrasts))
    figure, grid = plt.subplots(
        len(measures),
        1 + has_contrasts,
        squeeze=False,
        figsize=(6.8 * (1 + has_contrasts), len(measures) * (1.2 + _ROW * rows)),
        layout="constrained",
    )
    for axes, measure in zip(grid, measures):
        _draw_runs(axes[0], summary.variants, measure)
        if has_contrasts:
            _draw_differences(axes[1], summary, measure)
    figure.suptitle(summary.group.title, fontsize=11)
    return _save(figure, path)


def _draw_runs(axes: Axes, variants: Sequence[VariantSummary], measure: str) -> None:
    for row, variant in enumerate(variants):
        values = list(variant.values.get(measure, {}).values())
        _draw_dots(axes, row, values, measure, BLUE)
        sample = variant.samples.get(measure)
        if sample and sample.mean is not None:
            _draw_mean(axes, row, sample.mean, sample.interval, measure)
    _label_rows(axes, [each.label for each in variants])
    axes.set_xlabel(_name(measure))


def _draw_differences(axes: Axes, summary: GroupSummary, measure: str) -> None:
    labels = {each.name: each.label for each in summary.variants}
    contrasts = summary.contrasts[measure]
    _draw_contrasts(axes, contrasts, measure)
    _label_rows(axes, [f"{labels[a]} −\n{labels[b]}" for a, b in summary.group.contrasts])
    axes.set_xlabel(f"difference in {_name(measure)}\n(thick: 95 %,\nthin: 95 % for all {len(contrasts)} together)")


def _draw_contrasts(axes: Axes, contrasts: Sequence[Optional[Contrast]], measure: str) -> None:
    axes.axvline(0.0, color=GREY, linewidth=1.0, zorder=1)
    for row, contrast in enumerate(contrasts):
        if contrast is None:
            continue
        values = list(contrast.differences.values())
        _draw_dots(axes, row, values, measure, ORANGE)
        if contrast.simultaneous:
            axes.plot(_shown(contrast.simultaneous, measure), [row, row], color=BLACK, linewidth=1.0, zorder=3)
        if contrast.sample.mean is not None:
            _draw_mean(axes, row, contrast.sample.mean, contrast.sample.interval, measure)


def _write_means_outside(axes: Axes, contrasts: Sequence[Optional[Contrast]]) -> None:
    low, high = axes.get_xlim()
    for row, contrast in enumerate(contrasts):
        mean = contrast.sample.mean if contrast else None
        if mean is not None and not low <= mean <= high:
            side = "left" if mean < low else "right"
            axes.text(low if mean < low else high, row - _BELOW, f"{mean:+.1f}", ha=side, va="center", fontsize=8)


def _draw_dots(axes: Axes, row: int, values: Sequence[float], measure: str, color: str) -> None:
    rows = [row + _BELOW] * len(values)
    axes.plot(_shown(values, measure), rows, "o", color=color, alpha=0.5, markersize=4, markeredgewidth=0, zorder=2)


def _draw_mean(axes: Axes, row: int, mean: float, interval: Optional[Interval], measure: str) -> None:
    if interval:
        axes.plot(_shown(interval, measure), [row, row], color=BLACK, linewidth=2.5, zorder=4)
    axes.plot(_shown([mean], measure), [row], "D", color=BLACK, markersize=5, zorder=5)


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first row on top
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)


def _draw_over_axis(summary: GroupSummary, path: str) -> str:
    on_lines = [name for line in summary.group.axis.lines.values() for name in line]
    shares = [each for each in SHARE_LINES if any(summary.variant(name).values.get(each[0]) for name in on_lines)]
    figure, grid = plt.subplots(
        1, 1 + bool(shares), squeeze=False, figsize=(5.5 * (1 + bool(shares)), 4.2), layout="constrained"
    )
    for axes, drawn, label in zip(grid[0], ((("AP", "-", ""),), shares), ("AP", "the mimic's share of the gradients")):
        _draw_lines(axes, summary, drawn)
        if label == "AP":
            for name in summary.group.axis.beside:
                _draw_level(axes, summary.variant(name))
        axes.set_ylabel(label)
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.suptitle(summary.group.title, fontsize=11)
    return _save(figure, path)


def _draw_lines(axes: Axes, summary: GroupSummary, measures: Sequence[Tuple[str, str, str]]) -> None:
    lines = summary.group.axis.lines
    ticks = sorted({x for line in lines.values() for x in line.values()})
    is_log = ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]
    # lines stand a little beside one another, so that their intervals do not hide each other
    step = (ticks[-1] / ticks[0]) ** 0.012 if is_log else 1.0
    for index, (name, line) in enumerate(lines.items()):
        color, marker = LINE_COLORS[index % len(LINE_COLORS)], LINE_MARKERS[index % len(LINE_MARKERS)]
        shift = step ** (index - (len(lines) - 1) / 2)
        points = sorted((x * shift, variant) for variant, x in line.items())
        for measure, style, which in measures:
            label = ", ".join(filter(None, (name, which)))
            drawn = [(x, summary.variant(variant)) for x, variant in points]
            _draw_line(axes, drawn, measure, {"color": color, "marker": marker, "linestyle": style, "label": label})
    if is_log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(summary.group.axis.label)
    axes.grid()


def _draw_line(
    axes: Axes, points: Sequence[Tuple[float, VariantSummary]], measure: str, look: Dict[str, str]
) -> None:
    drawn = [(x, each) for x, each in points if each.values.get(measure)]
    if not drawn:
        return
    color, marker = look["color"], look["marker"]
    for x, each in drawn:
        values, interval = list(each.values[measure].values()), each.samples[measure].interval
        axes.plot([x] * len(values), values, marker, color=color, alpha=0.3, markersize=4, zorder=2)
        if interval:
            axes.plot([x, x], interval, color=color, linewidth=2.0, zorder=3)
    means = [each.samples[measure].mean for _, each in drawn]
    axes.plot([x for x, _ in drawn], means, markersize=6, linewidth=1.2, zorder=4, **look)


def _draw_level(axes: Axes, variant: VariantSummary) -> None:
    sample: Optional[Sample] = variant.samples.get("AP")
    if sample is None or sample.mean is None:
        return
    axes.axhline(sample.mean, color=GREY, linewidth=1.2, linestyle="--", label=variant.label, zorder=1)
    if sample.interval:
        axes.axhspan(*sample.interval, color=GREY, alpha=0.15, linewidth=0, zorder=0)


def _has_line(summary: GroupSummary) -> bool:
    return any(
        summary.variant(name).values.get("AP") for line in summary.group.axis.lines.values() for name in line
    )


def _shown(values: Sequence[float], measure: str) -> List[float]:
    """APs are in per cent already; ratios and shares become so."""
    return [value if measure in ACCURACIES else 100.0 * value for value in values]


def _name(measure: str) -> str:
    return measure if measure in ACCURACIES else f"{measure}, %"


def _save(figure, path: str) -> str:
    # no date and no version in it: the same figures give the same file
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
    return path
