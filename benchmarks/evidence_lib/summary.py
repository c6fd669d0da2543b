"""From records to the figures of every group: what the tables, the plots and ``summary.json`` show."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple

from evidence_lib.matrix import Group, Run
from evidence_lib.records import Record
from evidence_lib.runs import DONE, FAILED, NOT_YET, OPEN, Runs
from evidence_lib.statistics import Contrast, Sample, describe, family

__all__ = [
    "ACCURACIES",
    "EARLY_SHARE",
    "HELDOUT_MATCH",
    "MATCH",
    "SHARE",
    "GroupSummary",
    "VariantSummary",
    "measure_of",
    "summarize",
    "to_dict",
]

ACCURACIES = ("AP", "AP50")
# What tables and plots show of every group besides its own measures, where it was measured.
MATCH, HELDOUT_MATCH = "match_ratio_nonzero", "heldout_match_ratio_nonzero"
EARLY_SHARE, SHARE = "grad_share_backbone:early", "grad_share_backbone:mean"
_SHOWN = (*ACCURACIES, MATCH, HELDOUT_MATCH, EARLY_SHARE, SHARE)


@dataclass(frozen=True)
class VariantSummary:
    """
    One row of a group.

    Attributes:
        name, label: of the variant.
        values: by measure, the value of every seed that is done.
        samples: by measure, their statistics.
        failed: reason, by seed.
        open_seeds: seeds that have not been run.
        not_yet: why the variant cannot be run; "" = it can.
        parameters: of the detector that ships; None before the first run.
    """

    name: str
    label: str
    values: Dict[str, Dict[int, float]]
    samples: Dict[str, Sample]
    failed: Dict[int, str]
    open_seeds: Tuple[int, ...]
    not_yet: str
    parameters: Optional[int]


@dataclass(frozen=True)
class GroupSummary:
    """
    One table.

    Attributes:
        group: of the matrix.
        variants: rows, in its order.
        contrasts: by measure, one per entry of ``group.contrasts``.
    """

    group: Group
    variants: List[VariantSummary]
    contrasts: Dict[str, List[Contrast]]

    def variant(self, name: str) -> VariantSummary:
        return next(each for each in self.variants if each.name == name)

    @property
    def has_results(self) -> bool:
        return any(each.values["AP"] or each.failed for each in self.variants)


def summarize(runs: Runs) -> List[GroupSummary]:
    """Every group of the matrix, from the records that are valid now."""
    return [_group(group, runs) for group in runs.matrix.groups.values()]


def measure_of(record: Record, measure: str) -> Optional[float]:
    """
    Args:
        measure: "AP" or "AP50"; else a scalar of the training, alone for the mean of its last ten measurements, or
            followed by ":early", ":last" or ":mean" for another figure of the record.

    Returns:
        None where it was not measured.
    """
    if measure in ACCURACIES:
        return record[measure]
    name, _, figure = measure.partition(":")
    return record["measures"].get(name, {}).get(figure or "late")


def to_dict(summaries: List[GroupSummary]) -> Dict[str, Any]:
    """For ``summary.json``."""
    groups = {}
    for summary in summaries:
        group = summary.group
        groups[group.name] = {
            "title": group.title,
            "seeds": list(group.seeds),
            "variants": [_variant_dict(each) for each in summary.variants],
            "contrasts": {
                measure: [{"a": a, "b": b, **asdict(each)} for (a, b), each in zip(group.contrasts, contrasts)]
                for measure, contrasts in summary.contrasts.items()
            },
        }
    return {"groups": groups}


def _variant_dict(variant: VariantSummary) -> Dict[str, Any]:
    content = asdict(variant)
    content["values"] = {"AP": content["values"]["AP"]}  # the others stand in the records
    return content


def _group(group: Group, runs: Runs) -> GroupSummary:
    variants = [_variant(name, group, runs) for name in group.variants]
    values = {each.name: each.values for each in variants}
    contrasts = {
        measure: family([(values[a].get(measure, {}), values[b].get(measure, {})) for a, b in group.contrasts])
        for measure in group.measures
    }
    return GroupSummary(group, variants, contrasts)


def _variant(name: str, group: Group, runs: Runs) -> VariantSummary:
    variant = runs.matrix.variants[name]
    done: Dict[int, Record] = {}
    failed: Dict[int, str] = {}
    open_seeds = []
    for seed in runs.matrix.seeds_of(name, group.seeds):
        run = Run(variant, seed)
        state = runs.state(run)
        if state == DONE:
            done[seed] = runs.record(run)
        elif state == FAILED:
            failed[seed] = runs.record(run)["reason"]
        elif state in (OPEN, NOT_YET):
            open_seeds.append(seed)
    values = {
        measure: {
            seed: value
            for seed, value in ((seed, measure_of(record, measure)) for seed, record in done.items())
            if value is not None
        }
        for measure in dict.fromkeys((*_SHOWN, *group.measures))
    }
    return VariantSummary(
        name=name,
        label=variant.label,
        values=values,
        samples={measure: describe(list(by_seed.values())) for measure, by_seed in values.items()},
        failed=failed,
        open_seeds=tuple(open_seeds),
        not_yet=variant.not_yet,
        parameters=next((record["parameters"] for record in done.values()), None),
    )
