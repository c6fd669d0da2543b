"""Kinds of mutated files: each makes its file from a seed, and names the command that reads it."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

from storm_lib.baseline import Baseline

__all__ = [
    "ESCAPE",
    "KINDS",
    "Case",
    "Command",
    "Scene",
    "damaged",
    "find_cases",
    "make_command",
    "mutation",
    "plan_cases",
]

ESCAPE = "\x1b]0;storm\x07"


@dataclass
class Command:
    """
    What reads the mutated file.

    Attributes:
        program: "train" (train_net.py) or "cli" (python -m qmimic_d2).
        arguments: of it.
        names: a refusal has to hold one of them: the file, or the key that leads to it.
        must: "refuse", "handle", or "either".
        record: a JSON file that has to be there and whole where the command ends with status 0, or with 1 and a record.
        record_names: texts that the record has to hold.
        memory_mib: address space that it may take beyond what its process has already.
        datasets: (name, annotations, images) of COCO data sets to register.
        voc: (name, folder, split) of Pascal VOC data sets to register, with the digits' classes.
    """

    program: str
    arguments: List[str]
    names: List[str]
    must: str = "either"
    record: str = ""
    record_names: List[str] = field(default_factory=list)
    memory_mib: int = 3072
    datasets: List[Sequence[str]] = field(default_factory=list)
    voc: List[Sequence[str]] = field(default_factory=list)


@dataclass
class Scene:
    """
    What a kind makes its files from.

    Attributes:
        baseline: files as they should be, not to be changed.
        folder: of this case, where it writes.
        rng: seeded.
        marker: code that a file smuggles in would make this file.
    """

    baseline: Baseline
    folder: Path
    rng: random.Random
    marker: Path

    def train(self, *options: Any, names: Sequence[str], must: str = "either", config: Any = None, **rest) -> Command:
        """A training of four iterations with an evaluation at its end."""
        options = ["OUTPUT_DIR", self.folder / "output", *options]
        arguments = ["--config-file", config or self.baseline.plain, *options]
        rest.setdefault("datasets", [self.baseline.dataset])
        return Command("train", list(map(str, arguments)), list(names), must, **rest)

    def evaluate(self, weights: Path, names: Sequence[str] = (), must: str = "either") -> Command:
        arguments = ["--config-file", self.baseline.plain, "--eval-only", "MODEL.WEIGHTS", weights]
        arguments += ["OUTPUT_DIR", self.folder / "output"]
        return Command(
            "train", list(map(str, arguments)), list(names) or [weights.name], must, datasets=[self.baseline.dataset]
        )

    def predict(self, *inputs: Any, names: Sequence[str], must: str = "either", model: Any = None) -> Command:
        """Of the exported ONNX file, or of another ``model``."""
        output = self.folder / "output"
        detector = ["--model", model or self.baseline.exported / "model.onnx"]
        arguments = ["predict", "--input", *inputs, "--output", output, "--score-threshold", "0.05", *detector]
        return Command("cli", list(map(str, arguments)), list(names), must, record=str(output / "predictions.json"))

    def cli(self, command: str, *arguments: Any, names: Sequence[str], must: str = "either") -> Command:
        datasets = [self.baseline.dataset]
        return Command("cli", [command, *map(str, arguments)], list(names), must, datasets=datasets)

    def image(self) -> Path:
        """One good image."""
        return self.baseline.images / "000001.jpg"


@dataclass(frozen=True)
class Case:
    """The ``number``-th mutation of a kind; with the storm's seed it is always the same."""

    kind: str
    number: int

    @property
    def id(self) -> str:
        return f"{_slug(self.kind)}-{self.number}"


@dataclass(frozen=True)
class _Kind:
    name: str
    make: Callable[[Scene], Command]
    is_random: bool


KINDS: Dict[str, _Kind] = {}


def mutation(kind: str, is_random: bool = False) -> Callable:
    """
    Registers a function that makes the files of a case and returns the command that reads them.

    Args:
        kind: "group: what is wrong".
        is_random: every number gives another file.
    """

    def register(make: Callable[[Scene], Command]) -> Callable[[Scene], Command]:
        if kind in KINDS:
            raise ValueError(f"there are two kinds {kind!r}")
        KINDS[kind] = _Kind(kind, make, is_random)
        return make

    return register


def plan_cases(count: int, seed: int) -> List[Case]:
    """One case of every kind, or a sample of them, then more of those that are random, in turn; ``count`` in all."""
    cases = [Case(kind, 0) for kind in KINDS]
    if count < len(cases):
        return random.Random(f"{seed}/plan").sample(cases, count)
    of_chance = [kind.name for kind in KINDS.values() if kind.is_random]
    number = 1
    while len(cases) < count:
        cases += [Case(kind, number) for kind in of_chance]
        number += 1
    return cases[:count]


def find_cases(id: str) -> List[Case]:
    """The case of an id, or none."""
    number = id.rpartition("-")[2]
    return [case for case in (Case(kind, int(number)) for kind in KINDS if number.isdigit()) if case.id == id]


def make_command(case: Case, baseline: Baseline, folder: Path, seed: int) -> Tuple[Command, Path]:
    """
    Makes the files of a case below ``folder``.

    Returns:
        The command, and the marker that must not appear.
    """
    folder.mkdir(parents=True)
    marker = folder / "code_ran"
    scene = Scene(baseline, folder, random.Random(f"{seed}/{case.id}"), marker)
    return KINDS[case.kind].make(scene), marker


def _slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)


def damaged(content: bytes, rng: random.Random, how: str) -> bytes:
    """``content`` cut short ("truncated"), with flipped bits ("bit flips"), or with a run of noise ("noise")."""
    if how == "truncated":
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    if how == "bit flips":
        for _ in range(rng.choice((1, 8, 64))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    else:
        start, length = rng.randrange(len(changed)), rng.choice((4, 64, 1024))
        changed[start : start + length] = rng.randbytes(length)
    return bytes(changed)
