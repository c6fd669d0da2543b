"""Plots as SVG elements for a page: text stays text, and colours are the page's, in light and in dark."""

import io
import math
import re
from typing import List, NamedTuple, Sequence, Tuple

from qmimic_d2.report.held_out import Histogram
from qmimic_d2.report.metrics import Series, thinned

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
except ImportError as error:
    raise ImportError("the report's plots need matplotlib: pip install jinja2 matplotlib") from error

__all__ = ["Look", "histogram", "lines", "look", "scatter"]

# By the number of a run; page.css has the colours.
_NUM_COLORS = 7
_DASHES = ((), (6, 2), (2, 2), (7, 2, 2, 2))
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v"}

# Stand-ins for the page's colours. They must not occur otherwise.
_INK, _GRID, _TEACHER, _STUDENT = "#010a01", "#010a02", "#010a03", "#010a04"
_VARIABLES = {_INK: "currentColor", _GRID: "var(--line)", _TEACHER: "var(--s0)", _STUDENT: "var(--s1)"}
_VARIABLES.update({f"#010b{index:02x}": f"var(--s{index})" for index in range(_NUM_COLORS)})

_MOST_POINTS = 300
_INCHES = (5.0, 3.1)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qmimic_d2",
    "font.size": 11,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


class Look(NamedTuple):
    """Number of a run's colour, lengths of its dashes and gaps ((): a whole line), and its shape."""

    color: int
    dashes: Tuple[int, ...]
    shape: str


def look(number: int) -> Look:
    """What tells a run from others, on the whole page."""
    shapes = list(_MARKERS)
    return Look(number % _NUM_COLORS, _DASHES[number % len(_DASHES)], shapes[number % len(shapes)])


def lines(
    name: str, curves: Sequence[Tuple[int, Series]], y_label: str, *, logarithmic: bool = False, is_share: bool = False
) -> str:
    """
    Values over iterations.

    Args:
        name: of the plot, for the ids in it; unique on the page.
        curves: numbers of runs, and what was measured; longer ones than 300 points are thinned.
        logarithmic: y is, where the largest value is more than 20 times the smallest.
        is_share: values are shares of 1, shown in percent.
    """
    with matplotlib.rc_context(_STYLE):
        axes = _axes("iteration", y_label)
        for number, series in curves:
            series = thinned(series, _MOST_POINTS)
            every = max(1, math.ceil(len(series) / 8))
            axes.plot(list(series), list(series.values()), markevery=every, **_style(number))
        axes.xaxis.set_major_formatter(_short)
        if is_share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        elif logarithmic and _spans_much([value for _, series in curves for value in series.values()]):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_short)
            axes.yaxis.set_minor_formatter(NullFormatter())
        return _svg(axes.figure, name)


def scatter(name: str, points: Sequence[Tuple[int, float, float]], x_label: str, y_label: str) -> str:
    """A marker for each (number of the run, x, y); x is logarithmic if the largest exceeds 20 times the smallest."""
    with matplotlib.rc_context(_STYLE):
        axes = _axes(x_label, y_label)
        for number, x, y in points:
            axes.plot([x], [y], markersize=10, markeredgewidth=1.5, **_style(number))
        places = [x for _, x, _ in points]
        if _spans_much(places):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0.0, right=1.15 * max(places))
        axes.xaxis.set_major_formatter(_short)
        axes.margins(y=0.25)
        return _svg(axes.figure, name)


def histogram(name: str, codes: Histogram) -> str:
    """Share of the entries with each code, teacher and student; logarithmic, because most are 0."""
    with matplotlib.rc_context(_STYLE):
        axes = _axes("code", "share of the entries")
        places = range(len(codes.codes))
        axes.bar(places, _shares(codes.teacher), width=0.9, color=_TEACHER, alpha=0.45, label="teacher")
        edges = [place - 0.5 for place in range(len(codes.codes) + 1)]
        axes.stairs(_shares(codes.student), edges, color=_STUDENT, linewidth=2.2, label="student", baseline=None)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.yaxis.set_minor_formatter(NullFormatter())
        every = max(1, math.ceil(len(codes.codes) / 8))
        axes.set_xticks(range(0, len(codes.codes), every), [f"{code:g}" for code in codes.codes[::every]])
        axes.legend()
        return _svg(axes.figure, name)


def _shares(counts: Sequence[float]) -> List[float]:
    total = sum(counts)
    return [count / total if total and count else math.nan for count in counts]


def _axes(x_label: str, y_label: str) -> Axes:
    axes = Figure(figsize=_INCHES, layout="constrained").subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return axes


def _style(number: int) -> dict:
    """The look of a run, in matplotlib's words."""
    color, dashes, shape = look(number)
    return {
        "color": f"#010b{color:02x}",
        "linestyle": (0, dashes) if dashes else "-",
        "marker": _MARKERS[shape],
    }


def _spans_much(values: Sequence[float]) -> bool:
    return 0.0 < 20.0 * min(values) < max(values)


def _short(value: float, position: object) -> str:
    """As matplotlib calls a formatter: 1500000 -> "1.5 M"."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):  # "1,500" is as short as "1.5 k"
        if abs(value) >= least:
            return f"{value / size:g} {unit}"
    return f"{value:,g}"


def _svg(figure: Figure, name: str) -> str:
    """The element alone, without a style that would reach the whole page, and with ids that no other plot has."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", svg)
