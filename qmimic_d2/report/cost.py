"""What a run's detector costs: parameters, FLOPs, bytes, and the time of an image on the CPU."""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from qmimic_d2.analysis import measure_cost
from qmimic_d2.checkpoint.training_entries import TRAINING_ONLY
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.progress import track

__all__ = ["Cost", "alternating_medians", "image_seconds", "run_cost"]

_WARM_UP = 3
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 30
_MOST_SECONDS = 2.0


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        parameters: learned values of the detector, without the mimic's adapter.
        flops: of one image of ``height`` x ``width`` pixels, as :func:`qmimic_d2.analysis.measure_cost` counts.
        weight_bytes: of its tensors in memory, BatchNorm's statistics included; None without weights.
        file_bytes: of the checkpoint, which holds the optimizer's state too; None without one.
        seconds: median time of one image, see :func:`image_seconds`; None where it was not measured.
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


def run_cost(cfg: CfgNode, predictor: Optional[Predictor], weights: str, images: Sequence[np.ndarray]) -> Cost:
    """
    What can be counted; ``seconds`` is left open.

    Args:
        predictor: with its weights; None where there are none.
        weights: path of the checkpoint, or "".
        images: shape (H, W, 3), BGR, uint8. FLOPs are counted for the first one, resized as the config says; without
            one, for a square of ``INPUT.MIN_SIZE_TEST``.
    """
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    height, width = images[0].shape[:2] if images else (shortest or longest,) * 2
    if images and shortest:
        height, width = ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
    cost = measure_cost(predictor.model if predictor else cfg, height, width)
    state = predictor.model.state_dict() if predictor else {}
    detector = [tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in detector) if predictor else None
    file_bytes = os.path.getsize(weights) if os.path.isfile(weights) else None
    return Cost(cost.parameters, cost.flops, height, width, weight_bytes, file_bytes)


def image_seconds(
    predictors: Sequence[Predictor], images: Sequence[Sequence[np.ndarray]], threads: int
) -> List[float]:
    """
    Median time of one image, batch 1, resizing included, of every predictor.

    With one thread the clock is the process's CPU time, which other processes disturb less than wall time.

    Args:
        images: at least one for every predictor, taken in turn.
        threads: of PyTorch.
    """
    calls = [
        lambda index, predictor=predictor, own=own: predictor(own[index % len(own)])
        for predictor, own in zip(predictors, images)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return alternating_medians(calls, time.process_time if threads == 1 else time.perf_counter)
    finally:
        torch.set_num_threads(before)


def alternating_medians(calls: Sequence[Callable[[int], Any]], clock: Callable[[], float]) -> List[float]:
    """
    Median times of several calls that take turns. A machine that becomes slower is slower for all of them, because each
    round begins with another call.

    There are 30 rounds after three that do not count, or as many as fit into two seconds for each call, at least five.

    Args:
        calls: get the number of the round.
        clock: in seconds.
    """
    times: List[List[float]] = [[] for _ in calls]
    begun = clock()
    for round_number in track(range(-_WARM_UP, _MOST_ROUNDS), "measuring times"):
        if round_number >= _LEAST_ROUNDS and clock() - begun >= _MOST_SECONDS * len(calls):
            break
        for place in range(len(calls)):
            number = (place + round_number) % len(calls)
            before = clock()
            calls[number](round_number)
            if round_number >= 0:
                times[number].append(clock() - before)
    return [statistics.median(each) for each in times]
