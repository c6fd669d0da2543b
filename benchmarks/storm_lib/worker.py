"""
A process that has imported everything and forks a child for each command: ``python worker.py SECONDS``.

It reads one JSON per line: the fields of a :class:`storm_lib.cases.Command` and the folder of the case. It answers with
one JSON per line: :class:`storm_lib.judge.Outcome`. A child's stdout and stderr go to files in the folder.
"""

import contextlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict

_ROOT = Path(__file__).resolve().parents[2]
_children = []


def main(seconds: float) -> None:
    _import_everything()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), seconds)), flush=True)


def _import_everything() -> None:
    warnings.filterwarnings("ignore")
    sys.path[:0] = [str(_ROOT)]
    import cv2
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    import qmimic_d2.__main__
    import qmimic_d2.engine.exporting
    import qmimic_d2.report.page  # noqa: F401

    qmimic_d2.__main__.build_parser()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _stop(number: int, frame: Any) -> None:
    for child in _children:
        _kill(child)
    os._exit(128 + number)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _run(command: Dict[str, Any], seconds: float) -> Dict[str, Any]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(command)
    _children[:] = [child]
    timed_out = False
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > seconds:
            timed_out = True
            _kill(child)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    _children.clear()
    _kill(child)  # what it may have left in its group
    return {
        "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "timed_out": timed_out,
        "seconds": time.monotonic() - began,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def _become(command: Dict[str, Any]) -> None:
    """The child: runs the command as the interpreter would, and never returns."""
    status = 70
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        folder = Path(command["folder"])
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        _limit_memory(command["memory_mib"])
        status = _status_of(command)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _limit_memory(memory_mib: int) -> None:
    """So much of address space beyond what the process has already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status_of(command: Dict[str, Any]) -> int:
    try:
        _register(command)
        if command["program"] == "train":
            sys.argv = [str(_ROOT / "train_net.py"), *command["arguments"]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        elif command["program"] == "cli":
            sys.argv = ["qmimic_d2", *command["arguments"]]
            runpy.run_module("qmimic_d2", run_name="__main__", alter_sys=True)
        else:  # for the storm's own tests
            sys.argv = ["-c"]
            exec(command["arguments"][0], {"__name__": "__main__"})
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _register(command: Dict[str, Any]) -> None:
    from detectron2.data.datasets import register_coco_instances, register_pascal_voc

    for name, annotations, images in command["datasets"]:
        register_coco_instances(name, {}, annotations, images)
    for name, folder, split, *classes in command["voc"]:
        from detectron2.data import MetadataCatalog

        register_pascal_voc(name, folder, split, 2007, tuple(classes))
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"


if __name__ == "__main__":
    main(float(sys.argv[1]))
