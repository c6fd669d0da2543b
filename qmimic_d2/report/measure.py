"""What a page needs and the runs' files do not hold: costs, and detections on sample images."""

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from qmimic_d2.config_files import changed
from qmimic_d2.data.sources import register_sources
from qmimic_d2.error_text import describe_error, one_line
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.progress import track
from qmimic_d2.report.collect import Run
from qmimic_d2.report.cost import Cost, image_seconds, run_cost
from qmimic_d2.report.samples import Box, Sample, load_samples, predicted_boxes, read_detections
from qmimic_d2.run_folder import CONFIG

__all__ = ["Measurements", "measure", "register_run_sources"]

# Bounds of what is built: a config of somebody else must not fill the memory.
_MOST_PARAMETERS = 2_000_000_000
_LARGEST_SHORTER_SIDE = 4096


@dataclass
class Measurements:
    """
    Attributes:
        costs: one per run; None where the config does not serve.
        samples: images with ground truth and detections, by test set.
        dataset_sizes: number of images, by test set.
    """

    costs: List[Optional[Cost]]
    samples: Dict[str, List[Sample]]
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
    measured = [_Measured(run, samples.get(run.dataset, [])) for run in track(runs, "measuring detectors")]
    timed = [each for each in measured if threads and each.cost and each.predictor and each.pixels]
    times = image_seconds([each.predictor for each in timed], [each.pixels for each in timed], threads) if timed else []
    for each, seconds in zip(timed, times):
        each.cost = replace(each.cost, seconds=seconds, threads=threads)
    for number, each in enumerate(measured):
        for sample, found in zip(samples.get(runs[number].dataset, []), each.detections(score_threshold)):
            sample.add_detections(number, found)
    return Measurements([each.cost for each in measured], samples, sizes)


def register_run_sources(runs: Sequence[Run]) -> None:
    """Registers the data sets that the runs' configs name in DATASETS.SOURCES. What cannot be is added to the notes."""
    for run in runs:
        if run.cfg is not None:
            try:
                register_sources(run.cfg)
            except ValueError as error:
                run.notes.append(f"no pictures and no time of an image: {one_line(error)}")


def _check_extent(run: Run) -> None:
    """Takes the config from a run whose detector is larger than any training here."""
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
    """Counted without memory for them; 0 where the model cannot be built, which is noted when it is."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return sum(each.numel() for each in build_model(changed(cfg, "MODEL.DEVICE", "meta")).parameters())
    except Exception:  # a config may name anything
        return 0


def _load_samples(runs: Sequence[Run], count: int) -> Tuple[Dict[str, List[Sample]], Dict[str, int]]:
    """Images and number of images by test set; a set that cannot be read is noted in its runs."""
    samples, sizes = {}, {}
    for name in dict.fromkeys(run.dataset for run in runs if count and run.cfg is not None and run.dataset):
        try:
            own, sizes[name] = load_samples(name, count)
            samples.update({name: own} if own else {})
        except Exception as error:  # a data set's loader raises what it likes
            note = f"no pictures and no time of an image: the data set {name!r} cannot be read here"
            for run in runs:
                if run.dataset == name:
                    run.notes.append(f"{note} ({_why_unread(run, error)})")
    return samples, sizes


def _why_unread(run: Run, error: Exception) -> str:
    if run.dataset in DatasetCatalog:
        return describe_error(error)
    if any(each.get("NAME") == run.dataset for each in run.cfg.DATASETS.SOURCES):
        return "its files are named by the run's config; --sources opens them"
    return "nobody has registered it"


class _Measured:
    """A run with its detector and what that costs; what fails is noted in the run."""

    def __init__(self, run: Run, samples: Sequence[Sample]):
        self._run, self._samples = run, samples
        self.pixels = [sample.pixels for sample in samples]
        self.predictor: Optional[Predictor] = None
        self.cost: Optional[Cost] = None
        if run.cfg is None:
            return
        if run.weights:
            with self._noted("no time of an image: the detector cannot be loaded"):
                self.predictor = Predictor(run.cfg, os.path.basename(run.weights))
        with self._noted("no parameters and FLOPs: they cannot be counted"):
            self.cost = run_cost(run.cfg, self.predictor, run.weights, self.pixels)
        if self.predictor and samples:
            predictor, self.predictor = self.predictor, None
            with self._noted("no time of an image: the detector fails on one"):
                predictor(self.pixels[0])
                self.predictor = predictor

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """A config may ask for sizes, or for parts that only the training's script registers, that fail anywhere."""
        try:
            yield
        except Exception as error:
            self._run.notes.append(f"{what} ({one_line(error)})")

    def detections(self, threshold: float) -> List[List[Box]]:
        """By sample; [] where there is no way to have them."""
        run = self._run
        if not self._samples:
            return []
        reason = "there are no detections of an evaluation"
        if run.detections:
            try:
                return read_detections(run.detections, run.dataset, self._samples, threshold)
            except (OSError, ValueError) as error:
                reason = f"{os.path.basename(run.detections)} cannot be read ({type(error).__name__})"
        if self.predictor is None:
            run.notes.append(f"no pictures: {reason}, and there is no detector to run")
            return []
        try:
            return [predicted_boxes(self.predictor(pixels), run.dataset, threshold) for pixels in self.pixels]
        except ValueError as error:  # its outputs are not finite
            run.notes.append(f"no pictures: {error}")
            return []
