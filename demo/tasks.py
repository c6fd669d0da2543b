"""Runs commands side by side, in the order of their needs, and remembers which are done."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence

from detectron2.config import CfgNode

from qmimic_d2.json_file import write_json

__all__ = ["Task", "run_tasks"]

_POLL_SECONDS = 0.5
_STATUS_SECONDS = 15.0
# Statuses of a training that a signal stopped, after it had saved.
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass
class Task:
    """
    One command.

    Attributes:
        name: of the task, of its log and of its record.
        command: arguments, run from the repository's root.
        output_dir: folder in which a training writes its ``metrics.json``; "" for other commands.
        needs: names of tasks that must be done first.
        cfg: resolved config of a train_net.py command.
        inputs: whatever else decides whether an earlier result is still good.
        max_iter: length of a training, for the status line.
        resumes: the command takes ``--resume`` after an interruption.
        shows_output: what it prints belongs on the screen, once it is done.
    """

    name: str
    command: List[str]
    output_dir: str = ""
    needs: Sequence[str] = ()
    cfg: Optional[CfgNode] = None
    inputs: str = ""
    max_iter: int = 0
    resumes: bool = False
    shows_output: bool = False

    @property
    def digest(self) -> str:
        text = json.dumps([self.command, self.inputs, self.cfg.dump() if self.cfg else ""])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen
    log_path: str
    output_path: str
    started: float = field(default_factory=time.time)


def run_tasks(tasks: Sequence[Task], folder: str, jobs: int, environment: Dict[str, str]) -> Dict[str, float]:
    """
    Runs what is not done yet, ``jobs`` at a time.

    Args:
        tasks: in any order that their needs allow.
        folder: for logs and records; a record makes a task done for good.
        jobs: processes at a time.
        environment: variables to set for every command.

    Returns:
        Seconds that each task took, earlier and interrupted runs included.

    Raises:
        SystemExit: a command failed; names its log and shows the end of it.
        KeyboardInterrupt: after the running commands have saved and stopped.
    """
    logs = os.path.join(folder, "logs")
    os.makedirs(logs, exist_ok=True)
    records = {task.name: _Record(os.path.join(logs, f"{task.name}.json"), task) for task in tasks}
    waiting = [task for task in tasks if not records[task.name].is_done]
    for task in tasks:
        if records[task.name].is_done:
            print(f"done already: {task.name}")
    running: List[_Running] = []
    begun = last_status = time.time()
    try:
        while waiting or running:
            pending = {task.name for task in waiting} | {each.task.name for each in running}
            for task in list(waiting):
                if len(running) < jobs and not pending.intersection(task.needs):
                    waiting.remove(task)
                    running.append(_start(task, records[task.name], logs, environment))
            time.sleep(_POLL_SECONDS)
            for each in list(running):
                if each.process.poll() is not None:
                    running.remove(each)
                    _finish(each, records[each.task.name])
            if running and time.time() - last_status > _STATUS_SECONDS:
                last_status = time.time()
                print(_status(running, len(waiting), time.time() - begun), flush=True)
    except BaseException:
        _stop(running, records)
        raise
    return {name: record.seconds for name, record in records.items()}


class _Record:
    """What is known of a task from earlier runs."""

    def __init__(self, path: str, task: Task):
        self._path = path
        self._digest = task.digest
        known = {}
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
        if known.get("digest") != task.digest:
            known = {}  # another config: what it made counts for nothing
        self.was_started = bool(known)
        self.is_done = known.get("done", False)
        self.seconds = known.get("seconds", 0.0)

    def write(self, done: bool, seconds: float) -> None:
        self.is_done, self.seconds = done, self.seconds + seconds
        write_json(self._path, {"digest": self._digest, "done": done, "seconds": self.seconds})


def _start(task: Task, record: _Record, logs: str, environment: Dict[str, str]) -> _Running:
    command = list(task.command)
    if task.resumes and record.was_started:
        command.insert(command.index("--config-file"), "--resume")
    record.write(done=False, seconds=0.0)
    print("$ " + shlex.join(_shown(command)), flush=True)
    log_path = os.path.join(logs, f"{task.name}.log")
    # what is shown should be the result alone, without other packages' warnings
    output_path = os.path.join(logs, f"{task.name}.txt") if task.shows_output else log_path
    with open(log_path, "a", encoding="utf-8") as log, open(output_path, "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=log, env={**os.environ, **environment})
    return _Running(task, process, log_path, output_path)


def _finish(each: _Running, record: _Record) -> None:
    seconds = time.time() - each.started
    if each.process.returncode == 0:
        record.write(done=True, seconds=seconds)
        print(f"finished: {each.task.name} ({seconds:.0f} s)", flush=True)
        if each.task.shows_output:
            print(textwrap.indent(_end_of(each.output_path, 40), "    "), flush=True)
        return
    record.write(done=False, seconds=seconds)
    if each.process.returncode in _INTERRUPTED:
        raise KeyboardInterrupt
    end = _end_of(each.log_path, 15)
    raise SystemExit(f"{each.task.name} stopped with status {each.process.returncode}; end of {each.log_path}:\n{end}")


def _end_of(log_path: str, num_lines: int) -> str:
    with open(log_path, encoding="utf-8", errors="replace") as log:
        return "".join(log.readlines()[-num_lines:])


def _stop(running: List[_Running], records: Dict[str, _Record]) -> None:
    for each in running:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGTERM)  # a training saves first
    for each in running:
        try:
            each.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            each.process.kill()
        records[each.task.name].write(done=False, seconds=time.time() - each.started)


def _shown(command: Sequence[str]) -> List[str]:
    return ["python" if part == sys.executable else part for part in command]


def _status(running: Sequence[_Running], waiting: int, seconds: float) -> str:
    parts = [f"{each.task.name} {_progress(each.task)}".strip() for each in running]
    return f"[{seconds / 60:4.1f} min] {' | '.join(parts)} | {waiting} waiting"


def _progress(task: Task) -> str:
    path = os.path.join(task.output_dir, "metrics.json") if task.output_dir else ""
    if not task.max_iter or not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()
    row = json.loads(lines[-1]) if lines and lines[-1].endswith("\n") else {}
    iteration = int(row.get("iteration", -1)) + 1
    if iteration >= task.max_iter:
        return "evaluating"
    left = row.get("eta_seconds", 0.0)
    return f"{iteration}/{task.max_iter}" + (f", {left:.0f} s left" if left else "")
