"""From records to the figures of every group: what the tables, the plots and ``summary.json`` show."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple

from evidence_lib.matrix import Group, Run
from evidence_lib.records import Record
from evidence_lib.runs import DONE, FAILED, NOT_YET, OPEN, Runs
from evidence_lib.statistics import Contrast, Sample, describe, family

__all__ = ["ACCURACIES", "GroupSummary", "VariantSummary", "measure_of", "summarize", "to_dict"]

ACCURACIES = ("AP", "AP50", "AP75")


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
    AP, AP50 and AP75 as they are; of a training scalar the mean of its last ten measurements. None where it was
    not measured.
    """
    if measure in ACCURACIES:
        return record[measure]
    return record["measures"].get(measure, {}).get("late")


def to_dict(summaries: List[GroupSummary]) -> Dict[str, Any]:
    """For ``summary.json``."""
    groups = {}
    for summary in summaries:
        group = summary.group
        groups[group.name] = {
            "title": group.title,
            "seeds": list(group.seeds),
            "variants": [asdict(each) for each in summary.variants],
            "contrasts": {
                measure: [{"a": a, "b": b, **asdict(each)} for (a, b), each in zip(group.contrasts, contrasts)]
                for measure, contrasts in summary.contrasts.items()
            },
        }
    return {"groups": groups}


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
    measures = {*ACCURACIES, *(measure for record in done.values() for measure in record["measures"])}
    values = {
        measure: {
            seed: value
            for seed, value in ((seed, measure_of(record, measure)) for seed, record in done.items())
            if value is not None
        }
        for measure in sorted(measures)
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
