"""Summaries as Markdown tables, and their place in a document."""

from typing import Callable, List, Optional, Sequence, Tuple

from tabulate import tabulate

from evidence_lib.overview import OverviewSummary
from evidence_lib.statistics import Contrast, Sample
from evidence_lib.summary import (
    ACCURACIES,
    EARLY_SHARE,
    HELDOUT_MATCH,
    MATCH,
    SHARE,
    GroupSummary,
    VariantSummary,
)

__all__ = [
    "comparison_table",
    "contrast_table",
    "group_section",
    "insert_between_markers",
    "overview_table",
    "seed_table",
]

NOTHING = "-"
# Further columns of a group's table where the runs have them: title and measure.
_COLUMNS = (
    ("match, not both 0", MATCH),
    ("the same, held-out", HELDOUT_MATCH),
    ("gradient share, early", EARLY_SHARE),
    ("gradient share", SHARE),
)


def group_section(summary: GroupSummary, heading: str = "###") -> str:
    """A heading, the table of the variants, one table per family of contrasts, and what failed."""
    group = summary.group
    seeds = f"Seeds {_seeds(group.seeds)}" + (f" ({group.seed_list})" if group.seed_list != "reporting" else "")
    parts = [f"{heading} {group.title}", f"`--group {group.name}`. {seeds}."]
    if not summary.has_results:
        return "\n\n".join([*parts, "Not run."])
    parts.append(_variant_table(summary))
    for measure, contrasts in summary.contrasts.items():
        if any(contrast.sample.n for contrast in contrasts):
            parts += [f"Paired differences, {_named(measure)}:", contrast_table(summary, measure)]
    notes = _notes(summary.variants)
    return "\n\n".join(parts + ([notes] if notes else []))


def contrast_table(summary: GroupSummary, measure: str) -> str:
    """One row per contrast of a family."""
    labels = {each.name: each.label for each in summary.variants}
    rows = [
        [f"{labels[a]} − {labels[b]}", *_contrast_cells(contrast, measure)]
        for (a, b), contrast in zip(summary.group.contrasts, summary.contrasts[measure])
    ]
    headers = ["difference", "pairs", "mean", "95 %", f"95 %, all {len(rows)}", "above 0", "p", "p, Holm"]
    return _table(headers, rows)


def overview_table(overview: OverviewSummary) -> str:
    """One row per setting, one column per claim; bold where the interval of all settings together excludes 0."""
    rows = [["the paper", NOTHING, *(_signed(each.claim.paper) for each in overview.claims)]]
    for index, setting in enumerate(overview.settings):
        contrasts = [each.contrasts[index] for each in overview.claims]
        pairs = sorted({each.sample.n for each in contrasts if each})
        counts = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        rows.append([setting.label, counts, *map(_overview_cell, contrasts)])
    headers = ["setting", "seeds", *(each.claim.label for each in overview.claims)]
    return _table(headers, rows)


def seed_table(summary: GroupSummary, measure: str = "AP") -> str:
    """One column per seed of the group; what is run once stands under "once"."""
    once = [each for each in summary.variants if set(each.values.get(measure, {})) - set(summary.group.seeds)]
    headers = ["", *map(str, summary.group.seeds), *(["once"] if once else [])]
    show = _shown(measure)
    rows = []
    for each in summary.variants:
        values = each.values.get(measure, {})
        row = [each.label, *(show(values.get(seed)) for seed in summary.group.seeds)]
        others = [value for seed, value in values.items() if seed not in summary.group.seeds]
        rows.append(row + ([show(others[0] if others else None)] if once else []))
    return _table(headers, rows)


def comparison_table(rows: Sequence[Tuple[str, int, Optional[float], Optional[float]]]) -> str:
    """Label, seed, AP here and AP as recorded: how well a repetition agrees."""
    show = _shown("AP")
    cells = [
        [
            label,
            str(seed),
            show(here),
            show(recorded),
            NOTHING if None in (here, recorded) else f"{here - recorded:+.1f}",
        ]
        for label, seed, here, recorded in rows
    ]
    return _table(["model", "seed", "AP here", "AP recorded", "difference"], cells)


def insert_between_markers(text: str, name: str, content: str) -> str:
    """
    Replaces what stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: the text has not both markers, once each and in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"there must be one {begin!r}, and after it one {end!r}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def _variant_table(summary: GroupSummary) -> str:
    columns = [column for column in _COLUMNS if any(each.values.get(column[1]) for each in summary.variants)]
    rows = []
    for each in summary.variants:
        sample = each.samples["AP"] if "AP" in each.samples else None
        row = [each.label, str(sample.n if sample else 0), _mean_sd(sample), _interval(sample, "AP")]
        row.append(_mean(each.samples.get("AP50"), "AP50"))
        row += [_mean(each.samples.get(measure), measure) for _, measure in columns]
        row.append(f"{each.parameters / 1e3:.0f} k" if each.parameters else NOTHING)
        rows.append(row)
    headers = ["model", "runs", "AP", "95 %", "AP50", *(title for title, _ in columns), "parameters"]
    return _table(headers, rows)


def _contrast_cells(contrast: Contrast, measure: str) -> List[str]:
    sample = contrast.sample
    above = sum(value > 0.0 for value in contrast.differences.values())
    return [
        str(sample.n),
        NOTHING if sample.mean is None else _shown(measure, sign=True)(sample.mean),
        _interval(sample, measure, sign=True),
        _interval_text(contrast.simultaneous, measure, sign=True),
        f"{above} of {sample.n}" if sample.n else NOTHING,
        _p(contrast.p),
        _p(contrast.p_holm),
    ]


def _overview_cell(contrast: Optional[Contrast]) -> str:
    if contrast is None or contrast.sample.mean is None:
        return NOTHING
    mean, together = _signed(contrast.sample.mean), contrast.simultaneous
    if contrast.sample.interval is None:
        return mean
    shown = f"**{mean}**" if together[0] > 0.0 or together[1] < 0.0 else mean
    return f"{shown}, {_interval(contrast.sample, 'AP', sign=True)}"


def _signed(ap: Optional[float]) -> str:
    return _shown("AP", sign=True)(ap)


def _notes(variants: Sequence[VariantSummary]) -> str:
    lines = []
    for each in variants:
        lines += [f"- {each.label}, seed {seed}: failed. {reason}" for seed, reason in each.failed.items()]
        if each.not_yet:
            lines.append(f"- {each.label}: not run. {each.not_yet}")
        elif each.open_seeds:
            lines.append(f"- {each.label}: not run with {_seeds(each.open_seeds)}.")
    return "\n".join(lines)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1 else ", ".join(
        map(str, seeds)
    )


def _named(measure: str) -> str:
    return measure if measure in ACCURACIES else f"`{measure}`, in percentage points"


def _shown(measure: str, sign: bool = False) -> Callable[[Optional[float]], str]:
    """How a value, or with a sign a difference, is written: APs are in per cent already, ratios become so."""
    factor = 1.0 if measure in ACCURACIES else 100.0
    plus, unit = ("+", "") if sign else ("", "" if measure in ACCURACIES else " %")
    return lambda value: NOTHING if value is None else f"{factor * value:{plus}.1f}{unit}"


def _mean_sd(sample: Optional[Sample]) -> str:
    if sample is None or sample.mean is None:
        return NOTHING
    return f"{sample.mean:.1f}" + ("" if sample.sd is None else f" ± {sample.sd:.1f}")


def _mean(sample: Optional[Sample], measure: str) -> str:
    return _shown(measure)(sample.mean if sample else None)


def _interval(sample: Optional[Sample], measure: str, sign: bool = False) -> str:
    return _interval_text(sample.interval if sample else None, measure, sign)


def _interval_text(interval: Optional[Tuple[float, float]], measure: str, sign: bool) -> str:
    if interval is None:
        return NOTHING
    low, high = map(_shown(measure, sign), interval)
    return f"{low} to {high}"


def _p(value: Optional[float]) -> str:
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    alignment = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(escaped, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)
