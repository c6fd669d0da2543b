#!/usr/bin/env python
"""
What the mimic costs: time and peak memory of the demo's training steps, the quantizer and the RoI pooling.

    python benchmarks/step_cost.py [--repeats 20] [--threads 1] [--json FILE]

What is compared is measured alternately in one run. benchmarks/README.md explains the rows and holds the last
results.
"""

import argparse
import functools
import itertools
import json
import logging
import os
import platform
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.ops import roi_align

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from qmimic_d2.engine import Trainer, load_config  # noqa: E402
from qmimic_d2.engine.data_order import build_resumable_train_loader  # noqa: E402
from qmimic_d2.json_file import write_json  # noqa: E402
from qmimic_d2.modeling.dense_roi_align import dense_roi_align  # noqa: E402
from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer  # noqa: E402

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
}
# The quantizer's maps: the demo student's conv5, the demo's pooled regions of the teacher, and a large one.
QUANTIZER_SHAPES = ((8, 32, 16, 16), (256, 64, 4, 4), (8, 256, 64, 64))
# Height and width, in cells, of the pooled maps.
POOLED_MAPS = ((16, 16), (25, 25), (45, 45), (64, 64), (50, 76))
_NUM_BATCHES = 8
_WARM_UP_STEPS = 5

Actions = Dict[str, Callable[[], Any]]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="measurements that the percentiles are taken from")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", metavar="FILE", default="", help="write every figure to this file as well")
    parser.add_argument("--only", choices=sorted(PARTS), nargs="+", default=list(PARTS), help="parts to measure")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs for every model's config",
    )
    args = parser.parse_args(arguments)
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    results: Dict[str, Any] = {"machine": machine(), "repeats": args.repeats}
    print(tabulate(results["machine"].items(), tablefmt="github", headers=("machine", "")), flush=True)
    for part in args.only:
        results[part] = PARTS[part](args)
        print("\n" + table(results[part]), flush=True)
    if args.json:
        write_json(args.json, results)


def machine() -> Dict[str, Any]:
    """What the figures depend on: hardware and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if torch.get_num_threads() == 1 else "wall time",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Detectron2": detectron2.__version__,
    }


def measure_steps(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of time and ratio; a repeat is one period of the match measurement, so that it is in there once."""
    with tempfile.TemporaryDirectory() as folder:
        actions, period = build_steps(folder, args.opts)
        for _ in range(_WARM_UP_STEPS):
            run_all(actions)
        times = time_alternately(actions, args.repeats, period)
    return step_rows(times, "ms")


def measure_memory(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of peak memory and ratio; a step that measures the match is among them where there are 20 repeats."""
    with tempfile.TemporaryDirectory() as folder:
        actions, _ = build_steps(folder, args.opts)
        for _ in range(_WARM_UP_STEPS):
            run_all(actions)
        peaks: Dict[str, List[float]] = {name: [] for name in actions}
        for _ in range(args.repeats):
            for name, action in actions.items():
                peaks[name].append(peak_bytes(action, os.path.join(folder, "trace.json")) / 2**20)
    return step_rows(peaks, "MB")


def measure_quantizer(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of forward and backward of the quantizers, per map, beside what PyTorch itself has."""
    rows = []
    for shape in QUANTIZER_SHAPES:
        functions: Dict[str, Callable[[Tensor], Tensor]] = {
            "copy": torch.clone,
            "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.5, 0, 0, 255),
            "Uniform": UniformQuantizer(0.5),
            "Uniform, 256 codes": UniformQuantizer(0.5, 256),
            "Uniform, signed": UniformQuantizer(0.5, signed=True),
            "PowerOfTwo": PowerOfTwoQuantizer(0.5),
            "Clamp": ClampQuantizer(0.5),
        }
        actions = {name: forward_backward(function, torch.randn(shape)) for name, function in functions.items()}
        calls = max(1, int(2e6 / np.prod(shape)))
        times = time_alternately(actions, args.repeats, calls)
        for name in actions:
            row = {"map": "x".join(map(str, shape)), "forward and backward": name, **spread(times[name], "ms")}
            row.update(spread(ratios(times[name], times["fake_quantize"]), "/ fake_quantize"))
            row.update(spread(ratios(times[name], times["copy"]), "/ copy", (50,)))
            rows.append(row)
    return rows


def measure_pooling(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of ROIAlign by torchvision's kernel and by matrix products, per map, with and without gradient."""
    rows = []
    for (height, width), bins in itertools.product(POOLED_MAPS, (7, 4)):
        generator = torch.Generator().manual_seed(0)
        feature = torch.randn(8, 32, height, width, generator=generator)
        rois = random_rois(256, 8, height, width, generator)
        by_kernel = functools.partial(roi_align, boxes=rois, output_size=bins, aligned=True)
        by_products = functools.partial(
            dense_roi_align, rois=rois, size=bins, scale=1.0, sampling_ratio=0, aligned=True
        )
        actions = {
            "kernel": forward_backward(by_kernel, feature),
            "products": forward_backward(by_products, feature),
            "kernel, no gradient": functools.partial(by_kernel, feature),
            "products, no gradient": functools.partial(by_products, feature),
        }
        times = time_alternately(actions, args.repeats, 2)
        for suffix in ("", ", no gradient"):
            kernel, products = times["kernel" + suffix], times["products" + suffix]
            rows.append(
                {
                    "map": f"{height}x{width}",
                    "cells": height * width,
                    "bins": bins,
                    "pass": "forward" if suffix else "forward and backward",
                    "kernel ms": _percentile(kernel, 50),
                    "products ms": _percentile(products, 50),
                    **spread(ratios(products, kernel), "products / kernel"),
                }
            )
    return rows


def build_steps(folder: str, opts: Sequence[str] = ()) -> Tuple[Actions, int]:
    """
    The demo's models, each ready to take its next training step, and the teacher's forward.

    All take the same batches in the same order, and draw the same random numbers in the same step.

    Args:
        folder: for the teacher's checkpoint, which has random weights.
        opts: KEY VALUE pairs for every config.

    Returns:
        one action per key of :data:`LABELS`, and the period of the match measurement, in steps.
    """
    weights = os.path.join(folder, "teacher.pth")
    configs = {
        name: load_config(file, ["MODEL.QMIMIC.TEACHER.WEIGHTS", weights, *opts]) for name, file in STUDENTS.items()
    }
    loader, _ = build_resumable_train_loader(configs["a"], configs["a"].SEED)
    batches = list(itertools.islice(loader, _NUM_BATCHES))
    teacher = build_teacher(load_config(TEACHER, opts), batches)
    torch.save({"model": teacher.state_dict()}, weights)
    steps = {name: TrainingStep(cfg, batches) for name, cfg in configs.items()}
    steps["b"] = TeacherForward(teacher, batches)
    return {name: steps[name] for name in LABELS}, configs["c"].MODEL.QMIMIC.MIMIC.MATCH_PERIOD


def build_teacher(cfg: CfgNode, batches: Sequence[List[Dict[str, Any]]]) -> nn.Module:
    """A teacher of random weights, whose BatchNorm statistics are those of the batches."""
    torch.manual_seed(cfg.SEED)
    teacher = build_model(cfg)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        for batch in batches:
            teacher.backbone(teacher.preprocess_image(batch).tensor)
    return teacher


class TrainingStep:
    """Forward, backward and the optimizer's step of a config's model."""

    def __init__(self, cfg: CfgNode, batches: Sequence[List[Dict[str, Any]]]):
        torch.manual_seed(cfg.SEED)
        self._model = build_model(cfg).train()
        self._optimizer = Trainer.build_optimizer(cfg, self._model)
        self._batches = batches
        self._storage = EventStorage()

    def __call__(self) -> None:
        with self._storage as storage:
            torch.manual_seed(storage.iter)
            losses = self._model(self._batches[storage.iter % len(self._batches)])
            self._optimizer.zero_grad()
            sum(losses.values()).backward()
            self._optimizer.step()
            storage.step()

    def free_gradients(self) -> None:
        self._optimizer.zero_grad()


class TeacherForward:
    """The teacher's (quantized) features of a batch, as Detectron2 computes them in an evaluation."""

    def __init__(self, model: nn.Module, batches: Sequence[List[Dict[str, Any]]]):
        self._model = model.eval()
        self._batches = itertools.cycle(batches)

    @torch.inference_mode()
    def __call__(self) -> None:
        self._model.backbone(self._model.preprocess_image(next(self._batches)).tensor)


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """An action: the function on ``x``, and its gradient for an output gradient that is there already."""
    x = x.detach().requires_grad_()
    grad = torch.randn_like(function(x))

    def action() -> None:
        x.grad = None
        function(x).backward(grad)

    return action


def random_rois(count: int, images: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Regions inside a map, in cells, shape (count, 5): sides from 2 cells to half the map's, uniform logarithms."""
    limit = torch.tensor([width, height], dtype=torch.float32)
    sides = 2.0 * (limit / 4.0) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (limit - sides)
    image = torch.arange(count).mul(images).div(count, rounding_mode="floor")[:, None]
    return torch.cat([image, corner, corner + sides], dim=1)


def time_alternately(actions: Actions, repeats: int, calls: int) -> Dict[str, List[float]]:
    """
    Milliseconds per call, the mean of each repeat's calls.

    Every round calls each action once, beginning with another one than the round before. With one thread
    the CPU time counts, which other processes on the machine disturb less; it is the wall time of an idle
    machine.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    names = list(actions)
    run_all(actions)
    times: Dict[str, List[float]] = {name: [] for name in names}
    for _ in range(repeats):
        totals = dict.fromkeys(names, 0.0)
        for call in range(calls):
            first = call % len(names)
            for name in names[first:] + names[:first]:
                start = clock()
                actions[name]()
                totals[name] += clock() - start
        for name in names:
            times[name].append(1e3 * totals[name] / calls)
    return times


def run_all(actions: Actions) -> None:
    for action in actions.values():
        action()


def peak_bytes(action: Callable[[], Any], trace_file: str) -> int:
    """
    The most that PyTorch's CPU allocator held at a time during an action, beyond what it held before.

    Weights and the optimizer's state were there before and do not count; activations, gradients and
    every operator's scratch do.
    """
    free_gradients = getattr(action, "free_gradients", lambda: None)
    free_gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
        free_gradients()
    profile.export_chrome_trace(trace_file)
    with open(trace_file, encoding="utf-8") as file:
        events = [each["args"] for each in json.load(file)["traceEvents"] if each.get("name") == "[memory]"]
    if not events:
        return 0
    # a running total, and the size of this event's block: negative where it was freed
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


def step_rows(measured: Dict[str, List[float]], unit: str) -> List[Dict[str, Any]]:
    """One row per action, and one per ratio of interest."""
    rows = [{"what": LABELS[name], **spread(values, unit)} for name, values in measured.items()]
    both = [a + b for a, b in zip(measured["a"], measured["b"])]
    for label, values in {
        "c / (a + b)": ratios(measured["c"], both),
        "d / (a + b)": ratios(measured["d"], both),
        "q / a": ratios(measured["q"], measured["a"]),
    }.items():
        rows.append({"what": label, **spread(values, unit)})
    return rows


def ratios(above: Sequence[float], below: Sequence[float]) -> List[float]:
    return [x / y for x, y in zip(above, below)]


def spread(values: Sequence[float], unit: str, percentiles: Sequence[int] = (50, 10, 90)) -> Dict[str, float]:
    """Median and percentiles by the name of their column."""
    names = {50: unit, 10: "10th", 90: "90th"}
    suffix = {50: "", 10: f" {unit}", 90: f" {unit}"}
    return {names[each] + suffix[each]: _percentile(values, each) for each in percentiles}


def _percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")


def _processor() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


PARTS: Dict[str, Callable[[argparse.Namespace], List[Dict[str, Any]]]] = {
    "steps": measure_steps,
    "memory": measure_memory,
    "quantizer": measure_quantizer,
    "pooling": measure_pooling,
}

if __name__ == "__main__":
    main()
