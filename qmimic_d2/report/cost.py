"""What a run's detector costs: parameters, FLOPs, bytes, and the time of an image on the CPU."""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import nn

from qmimic_d2.analysis import measure_cost
from qmimic_d2.engine.prediction import Predictor

__all__ = ["Cost", "median_seconds", "run_cost"]

_WARM_UP = 3
_MOST_CALLS = 30
_LEAST_CALLS = 5
_MOST_SECONDS = 2.0


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        parameters: learned values of the detector, without the mimic's adapter.
        flops: of one image of ``height`` x ``width`` pixels, as :func:`qmimic_d2.analysis.measure_cost` counts.
        weight_bytes: of its tensors in memory, BatchNorm's statistics included; None without weights.
        file_bytes: of the checkpoint, which holds the optimizer's state too; None without one.
        seconds: median time of one image; None where it was not measured.
        threads: of that measurement.
    """

    parameters: int
    flops: int
    height: int
    width: int
    weight_bytes: Optional[int] = None
    file_bytes: Optional[int] = None
    seconds: Optional[float] = None
    threads: int = 1


def run_cost(
    cfg: CfgNode, predictor: Optional[Predictor], weights: str, images: Sequence[np.ndarray], threads: int
) -> Cost:
    """
    Args:
        cfg: of the detector.
        predictor: with its weights; None where there are none.
        weights: path of the checkpoint, or "".
        images: shape (H, W, 3), BGR, uint8. The first one's size, resized as the config says, is the one that
            FLOPs are counted for; without one it is a square of ``INPUT.MIN_SIZE_TEST``.
        threads: for the time of one image, batch 1, resizing included; 0 = do not measure it.
    """
    height, width = _input_size(cfg, images)
    cost = measure_cost(predictor.model if predictor else cfg, height, width)
    is_timed = predictor is not None and threads > 0 and len(images) > 0
    return Cost(
        parameters=cost.parameters,
        flops=cost.flops,
        height=height,
        width=width,
        weight_bytes=_weight_bytes(predictor.model) if predictor else None,
        file_bytes=os.path.getsize(weights) if os.path.isfile(weights) else None,
        seconds=_seconds(predictor, images, threads) if is_timed else None,
        threads=threads,
    )


def _input_size(cfg: CfgNode, images: Sequence[np.ndarray]) -> Sequence[int]:
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if not len(images):
        return (shortest or longest,) * 2
    height, width = images[0].shape[:2]
    return ResizeShortestEdge.get_output_shape(height, width, shortest, longest) if shortest else (height, width)


def _weight_bytes(model: nn.Module) -> int:
    state = model.state_dict().items()
    return sum(each.numel() * each.element_size() for name, each in state if not name.startswith("mimic_loss."))


def _seconds(predictor: Predictor, images: Sequence[np.ndarray], threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return median_seconds(predictor, images, time.perf_counter)
    finally:
        torch.set_num_threads(before)


def median_seconds(call: Callable, images: Sequence[np.ndarray], clock: Callable[[], float]) -> float:
    """
    Median time of one call, after three that do not count: of 30 calls, or of as many as fit into two seconds,
    at least five. The images are taken in turn.
    """
    for index in range(_WARM_UP):
        call(images[index % len(images)])
    times, begun = [], clock()
    while len(times) < _MOST_CALLS and (len(times) < _LEAST_CALLS or clock() - begun < _MOST_SECONDS):
        image = images[len(times) % len(images)]
        before = clock()
        call(image)
        times.append(clock() - before)
    return statistics.median(times)
