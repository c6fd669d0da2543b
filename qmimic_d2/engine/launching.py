"""The processes of a run: those that train_net.py starts, and those that torchrun has started."""

import argparse
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from typing import Callable, Iterator, List, Tuple

import torch
from detectron2.engine import launch
from detectron2.utils import comm

from qmimic_d2.checkpoint.checkpointer import DivergedError
from qmimic_d2.error_text import describe_error
from qmimic_d2.folder_lock import FolderInUseError
from qmimic_d2.modeling.mimic.sharing import forget_teacher, one_teacher
from qmimic_d2.orphans import die_with_parent

__all__ = ["is_first_of_machine", "launch_processes", "num_processes"]

# Exit status of a process that has already printed what went wrong.
_SAID = 65


def num_processes(args: argparse.Namespace) -> int:
    """
    Processes of the whole run, all machines together; at least 1.

    Raises:
        ValueError: torchrun has started this process, and the arguments ask for processes, too.
    """
    if not torch.distributed.is_torchelastic_launched():
        return _processes_per_machine(args) * args.num_machines
    if args.num_processes or args.num_gpus != 1 or args.num_machines != 1:
        raise ValueError(
            "torchrun has started the processes of this run; leave out --num-processes, --num-gpus and --num-machines, "
            "or start train_net.py without torchrun"
        )
    return int(os.environ["WORLD_SIZE"])


def is_first_of_machine() -> bool:
    """Whether this process speaks for those that torchrun has started on its machine, before they know each other."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or not torch.distributed.is_torchelastic_launched()


def launch_processes(
    main: Callable[..., object], args: argparse.Namespace, main_args: Tuple[object, ...]
) -> None:
    """
    Runs ``main(*main_args)`` in as many processes as the arguments ask for, or in this one of torchrun's.

    ``--num-processes`` trains on the CPU over gloo, through Detectron2's own launcher. A Ctrl-C or SIGTERM
    that reaches the launching process is passed on, so that the training saves before it stops.

    Raises:
        SystemExit: a signal stopped the run; status 128 + its number.
    """
    if torch.distributed.is_torchelastic_launched():
        _join_group()
        _main_of_process(main, main_args)
        return
    per_machine = _processes_per_machine(args)
    if args.num_processes:
        # Detectron2's launcher takes NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if per_machine * args.num_machines > 1:
        forget_teacher()
    received: List[int] = []
    with _signals_passed_on(received) if per_machine * args.num_machines > 1 else contextlib.nullcontext():
        try:
            launch(
                _main_of_process,
                per_machine,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, main_args),
            )
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code == _SAID:
                raise SystemExit(1) from None
            if not received:
                raise
    if received:
        raise SystemExit(128 + received[0])


def _join_group() -> None:
    """As Detectron2's launcher does in its processes. Returns when all have come, with their checks behind them."""
    has_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    comm.synchronize()


def _main_of_process(main: Callable[..., object], main_args: Tuple[object, ...]) -> None:
    """
    Runs ``main`` and leaves the process group, if there is one. What a person can correct ends in one message.

    Detectron2's launcher lets a process end inside its group. The threads of gloo then race with the interpreter's
    end, and now and then a process that had finished its work was counted as crashed (SIGABRT).
    """
    is_child = torch.distributed.is_initialized()
    if is_child:
        die_with_parent()
    try:
        with one_teacher():
            main(*main_args)
    except (DivergedError, FolderInUseError) as error:
        if not is_child:
            raise SystemExit(describe_error(error)) from error
        sys.stderr.write(describe_error(error) + "\n")
        raise SystemExit(_SAID) from error
    if is_child:
        gc.collect()  # a DistributedDataParallel in a reference cycle holds the group
        comm.synchronize()
        torch.distributed.destroy_process_group()


def _processes_per_machine(args: argparse.Namespace) -> int:
    return max(args.num_processes or args.num_gpus, 1)


@contextlib.contextmanager
def _signals_passed_on(received: List[int]) -> Iterator[None]:
    """Sends the signals of this process to its children as well, and notes their numbers."""

    def on_signal(number: int, frame) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
