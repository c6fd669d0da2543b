"""Results of the storm: one for each case, a table of kinds, a JSON, and a block in the docs."""

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

from tabulate import tabulate

__all__ = ["OUTCOMES", "Result", "figures_text", "kinds_table", "to_json", "write_block"]

OUTCOMES = ("equal", "refused", "handled", "FAILED")
_BEGIN, _END = "<!-- storm: begin -->", "<!-- storm: end -->"


@dataclass
class Result:
    """
    Attributes:
        id: repeats the case, with the seed.
        kind: of fault.
        outcome: one of :data:`OUTCOMES`.
        reason: why it failed; "" otherwise.
        seconds: that it took.
        kills: that were done.
        peak_mib: memory of a mutation's process, its libraries included.
    """

    id: str
    kind: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    kills: int = 0
    peak_mib: float = 0.0


def kinds_table(results: Sequence[Result], tablefmt: str = "github") -> str:
    """Counts of outcomes by kind."""
    counts: Dict[str, Dict[str, int]] = defaultdict(lambda: dict.fromkeys(OUTCOMES, 0))
    for each in results:
        counts[each.kind][each.outcome] += 1
    rows = [[kind, *(row[outcome] or "" for outcome in OUTCOMES)] for kind, row in counts.items()]
    total = [sum(row[outcome] for row in counts.values()) for outcome in OUTCOMES]
    return tabulate([*rows, ["all", *total]], ["kind", *OUTCOMES], tablefmt=tablefmt)


def to_json(results: Sequence[Result], seed: int, seconds: float, versions: Dict[str, Any]) -> Dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "versions": versions,
        "kills": sum(each.kills for each in results),
        "failed": [each.id for each in results if each.outcome == "FAILED"],
        "results": [asdict(each) for each in results],
    }


def figures_text(results: Sequence[Result], command: str, seconds: float, versions: Dict[str, Any]) -> str:
    """The docs' paragraph and table: one row for each group of kinds."""
    groups: Dict[str, List[Result]] = defaultdict(list)
    for each in results:
        groups[each.kind.partition(":")[0]].append(each)
    rows = []
    for group, members in groups.items():
        outcomes = [sum(each.outcome == outcome for each in members) for outcome in OUTCOMES]
        kinds = len({each.kind for each in members})
        rows.append([group, kinds, len(members), *(outcome or "" for outcome in outcomes)])
    kills = sum(each.kills for each in results)
    slowest = max((each.seconds for each in results if not each.kills), default=0.0)
    peak = max((each.peak_mib for each in results), default=0.0)
    return (
        f"`{command}`: {kills} kills, {len([each for each in results if not each.kills])} other cases, "
        f"{seconds / 60:.0f} minutes. The slowest mutated file took {slowest:.0f} s, the hungriest {peak:.0f} MiB.\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.\n\n"
        + tabulate(rows, ["what", "kinds", "cases", *OUTCOMES], tablefmt="github")
    )


def write_block(path: Path, text: str) -> None:
    """
    Replaces what stands between the two marks in a file.

    Raises:
        ValueError: the file lacks them.
    """
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path} lacks the marks {_BEGIN} and {_END}")
    path.write_text(pattern.sub(lambda match: f"{_BEGIN}\n{text}\n{_END}", content), encoding="utf-8")
