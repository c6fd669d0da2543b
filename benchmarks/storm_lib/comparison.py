"""Compares a training that was killed and resumed with an uninterrupted one: losses, metrics, weights."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch

__all__ = ["Record", "compare_runs", "read_record"]

FINAL = "model_final.pth"

# Detectron2 writes medians of so many iterations to metrics.json.
_WINDOW = 20
# What depends on the clock and not on the training.
_CLOCK = ("time", "eta_seconds", "epoch")
_SHOWN = 3


@dataclass
class Record:
    """
    What the recorder wrote.

    Attributes:
        starts: first iteration of every process that trained.
        steps: by iteration, the scalars of every time it was computed, as hexadecimal floats.
    """

    starts: List[int] = field(default_factory=list)
    steps: Dict[int, List[Dict[str, str]]] = field(default_factory=lambda: defaultdict(list))


def read_record(path: Path) -> Record:
    record = Record()
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "start" in row:
            record.starts.append(row["start"])
        else:
            record.steps[row["iteration"]].append(_without_clock(row["values"]))
    return record


def compare_runs(reference: Path, reference_record: Path, output: Path, record: Path) -> List[str]:
    """
    Args:
        reference: OUTPUT_DIR of the uninterrupted training.
        reference_record: its record.
        output: OUTPUT_DIR of the training that was killed.
        record: its record, of all its processes.

    Returns:
        What differs, in words; empty when nothing does.
    """
    expected, found = read_record(reference_record), read_record(record)
    problems = _compare_steps(expected, found)
    problems += _compare_metrics(_rows(reference), _rows(output), expected, found.starts)
    problems += _compare_weights(reference / FINAL, output / FINAL)
    return problems


def _without_clock(values: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith(_CLOCK)}


def _compare_steps(expected: Record, found: Record) -> List[str]:
    missing = sorted(set(expected.steps) - set(found.steps))
    problems = [f"iterations {missing} were never computed"] if missing else []
    differing = []
    for iteration, computed in sorted(found.steps.items()):
        wanted = expected.steps.get(iteration, [{}])[0]
        for values in computed:
            differing += [
                f"iteration {iteration}: {name} is {_shown(values.get(name))}, uninterrupted {_shown(wanted.get(name))}"
                for name in sorted(set(wanted) | set(values))
                if values.get(name) != wanted.get(name)
            ]
    return problems + _first(differing)


def _rows(folder: Path) -> Dict[int, Dict[str, float]]:
    """Rows of metrics.json by iteration. A later row of an iteration counts; keys that it lacks are kept."""
    path, rows = folder / "metrics.json", defaultdict(dict)
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        rows[row["iteration"]].update(_without_clock(row))
    return rows


def _compare_metrics(
    expected: Dict[int, Dict[str, float]], found: Dict[int, Dict[str, float]], steps: Record, starts: List[int]
) -> List[str]:
    problems = []
    for iteration, row in sorted(expected.items()):
        if iteration not in found:
            problems.append(f"metrics.json has no row of iteration {iteration}")
            continue
        missing = sorted(set(row) - set(found[iteration]))
        if missing:
            problems.append(f"metrics.json's row of iteration {iteration} lacks {missing}")
        for name in sorted(set(row) & set(found[iteration])):
            value = found[iteration][name]
            if not any(_is_equal(value, each) for each in [row[name], *_medians(steps, starts, iteration, name)]):
                problems.append(f"metrics.json: {name} of iteration {iteration} is {value}, uninterrupted {row[name]}")
    return _first(problems)


def _medians(steps: Record, starts: List[int], iteration: int, name: str) -> Iterator[float]:
    """The medians that are right for a process that began at one of ``starts``: they begin anew after a resume."""
    for start in sorted(set(starts)):
        first = max(start, iteration - _WINDOW + 1)
        values = [
            float.fromhex(steps.steps[each][0][name])
            for each in range(first, iteration + 1)
            if steps.steps.get(each) and name in steps.steps[each][0]
        ]
        if values:
            yield statistics.median(values)


def _compare_weights(expected: Path, found: Path) -> List[str]:
    if not found.is_file():
        return [f"{found.name} was not written"]
    one, other = (torch.load(path, map_location="cpu", weights_only=True) for path in (expected, found))
    wanted, given = (
        {name: value for name, value in _leaves(content) if name.startswith("/model/") or "/optimizer/" in name}
        for content in (one, other)
    )
    differing = [name for name in sorted(set(wanted) | set(given)) if not _is_same(wanted.get(name), given.get(name))]
    return [
        f"{found.name} differs from the uninterrupted one in {len(differing)} entries: {differing[:_SHOWN]}"
    ] * bool(differing)


def _leaves(node: Any, name: str = "") -> Iterator[Tuple[str, Any]]:
    if isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{name}/{key}")
    else:
        yield name, node


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    return type(one) is type(other) and one == other


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_equal(one: Any, other: Any) -> bool:
    are_floats = isinstance(one, float) and isinstance(other, float)
    return one == other or (are_floats and math.isnan(one) and math.isnan(other))


def _shown(value: Any) -> str:
    return "absent" if value is None else repr(float.fromhex(value))


def _first(problems: List[str]) -> List[str]:
    more = len(problems) - _SHOWN
    return problems[:_SHOWN] + ([f"and {more} more of this sort"] if more > 0 else [])
