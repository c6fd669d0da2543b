"""What a page needs and the runs' files do not hold: costs, and detections on sample images."""

import os
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from qmimic_d2.engine import describe_error
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.report.collect import Run
from qmimic_d2.report.cost import Cost, image_seconds, run_cost
from qmimic_d2.report.pictures import PictureRow, detection_picture, picture_row
from qmimic_d2.report.samples import Box, Sample, load_samples, predicted_boxes, read_detections
from qmimic_d2.run_folder import CONFIG

__all__ = ["Measurements", "measure"]

# What a config of somebody else may ask for, so that it cannot fill the memory.
_MOST_PARAMETERS = 2_000_000_000
_LARGEST_SHORTER_SIDE = 4096


@dataclass
class Measurements:
    """
    Attributes:
        costs: one per run; None where the config does not serve.
        rows: sample images with ground truth and detections, by test set.
        dataset_sizes: number of images, by test set.
    """

    costs: List[Optional[Cost]]
    rows: Dict[str, List[PictureRow]]
    dataset_sizes: Dict[str, int]


def measure(runs: Sequence[Run], *, num_images: int, threads: int, score_threshold: float) -> Measurements:
    """
    Builds every run's detector. What cannot be had is added to the run's ``notes``.

    Args:
        num_images: sample images of each test set; 0 = none, and then no time of an image.
        threads: for measuring the CPU time of an image; 0 = do not measure it.
        score_threshold: least score of a detection that is drawn.
    """
    for run in runs:
        _check_extent(run)
    samples, sizes = _load_samples(runs, num_images)
    images = [samples.get(run.dataset, []) for run in runs]
    predictors = [_predictor(run) for run in runs]
    costs = [_cost(*each) for each in zip(runs, predictors, images)]
    predictors = [predictor and _working(*each) for predictor, each in zip(predictors, zip(runs, predictors, images))]
    timed = [
        number
        for number, (cost, predictor, own) in enumerate(zip(costs, predictors, images))
        if threads and cost and predictor and own
    ]
    if timed:
        pixels = [[sample.pixels for sample in images[number]] for number in timed]
        times = image_seconds([predictors[number] for number in timed], pixels, threads)
        for number, seconds in zip(timed, times):
            costs[number] = replace(costs[number], seconds=seconds, threads=threads)
    found = [_detections(*each, score_threshold) for each in zip(runs, predictors, images)]
    rows = {name: _picture_rows(name, each, runs, found) for name, each in samples.items()}
    return Measurements(costs, rows, sizes)


def _check_extent(run: Run) -> None:
    """Takes the config from a run whose detector no training here has had."""
    if run.cfg is None:
        return
    shorter = min(run.cfg.INPUT.MIN_SIZE_TEST, run.cfg.INPUT.MAX_SIZE_TEST)
    parameters = _num_parameters(run.cfg)
    if shorter > _LARGEST_SHORTER_SIDE or parameters > _MOST_PARAMETERS:
        run.notes.append(
            f"no parameters, FLOPs, latency and pictures: {CONFIG} asks for {parameters:,} parameters and images "
            f"whose shorter side is {shorter:,}; at most {_MOST_PARAMETERS:,} and {_LARGEST_SHORTER_SIDE:,} are built"
        )
        run.cfg = None


def _num_parameters(cfg: CfgNode) -> int:
    """Counted without memory for them; 0 where the model cannot be built, which building it says."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return sum(each.numel() for each in build_model(cfg).parameters())
    except Exception:  # a config may name anything
        return 0


def _load_samples(runs: Sequence[Run], count: int) -> Tuple[Dict[str, List[Sample]], Dict[str, int]]:
    """Images and number of images by test set; a set that cannot be read is noted in its runs."""
    samples, sizes = {}, {}
    for run in runs:
        name = run.dataset
        if not count or run.cfg is None or not name or name in samples:
            continue
        try:
            samples[name], sizes[name] = load_samples(name, count)
        except Exception as error:  # a data set's loader raises what it likes
            for other in runs:
                if other.dataset == name:
                    other.notes.append(
                        f"no pictures and no time of an image: the data set {name!r} cannot be read here "
                        f"({describe_error(error)})"
                    )
            samples[name] = []
    return {name: each for name, each in samples.items() if each}, sizes


def _predictor(run: Run) -> Optional[Predictor]:
    if run.cfg is None or not run.weights:
        return None
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = run.weights
    cfg.freeze()
    try:
        return Predictor(cfg, os.path.basename(run.weights))
    except Exception as error:  # the config may name parts that only the training's own script registers
        run.notes.append(f"no time of an image: the detector cannot be loaded ({_first_line(error)})")
        return None


def _working(run: Run, predictor: Predictor, samples: Sequence[Sample]) -> Optional[Predictor]:
    """The predictor, if it can take an image."""
    try:
        for sample in samples[:1]:
            predictor(sample.pixels)
        return predictor
    except Exception as error:  # a config may ask for sizes, or parts, that fail when they are used
        run.notes.append(f"no time of an image: the detector fails on one ({_first_line(error)})")
        return None


def _cost(run: Run, predictor: Optional[Predictor], samples: Sequence[Sample]) -> Optional[Cost]:
    if run.cfg is None:
        return None
    try:
        return run_cost(run.cfg, predictor, run.weights, [each.pixels for each in samples])
    except Exception as error:  # as above
        run.notes.append(f"no parameters and FLOPs: they cannot be counted ({_first_line(error)})")
        return None


def _first_line(error: Exception) -> str:
    return describe_error(error).splitlines()[0]


def _detections(
    run: Run, predictor: Optional[Predictor], samples: Sequence[Sample], threshold: float
) -> Optional[List[List[Box]]]:
    """By sample; None where there is no way to have them."""
    if not samples:
        return None
    if run.detections:
        try:
            return read_detections(run.detections, run.dataset, samples, threshold)
        except (OSError, ValueError) as error:
            reason = f"{os.path.basename(run.detections)} cannot be read ({type(error).__name__})"
    else:
        reason = "there are no detections of an evaluation"
    if predictor is None:
        run.notes.append(f"no pictures: {reason}, and there is no detector to run")
        return None
    try:
        return [predicted_boxes(predictor(sample.pixels), run.dataset, threshold) for sample in samples]
    except ValueError as error:  # its outputs are not finite
        run.notes.append(f"no pictures: {error}")
        return None


def _picture_rows(dataset: str, samples: Sequence[Sample], runs: Sequence[Run], found) -> List[PictureRow]:
    rows = []
    for index, sample in enumerate(samples):
        row = picture_row(os.path.basename(sample.file_name), sample)
        for number, (run, boxes) in enumerate(zip(runs, found)):
            if run.dataset == dataset and boxes is not None:
                row.pictures.append(detection_picture(number, sample.truth, boxes[index]))
        rows.append(row)
    return rows
