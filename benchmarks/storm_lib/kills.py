"""Trainings that are killed at seeded moments, resumed to the end, and compared with an uninterrupted one."""

import os
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

from storm_lib.baseline import Baseline
from storm_lib.comparison import compare_runs
from storm_lib.moments import MAX_ITER, MOMENTS, Moment, Watch
from storm_lib.processes import ROOT, Stopped, Training, wait_until_gone
from storm_lib.results import Result

__all__ = ["KillJob", "plan_jobs", "run_kills"]

PERIODS = ("SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 15, "SOLVER.MAX_ITER", MAX_ITER)

# (data-loader workers, processes)
_SHAPES = ((0, 1), (2, 1), (0, 2), (2, 2))
_KILLS_PER_JOB = 3
_SHOWN = 3
# A training, and the end of what a kill of the main process leaves.
# A data-loader worker that is just starting ends when its imports are done: half a minute on a busy machine.
_SECONDS, _SECONDS_TO_GO, _SECONDS_TO_REFUSE = 400.0, 90.0, 90.0


@dataclass(frozen=True)
class KillJob:
    """
    One training that is killed several times.

    Attributes:
        number: of the job, and of its seed.
        workers: DATALOADER.NUM_WORKERS.
        processes: of the training.
        moments: names in :data:`MOMENTS`, one kill each.
        whole_group: for each kill, whether every process is killed, or the main one alone.
        has_second_writer: start a second training into the same folder, and kill nothing.
    """

    number: int
    workers: int
    processes: int
    moments: Tuple[str, ...] = ()
    whole_group: Tuple[bool, ...] = ()
    has_second_writer: bool = False

    @property
    def id(self) -> str:
        return f"second-writer-{self.processes}" if self.has_second_writer else f"kill-{self.number}"

    @property
    def kind(self) -> str:
        what = "a second writer" if self.has_second_writer else "kills"
        return f"{what}: {self.processes} process{'es' * (self.processes > 1)}, {self.workers} workers"


def plan_jobs(seed: int, kills: int) -> List[KillJob]:
    """Jobs with so many kills altogether, and one second writer for one and for two processes."""
    jobs: List[KillJob] = []
    shuffled: List[str] = []
    left = kills
    while left > 0:
        number = len(jobs)
        rng = random.Random(f"{seed}/plan/{number}")
        count = min(_KILLS_PER_JOB, left)
        if len(shuffled) < count:
            shuffled += rng.sample(list(MOMENTS), len(MOMENTS))
        chosen = sorted((shuffled.pop(0) for _ in range(count)), key=list(MOMENTS).index)
        workers, processes = _SHAPES[number % len(_SHAPES)]
        jobs.append(KillJob(number, workers, processes, tuple(chosen), tuple(rng.random() < 0.5 for _ in chosen)))
        left -= count
    if kills >= len(_SHAPES):
        jobs += [KillJob(len(jobs) + index, 0, each, has_second_writer=True) for index, each in enumerate((1, 2))]
    return jobs


def run_kills(
    baseline: Baseline,
    folder: Path,
    seed: int,
    jobs: Sequence[KillJob],
    at_once: int,
    say: Callable[[str], None],
    results: List[Result],
    script: Path = ROOT / "train_net.py",
) -> None:
    """
    Runs the jobs, ``at_once`` of them at a time, after one uninterrupted training for each number of processes.

    Args:
        baseline: data and config.
        folder: that the trainings write to; those of jobs that failed are kept.
        seed: of the storm.
        jobs: see :func:`plan_jobs`.
        at_once: jobs at a time.
        say: takes lines about the progress.
        results: one is added for each job.
        script: that trains.

    Raises:
        RuntimeError: an uninterrupted training fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storm = _Storm(baseline, folder, seed, say, script)
    pool = ThreadPoolExecutor(at_once)
    try:
        references = sorted({job.processes for job in jobs})
        for processes in pool.map(storm.run_reference, references):
            say(f"the uninterrupted training of {processes} process(es) has ended")
        results += pool.map(storm.run_job, jobs)
    finally:
        storm.stop.set()
        pool.shutdown(wait=True)


@dataclass
class _Storm:
    baseline: Baseline
    folder: Path
    seed: int
    say: Callable[[str], None]
    script: Path
    stop: threading.Event = field(default_factory=threading.Event)
    seconds: Dict[int, float] = field(default_factory=dict)

    def run_reference(self, processes: int) -> int:
        began = time.monotonic()
        place = self.folder / f"reference_{processes}"
        with self._start(place, KillJob(-processes, 0, processes), resume=False) as training:
            status = self._status(training)
        if status != 0:
            raise RuntimeError(f"the uninterrupted training ended with status {status}:\n{training.text()[-3000:]}")
        self.seconds[processes] = time.monotonic() - began
        return processes

    def run_job(self, job: KillJob) -> Result:
        began = time.monotonic()
        place = self.folder / job.id
        try:
            if job.has_second_writer:
                kills, problems = [], self._second_writer(job, place)
            else:
                kills, problems = self._kill_and_resume(job, place)
        except subprocess.TimeoutExpired:
            kills, problems = [], [f"no end after {_SECONDS:.0f} s"]
        reference = self.folder / f"reference_{job.processes}"
        if not problems:
            problems = compare_runs(
                reference / "output", reference / "steps.jsonl", place / "output", place / "steps.jsonl"
            )
        detail = ", ".join(kills) or "the first training goes on"
        outcome = "FAILED" if problems else "refused" if job.has_second_writer else "equal"
        self.say(f"{job.id} ({job.kind}; {detail}): {'; '.join(problems) or outcome}")
        if not problems:
            shutil.rmtree(place)
        return Result(
            job.id,
            job.kind,
            outcome,
            "; ".join(problems),
            time.monotonic() - began,
            kills=len(kills),
        )

    def _kill_and_resume(self, job: KillJob, place: Path) -> Tuple[List[str], List[str]]:
        rng = random.Random(f"{self.seed}/{job.id}")
        kills: List[str] = []
        for number, (name, whole_group) in enumerate(zip(job.moments, job.whole_group)):
            with self._start(place, job, resume=number > 0) as training:
                moment = Moment(name, rng, self.seconds[job.processes])
                watch = Watch(place / "output", training.text_file)
                while not training.has_ended and not moment.has_come(watch):
                    self._check_stop()
                    if watch.seconds > _SECONDS:
                        raise subprocess.TimeoutExpired("train_net.py", _SECONDS)
                    time.sleep(moment.pause)
                if training.has_ended:
                    status = training.wait(0)
                    if status != 0:
                        return kills, [f"ended with status {status}: {_end_of(training.text())}"]
                    continue
                training.kill(whole_group)
                kills.append(f"{name} ({'group' if whole_group else 'main process'})")
                left = wait_until_gone(training.mark, _SECONDS_TO_GO)
                if left:
                    late = f"{_SECONDS_TO_GO:.0f} s after the kill at '{name}'"
                    return kills, [f"{late} {len(left)} processes still run: {left[:_SHOWN]}"]
        with self._start(place, job, resume=True) as training:
            status = self._status(training)
            if status != 0:
                return kills, [f"--resume ended with status {status}: {_end_of(training.text())}"]
        return kills, []

    def _second_writer(self, job: KillJob, place: Path) -> List[str]:
        with self._start(place, job, resume=False) as first:
            tag = place / "output" / "last_checkpoint"
            while not tag.exists() and not first.has_ended:
                self._check_stop()
                time.sleep(0.02)
            with self._start(place, job, resume=False, name="second") as second:
                try:
                    status = second.wait(_SECONDS_TO_REFUSE)
                except subprocess.TimeoutExpired:
                    return ["a second training into the folder of a living one is not refused"]
                if status == 0 or str(place / "output") not in second.text():
                    return [f"the second training ended with status {status}: {_end_of(second.text())}"]
                if "Traceback" in second.text():
                    return [f"the second training was refused with a traceback: {_end_of(second.text())}"]
            status = self._status(first)
            return [] if status == 0 else [f"the first training ended with status {status}"]

    def _start(self, place: Path, job: KillJob, resume: bool, name: str = "steps") -> Training:
        place.mkdir(parents=True, exist_ok=True)
        arguments: List[Any] = ["--config-file", self.baseline.student] + ["--resume"] * resume
        if job.processes > 1:
            arguments += ["--num-processes", job.processes, "--dist-url", "auto"]
        options = ["OUTPUT_DIR", place / "output", "DATALOADER.NUM_WORKERS", job.workers, *PERIODS]
        return Training(
            [*arguments, *options],
            mark=f"{os.getpid()}-{job.id}-{name}",
            record=place / f"{name}.jsonl",
            datasets=[self.baseline.dataset],
            text_file=place / f"{name}.txt",
            script=self.script,
        )

    def _status(self, training: Training) -> int:
        end = time.monotonic() + _SECONDS
        while not training.has_ended:
            self._check_stop()
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("train_net.py", _SECONDS)
            time.sleep(0.05)
        return training.wait(0)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped()


def _end_of(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:]
