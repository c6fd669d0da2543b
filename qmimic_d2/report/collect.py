"""What an output folder of ``train_net.py`` holds, finished or not; what is not there is named."""

import os
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

import yaml
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from qmimic_d2.error_text import describe_error
from qmimic_d2.modeling.family import detector_name, head_section, imitates
from qmimic_d2.report.held_out import HeldOut, finite_figures, read_held_out
from qmimic_d2.report.metrics import Metrics, read_metrics
from qmimic_d2.report.run_config import model_config, on_cpu, read_run_config
from qmimic_d2.run_folder import (
    CONFIG,
    DETECTIONS,
    EVALUATION,
    FINAL_CHECKPOINT,
    METRICS,
    MIMIC,
    TAG,
    is_run,
    last_checkpoint,
    read_evaluation,
)
from qmimic_d2.yaml.config import value_of

__all__ = ["Run", "collect_run", "collect_runs"]

Content = TypeVar("Content")


@dataclass
class Run:
    """
    One run.

    Attributes:
        name: as the page shows it.
        folder: where it was read from.
        config: of the model, as nested dicts; {} where it is not known.
        teacher_config: the same of its teacher; {} without one.
        cfg: the config for building the model on the CPU, without teacher; None where this version cannot.
        metrics: of the training; empty after an evaluation alone.
        figures: AP, AP50 and so on in points, "AP-<class>" for single classes; of the last evaluation.
        held_out: the last held-out measurement, or None.
        weights: path of the checkpoint to predict with, or "".
        notes: what is missing, and why, as parts of sentences.
    """

    name: str
    folder: str
    config: Dict[str, Any] = field(default_factory=dict)
    teacher_config: Dict[str, Any] = field(default_factory=dict)
    cfg: Optional[CfgNode] = None
    metrics: Metrics = field(default_factory=Metrics)
    figures: Dict[str, float] = field(default_factory=dict)
    held_out: Optional[HeldOut] = None
    weights: str = ""
    notes: List[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """The config's value of a key such as "SOLVER.MAX_ITER"; None where it has none."""
        return value_of(self.config, key)

    def _names(self, key: str) -> List[str]:
        value = self.setting(key)
        return [each for each in value if isinstance(each, str)] if isinstance(value, (list, tuple)) else []

    @property
    def has_teacher(self) -> bool:
        """Whether it was trained with one. A class that is not registered here may be anything."""
        name = self.setting("MODEL.META_ARCHITECTURE")
        may_have_one = isinstance(name, str) and (imitates(name) or name not in META_ARCH_REGISTRY)
        return may_have_one and bool(self.setting("MODEL.QMIMIC.TEACHER.CONFIG_FILE"))

    @property
    def levels(self) -> List[str]:
        """The student's maps that are compared with the teacher's."""
        return self._names("MODEL.QMIMIC.MIMIC.IN_FEATURES") or self._names(f"MODEL.{self._heads}.IN_FEATURES")

    @property
    def _heads(self) -> str:
        try:
            return head_section(detector_name(self.config["MODEL"]))
        except (LookupError, TypeError):  # it lacks the keys, or their kinds
            return head_section("")

    @property
    def dataset(self) -> str:
        """The first test set, or ""."""
        return next(iter(self._names("DATASETS.TEST")), "")

    @property
    def detections(self) -> str:
        """The evaluation's detections, a path; "" where there are none, or where several test sets share the file."""
        path = os.path.join(self.folder, DETECTIONS)
        return path if len(self._names("DATASETS.TEST")) == 1 and os.path.isfile(path) else ""

    @property
    def ap_series(self) -> Dict[int, float]:
        """AP in points by iteration, on the first test set."""
        return self.metrics.of("bbox/AP") or self.metrics.of(f"{self.dataset}/bbox/AP")

    @property
    def state(self) -> str:
        """How far it is."""
        done, planned = self.metrics.iterations, self.setting("SOLVER.MAX_ITER")
        if not done:
            return "evaluation only" if self.figures else "nothing measured yet"
        planned = planned if type(planned) is int else 0
        if done < planned:
            return f"not finished: iteration {done:,} of {planned:,}"
        return "finished" if planned else f"{done:,} iterations"


def collect_runs(folders: Sequence[str]) -> List[Run]:
    """
    Args:
        folders: output folders, or ``NAME=FOLDER``. A folder without a name gets its own; where several have
            the same, as many of the folders above as tell them apart.

    Raises:
        FileNotFoundError, ValueError: as :func:`collect_run`; also for a name or folder that is given twice.
    """
    pairs = [_name_and_folder(each) for each in folders]
    paths = [os.path.realpath(folder) for _, folder in pairs]
    twice = [folder for (_, folder), path in zip(pairs, paths) if paths.count(path) > 1]
    if twice:
        raise ValueError(f"the folder {twice[0]!r} is given twice")
    names = [name or own for (name, _), own in zip(pairs, _short_names(paths))]
    same = [name for name in names if names.count(name) > 1]
    if same:
        raise ValueError(f"two runs have the name {same[0]!r}; give them names as in NAME=FOLDER")
    return [collect_run(folder, name=name) for name, (_, folder) in zip(names, pairs)]


def _name_and_folder(argument: str) -> Tuple[str, str]:
    """Either of them may hold "=" itself; the folder that exists decides."""
    if os.path.isdir(argument) or "=" not in argument:
        return "", argument
    places = [index for index, letter in enumerate(argument) if letter == "="]
    place = next((index for index in places if os.path.isdir(argument[index + 1 :])), places[0])
    return argument[:place], argument[place + 1 :]


def _short_names(paths: Sequence[str]) -> List[str]:
    parts = [path.strip(os.sep).split(os.sep) for path in paths]
    names: List[str] = []
    depth = 0
    while len(set(names)) < len(parts) and depth <= max(map(len, parts)):
        depth += 1
        names = ["/".join(each[-depth:]) for each in parts]
    return names


def collect_run(folder: str, *, name: str = "", cfg: Optional[CfgNode] = None, weights: str = "") -> Run:
    """
    Reads a run's files. One that is missing or broken is named in ``notes``, and its part of the report left out.

    The folder may be anybody's: its files are read as data, and nothing that they name is opened outside it.

    Args:
        folder: OUTPUT_DIR of a ``train_net.py`` run.
        name: of the run; "" = the folder's.
        cfg, weights: for a folder without ``config.yaml`` or checkpoint, as ``--eval-only`` leaves it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's.
    """
    _check_folder(folder)
    run = Run(name=name or os.path.basename(os.path.realpath(folder)), folder=folder)
    run.weights = last_checkpoint(folder) or weights
    _read_configs(run, cfg)
    run.metrics = _read(run, METRICS, read_metrics, "no curves") or run.metrics
    if run.metrics.num_unreadable:
        run.notes.append(f"some figures: lines of {METRICS} that cannot be read: {run.metrics.num_unreadable}")
    run.figures = _figures(run)
    if not run.figures:
        run.notes.append(f"no AP: neither {EVALUATION} nor {METRICS} has one")
    if not run.weights:
        run.notes.append(f"no checkpoint: neither {FINAL_CHECKPOINT} nor the file that {TAG} names is there")
    if run.has_teacher:
        run.held_out = _read(run, MIMIC, read_held_out, "no held-out measurement")
        for what, key in (("match ratio", "match_ratio"), ("gradient share", "grad_share_map")):
            if run.metrics.series and not run.metrics.of(f"qmimic/{key}", run.levels):
                run.notes.append(f"no {what} over time: {METRICS} has no qmimic/{key}")
    return run


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder!r}; give output folders of train_net.py")
    if not is_run(folder):
        below = [each for each in sorted(os.listdir(folder)) if is_run(os.path.join(folder, each))]
        hint = f" The folders in it that do: {', '.join(below)}" if below else ""
        raise ValueError(
            f"{folder!r} is no output folder of train_net.py: it holds none of {CONFIG}, {METRICS}, {EVALUATION}.{hint}"
        )


def _read(
    run: Run, name: str, read: Callable[[str], Content], loss: str, if_absent: Optional[str] = ""
) -> Optional[Content]:
    """
    Reads a file of a run. Where it is missing or broken, ``loss`` and the reason are noted.

    Args:
        if_absent: is added to the note that the file is not there; None = no note.
    """
    path = os.path.join(run.folder, name)
    if not os.path.lexists(path):
        if if_absent is not None:
            run.notes.append(f"{loss}: {name} is not there{if_absent}")
        return None
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("it is no ordinary file")
        return read(path)
    except (OSError, ValueError) as error:
        run.notes.append(f"{loss}: {name} cannot be read ({_reason(error)})")
        return None


def _reason(error: Exception) -> str:
    """In one line; the cause alone of an error that names its file, since a note names it too."""
    return " ".join(describe_error(error.__cause__ if isinstance(error.__cause__, Exception) else error).split())


def _read_configs(run: Run, given: Optional[CfgNode]) -> None:
    loss = "parameters, FLOPs, latency and pictures"
    if given is not None and not os.path.lexists(os.path.join(run.folder, CONFIG)):
        run.config, run.cfg = yaml.safe_load(given.dump()), on_cpu(given, run.weights)
        return
    writes_none = " (an evaluation alone writes none)"
    run.config = _read(run, CONFIG, read_run_config, f"no architecture, {loss}", writes_none) or {}
    if run.config:
        try:
            run.cfg = model_config(run.config, run.weights)
        except Exception as error:  # whatever a config of another version leads to
            run.notes.append(f"no {loss}: this version cannot use {CONFIG} ({_reason(error)})")
    teacher = run.setting("MODEL.QMIMIC.TEACHER.CONFIG_FILE")
    if isinstance(teacher, str) and teacher.endswith((".yaml", ".yml")):
        # a training copies it into the folder; no other place is looked at
        name = os.path.basename(teacher)
        run.teacher_config = _read(run, name, read_run_config, "no architecture of the teacher") or {}


def _figures(run: Run) -> Dict[str, float]:
    results = _read(run, EVALUATION, lambda path: read_evaluation(run.folder), "no last evaluation", if_absent=None)
    if results:
        # With several test sets Detectron2 groups the results by set.
        of_set = results if "bbox" in results else results.get(run.dataset)
        boxes = of_set.get("bbox") if isinstance(of_set, dict) else None
        figures = finite_figures(boxes) if isinstance(boxes, dict) else {}
        if figures:
            return figures
    for prefix in ("bbox/", f"{run.dataset}/bbox/"):
        series = {name[len(prefix) :]: each for name, each in run.metrics.series.items() if name.startswith(prefix)}
        if series:
            return {name: list(each.values())[-1] for name, each in series.items()}
    return {}
