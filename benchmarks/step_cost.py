#!/usr/bin/env python
"""
What the mimic costs on a CPU: time and peak memory of the demo's training steps, the quantizer and the RoI
pooling by themselves.

    python benchmarks/step_cost.py [--repeats 20] [--threads 1] [--json FILE]

What is compared is measured alternately in one run. benchmarks/README.md explains the tables and holds the last
results.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler else tells of every start and stop

import cv2  # noqa: E402
import detectron2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.ops import roi_align  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from qmimic_d2.data.resumable_loader import build_resumable_train_loader  # noqa: E402
from qmimic_d2.engine import Trainer, load_config  # noqa: E402
from qmimic_d2.files import check_writable, write_json  # noqa: E402
from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer  # noqa: E402
from qmimic_d2.modeling.roi_pooling import SparseRoIAlign, sparse_roi_align  # noqa: E402

TEACHER = "Digits/teacher_vgg_1_8_quant.yaml"
STUDENTS = {
    "a": "Digits/student_vgg_1_16_scratch.yaml",
    "q": "Digits/student_vgg_1_16_quant.yaml",
    "c": "Digits/student_vgg_1_16_qmimic.yaml",
    "d": "Digits/student_vgg_1_16_mimic.yaml",
}
LABELS = {
    "a": "(a) plain student, training step",
    "b": "(b) teacher, backbone forward",
    "q": "(q) quantized student, training step",
    "c": "(c) quantization mimic, training step",
    "d": "(d) plain mimic, training step",
    "w": "(w) quantization mimic, warm teacher cache, training step",
}
# The demo student's map, the teacher's map pooled at the demo's regions, and a large map.
QUANTIZER_SHAPES = ((8, 32, 16, 16), (256, 64, 4, 4), (8, 256, 64, 64))
# Height and width, in cells, of the maps that are pooled.
POOLED_MAPS = ((16, 16), (25, 25), (45, 45), (64, 64), (50, 76))
_NUM_BATCHES = 8
_WARM_UP_STEPS = 5

Actions = Dict[str, Callable[[], Any]]
Row = Dict[str, Any]


def measure_steps(repeats: int, opts: Sequence[str] = ()) -> List[Row]:
    """Time of the steps. A repeat is as long as a period of the diagnostics, and so holds one comparison."""
    with tempfile.TemporaryDirectory() as folder:
        actions, period = build_steps(folder, opts)
        for _ in range(_WARM_UP_STEPS):
            run_all(actions)
        return _step_rows(time_alternately(actions, repeats, period), "ms")


def measure_memory(repeats: int, opts: Sequence[str] = ()) -> List[Row]:
    """Peak memory of the steps. A repeat is one step; 20 of them hold a comparison of student and teacher."""
    with tempfile.TemporaryDirectory() as folder:
        actions, _ = build_steps(folder, opts)
        for _ in range(_WARM_UP_STEPS):
            run_all(actions)
        peaks: Dict[str, List[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                peaks[name].append(peak_bytes(action) / 2**20)
        return _step_rows(peaks, "MiB")


def measure_quantizer(repeats: int, shapes: Sequence[Tuple[int, ...]] = QUANTIZER_SHAPES) -> List[Row]:
    """Forward and backward of the quantizers beside PyTorch's fake quantization and a copy of the map."""
    functions: Dict[str, Callable[[Tensor], Tensor]] = {
        "copy": torch.clone,
        "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.5, 0, 0, 255),
        "Uniform": UniformQuantizer(0.5),
        "Uniform, 256 codes": UniformQuantizer(0.5, 256),
        "Uniform, signed": UniformQuantizer(0.5, signed=True),
        "PowerOfTwo": PowerOfTwoQuantizer(0.5),
        "Clamp": ClampQuantizer(0.5),
    }
    rows = []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        actions = {name: forward_backward(function, x) for name, function in functions.items()}
        times = time_alternately(actions, repeats, calls=max(2, 2_000_000 // math.prod(shape)))
        for name, values in times.items():
            row = {"map": _by(shape), "what": name, "ms": _percentile(values, 50)}
            row["x copy"] = _percentile(_ratios(values, times["copy"]), 50)
            row.update(spread(_ratios(values, times["fake_quantize"]), "x fake_quantize"))
            rows.append(row)
    return rows


def measure_pooling(
    repeats: int, maps: Sequence[Tuple[int, int]] = POOLED_MAPS, num_rois: int = 256
) -> List[Row]:
    """ROIAlign of 8 maps of 32 channels: torchvision's kernel and this project's sparse matrix, which is built anew."""
    rows = []
    for (height, width), bins, largest in itertools.product(maps, (7, 4), (0.5, 6.0)):
        generator = torch.Generator().manual_seed(0)
        feature = torch.randn(8, 32, height, width, generator=generator)
        most = largest if largest > 1.0 else largest * min(height, width)
        rois = random_rois(num_rois, len(feature), (height, width), (2.0, most), generator)
        kernel = functools.partial(roi_align, boxes=rois, output_size=bins, aligned=True)
        settings = {"rois": rois, "shape": (len(feature), height, width), "size": bins}
        matrix = functools.partial(SparseRoIAlign, **settings, scale=1.0, sampling_ratio=0, aligned=True)

        def sparse(feature: Tensor, matrix: Callable[[], SparseRoIAlign] = matrix) -> Tensor:
            return sparse_roi_align(feature, matrix())

        times = time_alternately(
            {
                "kernel": forward_backward(kernel, feature),
                "sparse": forward_backward(sparse, feature),
                "kernel, forward": functools.partial(kernel, feature),
                "sparse, forward": functools.partial(sparse, feature),
            },
            repeats,
            calls=2,
        )
        row = {"map": _by((height, width)), "cells": height * width, "bins": _by((bins, bins))}
        row["sides, cells"] = f"2 to {most:g}"
        row.update({f"{name}, ms": _percentile(times[name], 50) for name in ("kernel", "sparse")})
        row.update(spread(_ratios(times["sparse"], times["kernel"]), "sparse / kernel"))
        forward = _ratios(times["sparse, forward"], times["kernel, forward"])
        row["sparse / kernel, forward only"] = _percentile(forward, 50)
        rows.append(row)
    return rows


def build_steps(folder: str, opts: Sequence[str] = ()) -> Tuple[Actions, int]:
    """
    The demo's models, each ready to take its next training step, and the teacher's forward.

    All take the same batches of the configs' data in the same order, and the students draw the same random
    numbers in the same step.

    Args:
        folder: for the teacher's checkpoint, whose weights are random.
        opts: KEY VALUE pairs over every config.

    Returns:
        One action per key of :data:`LABELS`, and the period of the diagnostics, in steps.
    """
    weights = os.path.join(folder, "teacher.pth")
    student_opts = ["MODEL.QMIMIC.TEACHER.WEIGHTS", weights, *opts]
    configs = {name: load_config(file, student_opts, device="cpu") for name, file in STUDENTS.items()}
    cache = ["MODEL.QMIMIC.TEACHER.CACHE", os.path.join(folder, "cache")]
    configs["w"] = load_config(STUDENTS["c"], [*student_opts, *cache], device="cpu")
    loader, _ = build_resumable_train_loader(configs["a"], configs["a"].SEED)
    batches = list(itertools.islice(loader, _NUM_BATCHES))
    teacher = build_teacher(load_config(TEACHER, opts, device="cpu"), batches)
    torch.save({"model": teacher.state_dict()}, weights)
    actions: Actions = {name: TrainingStep(cfg, batches) for name, cfg in configs.items()}
    actions["b"] = TeacherForward(teacher, batches)
    for batch in batches:
        actions["w"].model.mimic.teacher.features(batch)
    return {name: actions[name] for name in LABELS}, configs["c"].MODEL.QMIMIC.DIAGNOSTICS.PERIOD


def build_teacher(cfg: CfgNode, batches: Sequence[List[Dict[str, Any]]]) -> nn.Module:
    """A teacher with random weights and the batches' BatchNorm statistics, so that its features have a scale."""
    torch.manual_seed(cfg.SEED)
    teacher = build_model(cfg)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
    with torch.no_grad():
        for batch in batches:
            teacher.backbone(teacher.preprocess_image(batch).tensor)
    return teacher.eval()


class TrainingStep:
    """Forward, backward and the optimizer's step of a config's model, as Detectron2's SimpleTrainer takes them."""

    def __init__(self, cfg: CfgNode, batches: Sequence[List[Dict[str, Any]]]):
        torch.manual_seed(cfg.SEED)
        self.model = build_model(cfg).train()
        self.storage = EventStorage()
        self._optimizer = Trainer.build_optimizer(cfg, self.model)
        self.batches = batches

    def __call__(self) -> None:
        with self.storage as storage:
            torch.manual_seed(storage.iter)
            losses = self.model(self.batches[storage.iter % len(self.batches)])
            self.free_gradients()
            sum(losses.values()).backward()
            self._optimizer.step()
            storage.step()

    def free_gradients(self) -> None:
        self._optimizer.zero_grad()


class TeacherForward:
    """The quantized teacher's features of a batch, as its model computes them in an evaluation."""

    def __init__(self, model: nn.Module, batches: Sequence[List[Dict[str, Any]]]):
        self._model = model
        self.batches = itertools.cycle(batches)

    @torch.inference_mode()
    def __call__(self) -> None:
        self._model.backbone(self._model.preprocess_image(next(self.batches)).tensor)


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """An action: the function of ``x``, and the gradient to ``x`` of a fixed gradient at the result."""
    x = x.detach().requires_grad_()
    grad = torch.randn_like(function(x))

    def action() -> None:
        x.grad = None
        function(x).backward(grad)

    return action


def random_rois(
    count: int, num_images: int, size: Tuple[int, int], sides: Tuple[float, float], generator: torch.Generator
) -> Tensor:
    """
    Regions inside a map, the same number in every image.

    Args:
        size: height and width of the map, in cells.
        sides: shortest and longest side of a region, in cells; their logarithms are uniform.

    Returns:
        shape (count, 5): index of the image, then (x0, y0, x1, y1) in cells.
    """
    extent = sides[0] * (sides[1] / sides[0]) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor(size[::-1]) - extent)
    image = torch.arange(count).mul(num_images).div(count, rounding_mode="floor")[:, None]
    return torch.cat([image, corner, corner + extent], dim=1)


def time_alternately(actions: Actions, repeats: int, calls: int) -> Dict[str, List[float]]:
    """
    Milliseconds per call, as the mean over each repeat's calls.

    All actions are called once before any is called again, each round beginning with another one.
    """
    clock = _clock()[1]
    names = list(actions)
    run_all(actions)
    times: Dict[str, List[float]] = {name: [] for name in names}
    for _ in range(repeats):
        seconds = dict.fromkeys(names, 0.0)
        for call in range(calls):
            first = call % len(names)
            for name in names[first:] + names[:first]:
                start = clock()
                actions[name]()
                seconds[name] += clock() - start
        for name in names:
            times[name].append(1e3 * seconds[name] / calls)
    return times


def run_all(actions: Actions) -> None:
    for action in actions.values():
        action()


def peak_bytes(action: Callable[[], Any]) -> int:
    """
    The most that PyTorch's CPU allocator held at any time of an action, beyond what it held before.

    Weights and the optimizer's state were there before; activations, gradients and every operator's scratch
    count, to the byte, as the profiler saw them allocated and freed.
    """
    free_gradients = getattr(action, "free_gradients", lambda: None)
    free_gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
        free_gradients()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            trace = json.load(file)["traceEvents"]
    memory = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not memory:
        return 0
    totals = [event["args"]["Total Allocated"] for event in memory]
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])


def machine() -> Dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": _clock()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Detectron2": detectron2.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """Rows of equal keys as a Markdown table; numbers with three significant digits, text to the left."""
    cells = [[_figure(value) for value in row.values()] for row in rows]
    alignment = ["left" if isinstance(value, str) else "right" for value in rows[0].values()]
    return tabulate(cells, headers=list(rows[0]), tablefmt="pipe", disable_numparse=True, colalign=alignment)


def _clock() -> Tuple[str, Callable[[], float]]:
    # One thread's CPU time is the wall time of an idle machine, and other processes disturb it less.
    return ("CPU time", time.process_time) if torch.get_num_threads() == 1 else ("wall time", time.perf_counter)


def _processor() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _step_rows(measured: Dict[str, List[float]], unit: str) -> List[Row]:
    rows = [{"what": f"{LABELS[name]}, {unit}", **spread(values)} for name, values in measured.items()]
    both = [a + b for a, b in zip(measured["a"], measured["b"])]
    for label, ratios in {
        "c / (a + b)": _ratios(measured["c"], both),
        "d / (a + b)": _ratios(measured["d"], both),
        "q / a": _ratios(measured["q"], measured["a"]),
        "w / a": _ratios(measured["w"], measured["a"]),
    }.items():
        rows.append({"what": label, **spread(ratios)})
    return rows


def _ratios(above: Sequence[float], below: Sequence[float]) -> List[float]:
    return [x / y for x, y in zip(above, below)]


def spread(values: Sequence[float], name: str = "median") -> Dict[str, float]:
    """The median under that name, and the percentiles."""
    return {name: _percentile(values, 50), "10th": _percentile(values, 10), "90th": _percentile(values, 90)}


def _percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _figure(value: Any) -> str:
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="values behind every median and percentile")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and OpenCV")
    parser.add_argument("--json", metavar="FILE", default="", help="write the tables to this file as well")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS), help="tables to make")
    help_of_opts = "KEY VALUE pairs over the config of every model, for the tables steps and memory"
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help=help_of_opts)
    args = parser.parse_args(arguments)
    if args.json:
        check_writable(args.json, "--json")
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    results: Dict[str, Any] = {"machine": machine(), "repeats": args.repeats, "opts": args.opts}
    print(table([{"machine": name, "": str(value)} for name, value in results["machine"].items()]), flush=True)
    for part in args.only:
        measure = functools.partial(PARTS[part], args.repeats)
        results[part] = measure(args.opts) if part in ("steps", "memory") else measure()
        print(f"\n{part}\n\n{table(results[part])}", flush=True)
    if args.json:
        write_json(args.json, results)


PARTS: Dict[str, Callable[..., List[Row]]] = {
    "steps": measure_steps,
    "memory": measure_memory,
    "quantizer": measure_quantizer,
    "pooling": measure_pooling,
}

if __name__ == "__main__":
    main()
