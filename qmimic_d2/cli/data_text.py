"""What ``data check`` prints, within 80 columns."""

import itertools
import textwrap
from typing import List, Sequence

import numpy as np

from qmimic_d2.cli.printable import printable
from qmimic_d2.data.figures import DataFigures

__all__ = ["figures_text", "wrapped"]

_WIDTH = 80
_LABEL = 10  # columns before a line's content
_NAME = 24  # columns of a class's name
_BAR = 24
# Borders of the bins. COCO's small and medium end at 32 and 96 pixels.
_PIXELS = (0, 8, 16, 32, 64, 96, 192, 384, np.inf)
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, np.inf)
_MOST_CLASSES = 20


def figures_text(figures: DataFigures) -> str:
    """A block of lines about one data set."""
    counts = figures.boxes_of_images
    empty = int((counts == 0).sum())
    images = f"{len(counts):,}" + (f", {empty:,} without a box" if empty else "")
    lines = [_line("images", images), _line("", _image_sizes(figures))]
    boxes = f"{len(figures.labels):,}"
    if len(figures.labels):
        boxes += f"; {counts.mean():.1f} in an image, {counts.max():,} at most"
    if figures.num_crowds:
        boxes += f"; {figures.num_crowds:,} crowds besides"
    lines += [_line("boxes", boxes), *_class_lines(figures)]
    if len(figures.labels):
        lines += _size_lines(figures)
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Lines of a message of the check, indented; names that are longer than a line stay whole."""
    lines: List[str] = []
    for line in text.splitlines():
        starts = ("  - ", "    ") if line.startswith("- ") else ("  ", "  ")
        lines += textwrap.wrap(
            printable(line[2:] if line.startswith("- ") else line),
            _WIDTH,
            initial_indent=starts[0],
            subsequent_indent=starts[1],
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _line(label: str, content: str) -> str:
    return f"  {label:<{_LABEL}}{content}".rstrip()


def _image_sizes(figures: DataFigures) -> str:
    sizes = figures.image_sizes[~np.isnan(figures.image_sizes).any(axis=1)].astype(int)
    if not len(sizes):
        return "sizes are not known"
    kinds = np.unique(sizes, axis=0)
    if len(kinds) == 1:
        return "{} x {} pixels, all".format(*kinds[0])
    by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
    least, middle, most = ("{} x {}".format(*by_area[at]) for at in (0, len(sizes) // 2, -1))
    return f"{least} to {most} pixels, {middle} in the middle; {len(kinds):,} sizes"


def _class_lines(figures: DataFigures) -> List[str]:
    counts = figures.class_counts()
    ranked = sorted(counts, key=lambda name: -counts[name])
    shown = ranked if len(ranked) <= _MOST_CLASSES else ranked[: _MOST_CLASSES - 1]
    names = [_shortened(name) for name in shown]
    width = max(map(len, names), default=0)
    most, total = max(counts.values(), default=0), max(len(figures.labels), 1)
    lines = [_line("classes", f"{len(counts):,}")]
    for name, short in zip(shown, names):
        bar = _bar(counts[name], most)
        lines.append(_line("", f"{short:<{width}} {counts[name]:>9,} {counts[name] / total:>6.1%}  {bar}"))
    if len(ranked) > len(shown):
        rest = [counts[name] for name in ranked[len(shown) :]]
        lines.append(_line("", f"and {len(rest):,} more classes with {min(rest):,} to {max(rest):,} boxes each"))
    without = sum(count == 0 for count in counts.values())
    if without:
        lines.append(_line("", f"{without:,} of them without a box"))
    return lines


def _size_lines(figures: DataFigures) -> List[str]:
    pixels, shares = figures.sizes(), figures.relative_sizes()
    shares = shares[~np.isnan(shares)]
    left = ["in pixels", *_histogram(pixels, _PIXELS, "{:g}"), _quantiles(pixels, "{:.0f}")]
    right = []
    if len(shares):
        title = "relative to the image's longer side"
        right = [title, *_histogram(shares, _SHARES, "{:.0%}"), _quantiles(shares, "{:.1%}")]
    rows = itertools.zip_longest(left, right, fillvalue="")
    lines = [_line("box sizes", "sqrt(width x height)")]
    return lines + [f"    {first:<38}{second}".rstrip() for first, second in rows]


def _histogram(values: np.ndarray, borders: Sequence[float], form: str) -> List[str]:
    """A line for each bin between the first and the last that hold a value."""
    counts = np.histogram(values, borders)[0]
    edges = [form.format(each) for each in borders[:-1]]
    ranges = [*(f"{low} - {high}" for low, high in zip(edges, edges[1:])), f"over {edges[-1]}"]
    filled = np.flatnonzero(counts)
    return [
        f"{ranges[at]:>9} {counts[at]:>9,} {counts[at] / len(values):>4.0%} {_bar(counts[at], counts.max(), 10)}"
        for at in range(filled[0], filled[-1] + 1)
    ]


def _quantiles(values: np.ndarray, form: str) -> str:
    low, middle, high = (form.format(each) for each in np.quantile(values, (0.1, 0.5, 0.9)))
    return f"median {middle}; 80% are {low} to {high}"


def _bar(count: int, most: int, length: int = _BAR) -> str:
    return "#" * max(round(length * count / most), int(count > 0)) if most else ""


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."
