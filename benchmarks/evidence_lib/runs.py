"""Which runs are done, and how the others are run: as tasks of qmimic_d2/cli/task_runner.py."""

import functools
import json
import os
import shutil
import statistics
import sys
from typing import Dict, List, Optional, Sequence, Set, Tuple

from detectron2.config import CfgNode

from evidence_lib import prototypes  # noqa: F401  (registers them, for the cost of their models)
from evidence_lib.matrix import Matrix, Run, Variant
from evidence_lib.records import DONE, FAILED, Record, Records, digest_of_weights, figures_of_run, versions
from evidence_lib.settings import config_digest, settings_of
from qmimic_d2.analysis import measure_cost
from qmimic_d2.cli.task_runner import Task
from qmimic_d2.config_files import changed
from qmimic_d2.engine import load_config
from qmimic_d2.run_folder import FINAL_CHECKPOINT, INFERENCE, TAG

__all__ = ["DONE", "FAILED", "NOT_YET", "OPEN", "Runs"]

OPEN, NOT_YET = "open", "not yet"


class Runs:
    """
    The runs of a matrix beside their records.

    Args:
        matrix: what there is to run.
        records: where results are kept.
        output: folder for checkpoints and logs, one folder per run.
        opts: KEY VALUE pairs over every run.
        retries_failed: a run that failed counts as open.
    """

    def __init__(
        self,
        matrix: Matrix,
        records: Records,
        output: str,
        opts: Sequence[str] = (),
        retries_failed: bool = False,
    ):
        self.matrix = matrix
        self.records = records
        self._output = output
        self._opts = tuple(opts)
        self._retries_failed = retries_failed
        self._cost: Dict[str, Tuple[int, int]] = {}
        self._expected: Dict[str, float] = {}
        # one config per variant; a seed changes one key of it
        self._config = functools.lru_cache(maxsize=None)(self._load_config)
        self._settings = functools.lru_cache(maxsize=None)(lambda variant: settings_of(self._config(variant)))

    def config(self, run: Run) -> CfgNode:
        """The resolved config of a run, without paths."""
        return changed(self._config(run.variant), "SEED", run.seed)

    def digest(self, run: Run) -> str:
        """Of everything in the config that has an effect on the result."""
        settings = {**self._settings(run.variant), "SEED": run.seed}
        if run.variant.eval_only:
            settings["EVAL_ONLY"] = True
        return config_digest(settings, self.matrix.revision)

    def record(self, run: Run) -> Optional[Record]:
        """The record of a run, if it is of this config and of the teachers as their own records have them."""
        record = self.records.read(run.variant.name, run.seed)
        if record is None or record["config_digest"] != self.digest(run):
            return None
        inputs = self._inputs(run)
        return record if all(inputs.values()) and record["inputs"] == inputs else None

    def state(self, run: Run) -> str:
        """:data:`DONE`, :data:`FAILED`, :data:`OPEN` or :data:`NOT_YET`."""
        if run.variant.not_yet:
            return NOT_YET
        record = self.record(run)
        return record["status"] if record else OPEN

    def is_settled(self, run: Run) -> bool:
        """There is nothing to do for it."""
        settled = (DONE, NOT_YET) if self._retries_failed else (DONE, NOT_YET, FAILED)
        return self.state(run) in settled

    def expected_seconds(self, run: Run) -> float:
        """As earlier runs of the variant took, or by the number of iterations."""
        name = run.variant.name
        if name not in self._expected:
            seeds = {seed for group in self.matrix.groups.values() for seed in group.seeds}
            found = [self.records.read(name, seed) for seed in sorted(seeds | {run.seed})]
            seconds = [record["seconds"] for record in found if record and record["status"] == DONE]
            rate, besides = self.matrix.seconds_per_iteration, self.matrix.seconds_besides
            by_length = besides + rate * self._iterations(run.variant)
            self._expected[name] = statistics.median(seconds) if seconds else by_length
        return self._expected[name]

    def tasks(self, runs: Sequence[Run]) -> List[Task]:
        """
        What has to be run so that every one of the given runs is settled.

        That includes the teachers whose weights are needed and not in the output folder. Where a teacher has to
        be trained again and comes out with other weights than its record has, the runs beside the earlier one
        are open again, so these are among the tasks and asked once more when it is done.
        """
        wanted = {run.name: run for run in runs if not self.is_settled(run)}
        missing: Dict[str, Run] = {}
        for run in wanted.values():
            self._add_missing(run, missing)
        names = set(missing)
        asked: Dict[str, Run] = {}
        for run in runs:
            if run.name in wanted or self._is_below(run, names):
                for need in self._all_needs(run):
                    if self._is_below(need, names):
                        asked[need.name] = need
                asked[run.name] = run
        tasks = [self._task(run, is_forced=True) for run in missing.values()]
        return tasks + [
            self._task(run, is_forced=False)
            for name, run in asked.items()
            if name not in missing and not run.variant.not_yet
        ]

    def _all_needs(self, run: Run) -> List[Run]:
        """The needs' needs first."""
        return [each for need in self._needs(run) for each in (*self._all_needs(need), need)]

    def _add_missing(self, run: Run, missing: Dict[str, Run]) -> None:
        for need in self._needs(run):
            if need.name not in missing and not self._has_weights(need):
                self._add_missing(need, missing)
                missing[need.name] = need

    def _has_weights(self, teacher: Run) -> bool:
        """Whether the output folder has the weights that the teacher's record tells of."""
        path, recorded = os.path.join(self._folder(teacher), FINAL_CHECKPOINT), self._recorded_weights(teacher)
        return bool(recorded) and os.path.isfile(path) and digest_of_weights(path) == recorded

    def _is_below(self, run: Run, teachers: Set[str]) -> bool:
        return any(need.name in teachers or self._is_below(need, teachers) for need in self._needs(run))

    def _needs(self, run: Run) -> List[Run]:
        variants = [self.matrix.variants[name] for name in run.variant.needs]
        return [Run(variant, variant.seed) for variant in variants]

    def _recorded_weights(self, teacher: Run) -> str:
        record = self.record(teacher)
        return record.get("weights", "") if record else ""

    def _folder(self, run: Run) -> str:
        return f"{self._output}/{run.name}"

    def _load_config(self, variant: Variant) -> CfgNode:
        opts = [*variant.opts, *self._opts]
        return load_config(variant.config, opts, eval_only=variant.eval_only, device="cpu")

    def _task(self, run: Run, is_forced: bool) -> Task:
        variant, folder = run.variant, self._folder(run)
        weights = {need.variant.name: f"{self._folder(need)}/{FINAL_CHECKPOINT}" for need in self._needs(run)}
        opts = ["OUTPUT_DIR", folder, "SEED", str(run.seed), *variant.opts, *self._opts]
        if variant.teacher:
            opts += ["MODEL.QMIMIC.TEACHER.WEIGHTS", weights[variant.teacher]]
        if variant.weights:
            opts += ["MODEL.WEIGHTS", weights[variant.weights]]
        command = [sys.executable, variant.script, "--config-file", f"configs/{variant.config}"]
        command += ["--eval-only"] if variant.eval_only else []
        return Task(
            name=run.name,
            command=[*command, *opts],
            output_dir=folder,
            needs=[need.name for need in self._needs(run)],
            inputs=lambda: json.dumps([self.digest(run), self._inputs(run)]),
            max_iter=self._iterations(variant),
            resumes=not variant.eval_only,
            expected_seconds=self.expected_seconds(run),
            is_done=(lambda: False) if is_forced else (lambda: self.is_settled(run)),
            on_start=lambda continues: None if continues else shutil.rmtree(folder, ignore_errors=True),
            on_success=lambda seconds: self._write_success(run, seconds),
            on_failure=lambda reason: self._write_failure(run, reason),
        )

    def _inputs(self, run: Run) -> Dict[str, str]:
        return {need.variant.name: self._recorded_weights(need) for need in self._needs(run)}

    def _write_success(self, run: Run, seconds: float) -> None:
        folder = self._folder(run)
        figures = figures_of_run(folder)
        parameters, flops = self._measured_cost(run.variant)
        record = {
            **self._head(run, DONE),
            **figures,
            "parameters": parameters,
            "flops": flops,
            "iterations": self._iterations(run.variant),
            "seconds": round(seconds, 1),
            "versions": versions(),
        }
        if not run.variant.eval_only:
            record["weights"] = digest_of_weights(os.path.join(folder, FINAL_CHECKPOINT))
        self.records.write(record)
        is_teacher = any(run.variant.name in each.needs for each in self.matrix.variants.values())
        _tidy(folder, keep=(FINAL_CHECKPOINT,) if is_teacher else ())

    def _write_failure(self, run: Run, reason: str) -> None:
        self.records.write({**self._head(run, FAILED), "reason": reason, "versions": versions()})

    def _head(self, run: Run, status: str) -> Record:
        return {
            "variant": run.variant.name,
            "seed": run.seed,
            "status": status,
            "config": run.variant.config,
            "opts": [*run.variant.opts, *self._opts],
            "config_digest": self.digest(run),
            "inputs": self._inputs(run),
        }

    def _iterations(self, variant: Variant) -> int:
        return 0 if variant.eval_only else self._config(variant).SOLVER.MAX_ITER

    def _measured_cost(self, variant: Variant) -> Tuple[int, int]:
        if variant.name not in self._cost:
            cfg = self._config(variant)
            cost = measure_cost(cfg, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
            self._cost[variant.name] = (cost.parameters, cost.flops)
        return self._cost[variant.name]


def _tidy(folder: str, keep: Sequence[str]) -> None:
    """Removes what is large and not needed any more: checkpoints and the single detections."""
    for name in os.listdir(folder):
        if (name.endswith(".pth") or name == TAG) and name not in keep:
            os.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, INFERENCE), ignore_errors=True)
