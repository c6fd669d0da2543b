"""Runs commands side by side, in the order of their needs, and remembers which are done."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import textwrap
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Set, Union

from detectron2.config import CfgNode

from qmimic_d2.cli.printable import command_text, say
from qmimic_d2.files import read_json, write_json
from qmimic_d2.folder_lock import FolderInUseError, alone_in
from qmimic_d2.orphans import start_tied
from qmimic_d2.progress import Row, is_live, seconds_text
from qmimic_d2.run_folder import METRICS, last_metrics_row, read_evaluation

__all__ = ["Task", "run_tasks"]

_POLL_SECONDS = 0.5
_STATUS_SECONDS = 15.0
# Characters of a log's last line that stand behind a bar.
_LONGEST_TEXT = 60
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
        inputs: whatever else decides whether an earlier result is still good; a function is asked when the
            task's turn comes and its needs are done.
        max_iter: length of a training, for the status line.
        resumes: the command takes ``--resume`` after an interruption.
        shows_output: what it prints belongs on the screen, once it is done.
        expected_seconds: for the status line; 0.0 = unknown.
        is_done: asked when the task's turn comes, in place of the runner's own record.
        on_start: called before it starts, with whether it continues what an earlier run began.
        on_success: called with the seconds it took, interrupted runs included; an OSError, ValueError or
            KeyError that it raises makes the task a failed one.
        on_failure: called with the reason.
    """

    name: str
    command: List[str]
    output_dir: str = ""
    needs: Sequence[str] = ()
    cfg: Optional[CfgNode] = None
    inputs: Union[str, Callable[[], str]] = ""
    max_iter: int = 0
    resumes: bool = False
    shows_output: bool = False
    expected_seconds: float = 0.0
    is_done: Optional[Callable[[], bool]] = None
    on_start: Optional[Callable[[bool], None]] = None
    on_success: Optional[Callable[[float], None]] = None
    on_failure: Optional[Callable[[str], None]] = None

    @property
    def digest(self) -> str:
        inputs = self.inputs() if callable(self.inputs) else self.inputs
        text = json.dumps([self.command, inputs, self.cfg.dump() if self.cfg else ""])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen
    log_path: str
    output_path: str
    bar: Optional[Row] = None
    started: float = field(default_factory=time.time)

    def show(self) -> None:
        """Brings the bar up to date, where there is one."""
        if self.bar is not None:
            progress = _Progress(self)
            self.bar.update(progress.done, progress.text)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run_tasks(
    tasks: Sequence[Task], folder: str, jobs: int, environment: Dict[str, str], keeps_going: bool = False
) -> Dict[str, float]:
    """
    Runs what is not done yet, ``jobs`` at a time.

    Args:
        tasks: in any order that their needs allow.
        folder: for logs and records; a record makes a task done for good.
        jobs: processes at a time.
        environment: variables to set for every command.
        keeps_going: a command that fails stops only the tasks that need it.

    Returns:
        Seconds that each task took, earlier and interrupted runs included; without those that were not run.

    Raises:
        SystemExit: a command failed; names its log and shows the end of it. Not with ``keeps_going``. Or another
            process is at work in the folder.
        KeyboardInterrupt: after the running commands have saved and stopped.
    """
    logs = os.path.join(folder, "logs")
    os.makedirs(logs, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            # Two runners in one folder would run the same task twice, into the same files.
            stack.enter_context(alone_in(folder))
        except FolderInUseError as error:
            raise SystemExit(str(error)) from error
        return _run(tasks, logs, jobs, environment, keeps_going)


def _run(
    tasks: Sequence[Task], logs: str, jobs: int, environment: Dict[str, str], keeps_going: bool
) -> Dict[str, float]:
    records: Dict[str, _Record] = {}
    waiting, failed = list(tasks), set()
    running: List[_Running] = []
    begun = last_status = time.time()
    try:
        while waiting or running:
            _start_what_can(waiting, running, failed, records, jobs, logs, environment)
            if running:
                time.sleep(_POLL_SECONDS)
            for each in list(running):
                each.show()
                if each.process.poll() is not None:
                    running.remove(each)
                    each.close_bar()
                    if not _finish(each, records[each.task.name], keeps_going):
                        failed.add(each.task.name)
            if running and not is_live() and time.time() - last_status > _STATUS_SECONDS:
                last_status = time.time()
                say(_status(running, waiting, jobs, time.time() - begun))
    except BaseException:
        for each in running:
            each.close_bar()
        _stop(running, records)
        raise
    return {name: record.seconds for name, record in records.items()}


def _start_what_can(
    waiting: List[Task],
    running: List[_Running],
    failed: Set[str],
    records: Dict[str, "_Record"],
    jobs: int,
    logs: str,
    environment: Dict[str, str],
) -> None:
    """Takes from ``waiting`` what is done, what cannot be run any more, and what there is a free process for."""
    pending = {task.name for task in waiting} | {each.task.name for each in running}
    for task in list(waiting):
        if len(running) >= jobs:
            return
        if pending.intersection(task.needs):
            continue
        waiting.remove(task)
        missing = sorted(failed.intersection(task.needs))
        if missing:
            failed.add(task.name)
            pending.remove(task.name)
            say(f"not run: {task.name} needs {', '.join(missing)}")
            continue
        record = records[task.name] = _Record(os.path.join(logs, f"{task.name}.json"), task)
        if task.is_done() if task.is_done else record.is_done:
            pending.remove(task.name)
            say(f"done already: {task.name}")
        else:
            running.append(_start(task, record, logs, environment))


class _Record:
    """What is known of a task from earlier runs."""

    def __init__(self, path: str, task: Task):
        self._path = path
        self._digest = task.digest
        try:
            known = read_json(path)
        except (OSError, ValueError):
            known = {}  # there is none, or it is damaged: the task is run again
        if not isinstance(known, dict) or known.get("digest") != task.digest:
            known = {}  # another config: what it made counts for nothing
        self.was_started = bool(known)
        self.is_done = known.get("done") is True
        seconds = known.get("seconds")
        self.seconds = seconds if isinstance(seconds, float) else 0.0

    def forget(self) -> None:
        self.was_started, self.is_done, self.seconds = False, False, 0.0

    def write(self, done: bool, seconds: float) -> None:
        self.is_done, self.seconds = done, self.seconds + seconds
        write_json(self._path, {"digest": self._digest, "done": done, "seconds": self.seconds})


def _start(task: Task, record: _Record, logs: str, environment: Dict[str, str]) -> _Running:
    command = list(task.command)
    if record.is_done:  # by its record; the task says that it is not, so what was made is gone
        record.forget()
    continues = task.resumes and record.was_started
    if continues:
        command.insert(command.index("--config-file"), "--resume")
    if task.on_start:
        task.on_start(continues)
    record.write(done=False, seconds=0.0)
    say("$ " + command_text(command))
    log_path = os.path.join(logs, f"{task.name}.log")
    # what is shown should be the result alone, without other packages' warnings and what an earlier run printed
    output_path, mode = (os.path.join(logs, f"{task.name}.txt"), "w") if task.shows_output else (log_path, "a")
    with open(log_path, "a", encoding="utf-8") as log, open(output_path, mode, encoding="utf-8") as output:
        process = start_tied(command, stdout=output, stderr=log, env={**os.environ, **environment})
    bar = Row(task.name, task.max_iter, delay=0.0) if is_live() else None
    return _Running(task, process, log_path, output_path, bar)


def _finish(each: _Running, record: _Record, keeps_going: bool) -> bool:
    """Notes how a command ended; False where it failed."""
    status, seconds = each.process.returncode, time.time() - each.started
    record.write(done=False, seconds=seconds)
    if status in _INTERRUPTED:
        raise KeyboardInterrupt
    reason = f"{_ending(status)}: {_last_line(each.log_path)}" if status else ""
    if not reason and each.task.on_success:
        try:
            each.task.on_success(record.seconds)
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
    if not reason:
        record.write(done=True, seconds=0.0)
        say(f"finished: {each.task.name} ({seconds:.0f} s)")
        if each.task.shows_output:
            say(textwrap.indent(_end_of(each.output_path, 40), "    "))
        return True
    if each.task.on_failure:
        each.task.on_failure(reason)
    if not keeps_going:
        ending, end = _ending(status) if status else reason, _end_of(each.log_path, 15)
        raise SystemExit(f"{each.task.name} {ending}; end of {each.log_path}:\n{end}")
    say(f"failed: {each.task.name} ({each.log_path}): {reason}")
    if each.task.shows_output:
        say(textwrap.indent(_end_of(each.output_path, 40), "    "))
    return False


def _ending(status: int) -> str:
    return f"stopped with status {status}" if status >= 0 else f"was killed by signal {-status}"


def _last_line(log_path: str) -> str:
    lines = [line.strip() for line in _end_of(log_path, 30).splitlines() if line.strip()]
    return lines[-1] if lines else "its log is empty"


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


def _status(running: Sequence[_Running], waiting: Sequence[Task], jobs: int, seconds: float) -> str:
    parts = [_running_text(each) for each in running]
    left = sum(task.expected_seconds for task in waiting) / jobs
    about = f", about {left / 60:.0f} min" if left else ""
    return f"[{seconds / 60:4.1f} min] {' | '.join(parts)} | {len(waiting)} waiting{about}"


def _running_text(running: _Running) -> str:
    progress, total = _Progress(running), running.task.max_iter
    texts = [f"{progress.done}/{total}" if total else "", progress.text]
    return f"{running.task.name} {', '.join(filter(None, texts))}".strip()


class _Progress:
    """
    How far a running command is: a training by what it wrote, another command by the last line of its log.

    Attributes:
        done: iterations.
        text: AP of the last evaluation, loss, and the time left.
    """

    def __init__(self, running: _Running):
        task, self.done, self.text = running.task, 0, ""
        if not task.max_iter:
            self.text = _last_line(running.log_path)[:_LONGEST_TEXT] if os.path.getsize(running.log_path) else ""
            return
        texts = []
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not written yet, or damaged
            texts.append(f"AP {float(read_evaluation(task.output_dir)['bbox']['AP']):.1f}")
        with contextlib.suppress(OSError, ValueError, TypeError):
            last = last_metrics_row(os.path.join(task.output_dir, METRICS)) or {}
            self.done = min(last.get("iteration", -1) + 1, task.max_iter)  # a last evaluation counts as one more
            if self.done >= task.max_iter:
                texts.append("evaluating")
            else:
                texts += [f"loss {float(last[key]):.3g}" for key in ("total_loss",) if key in last]
                texts += [f"{seconds_text(float(last[key]))} left" for key in ("eta_seconds",) if key in last]
        self.text = ", ".join(texts)
