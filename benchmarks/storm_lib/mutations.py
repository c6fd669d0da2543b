"""Gives every mutated file to the command that reads it, in a few processes that fork, and judges what happens."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from storm_lib import (  # noqa: F401
    mutate_checkpoints,
    mutate_configs,
    mutate_data,
    mutate_exports,
    mutate_images,
    mutate_runs,
    mutate_voc,
    mutate_weights,
)
from storm_lib.baseline import Baseline
from storm_lib.cases import Case, Command, make_command
from storm_lib.judge import Outcome, judge
from storm_lib.processes import ROOT, Stopped
from storm_lib.results import Result

__all__ = ["Worker", "run_mutations"]

SECONDS = 90.0


class Worker:
    """A forking process; leaving the block ends it and the command it runs."""

    def __init__(self, seconds: float = SECONDS):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).resolve().parent / "worker.py"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(seconds)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is the storm's to handle
        )
        self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc_info) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def run(self, command: Command, folder: Path) -> Outcome:
        """
        Raises:
            RuntimeError: the worker has ended.
        """
        self._process.stdin.write(json.dumps({**asdict(command), "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        return Outcome(**self._answer())

    def _answer(self) -> Dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker of the storm ended with status {self._process.wait()}")
        return json.loads(line)


def run_mutations(
    baseline: Baseline,
    folder: Path,
    seed: int,
    cases: Sequence[Case],
    at_once: int,
    say: Callable[[str], None],
    results: List[Result],
) -> None:
    """Runs the cases, ``at_once`` of them at a time, and adds to ``results``. Folders of failed cases are kept."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        workers: "queue.Queue[Worker]" = queue.Queue()
        for _ in range(min(at_once, len(cases))):
            workers.put(stack.enter_context(Worker()))

        def run(case: Case) -> Result:
            if stop.is_set():
                raise Stopped()
            worker = workers.get()
            try:
                result = _run_case(worker, baseline, folder / case.id, seed, case)
            finally:
                workers.put(worker)
            if result.outcome == "FAILED":
                say(f"{result.id}: {result.reason}")
            return result

        pool = ThreadPoolExecutor(at_once)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        stack.callback(stop.set)
        for number, result in enumerate(pool.map(run, cases), 1):
            results.append(result)
            if number % 25 == 0:
                say(f"{number} of {len(cases)} mutated files")


def _run_case(worker: Worker, baseline: Baseline, folder: Path, seed: int, case: Case) -> Result:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        command, marker = make_command(case, baseline, folder, seed)
    except Exception as error:  # one kind that cannot be made does not end the storm
        return Result(case.id, case.kind, "FAILED", f"the storm could not make its file: {error!r}")
    outcome = worker.run(command, folder)
    verdict, reason = judge(command, outcome, folder, marker)
    if verdict != "FAILED":
        shutil.rmtree(folder, ignore_errors=True)
    return Result(case.id, case.kind, verdict, reason, outcome.seconds, peak_mib=outcome.peak_mib)
