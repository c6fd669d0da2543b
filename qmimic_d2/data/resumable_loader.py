"""A training data loader whose images, augmentation included, continue where a checkpoint left them."""

import itertools
import logging
import operator
import signal
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.data.mapper import FileNamingMapper, ImageMapper
from qmimic_d2.orphans import tie_worker
from qmimic_d2.randomness import mixed_seed, own_randomness

__all__ = ["SAMPLERS", "ResumableSampler", "build_resumable_train_loader", "resumable_sampler"]

# Values of DATALOADER.SAMPLER_TRAIN that can be resumed.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

# How long a worker outlives SIGTERM: schedulers mostly follow it up by SIGKILL after as long.
_WORKER_GRACE_SECONDS = 30


class ResumableSampler(Sampler):
    """
    An endless sampler that can begin after the images that earlier batches have used.

    It walks over the indices alone and loads nothing. Detectron2 groups images by orientation, so an
    image can wait in a half-filled batch while later ones are used: those that were waiting come first
    again, in their order.

    It yields pairs: index of the image, and position in the stream of all processes together, which
    the image keeps when it comes again.

    Args:
        sampler: endless, the same stream of indices whenever it is iterated, this process's share.
        is_landscape: of every image of the dataset, whether it is wider than high. All equal where the
            loader does not group images.
        batch_size: images per batch of this process.

    Attributes:
        num_used_batches: how many batches to pass over; read when iteration begins.
    """

    def __init__(self, sampler: Iterable[int], is_landscape: Sequence[bool], batch_size: int):
        self._sampler = sampler
        self._is_landscape = is_landscape
        self._batch_size = batch_size
        self._first_position = comm.get_rank()
        self._position_step = comm.get_world_size()
        self.num_used_batches = 0

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        stream = zip(self._sampler, itertools.count(self._first_position, self._position_step))
        return itertools.chain(self._waiting_images(stream), stream)

    def _waiting_images(self, stream: Iterator[Tuple[int, int]]) -> List[Tuple[int, int]]:
        waiting: Dict[bool, List[Tuple[int, int]]] = {True: [], False: []}
        num_batches = 0
        while num_batches < self.num_used_batches:
            index, position = next(stream)
            group = waiting[self._is_landscape[index]]
            group.append((index, position))
            if len(group) == self._batch_size:
                num_batches += 1
                group.clear()
        return waiting[True] + waiting[False]


class _SeededDataset(Dataset):
    """Images as the mapper makes them, augmented by random numbers of their place in the stream alone."""

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, place: Tuple[int, int]) -> Dict[str, Any]:
        index, position = place
        # four words: never those of a training step, which has three
        with own_randomness(mixed_seed(self._seed, position, 0, 1)):
            return self._dataset[index]


def build_resumable_train_loader(
    cfg: CfgNode, seed: int, mapper: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None
) -> Tuple[Iterable[List[Dict[str, Any]]], ResumableSampler]:
    """
    The batches of Detectron2's training loader, in an order that can be resumed.

    Order and augmentation depend on the seed alone, not on the number of data-loader workers:
    Detectron2's own loader deals indices out to its workers, this one draws them in the training process.

    Args:
        cfg: names data sets, sampler and batch size as for any Detectron2 training.
        seed: of the order of images and of their augmentation, >= 0, the same in every process.
        mapper: from a dict of the data set to one of the batch; None for :class:`ImageMapper` of the config.

    Returns:
        the loader, and its sampler, to be told the number of used batches before iteration begins.

    Raises:
        ValueError: a sampler that this function does not know, or images of unknown size that are to
            be grouped by orientation.
    """
    dataset = load_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    groups = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    is_landscape = _orientations(cfg, dataset) if groups else [False] * len(dataset)
    sampler = ResumableSampler(_build_sampler(cfg, dataset, seed), is_landscape, batch_size)
    mapper = FileNamingMapper(mapper or ImageMapper(cfg, is_train=True))
    mapped = MapDataset(DatasetFromList(dataset, copy=False), mapper)
    options = {
        "dataset": _SeededDataset(mapped, seed),
        "sampler": sampler,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "worker_init_fn": _outlive_signals,
        # of its own: starting the loader draws nothing from the global generator
        "generator": torch.Generator().manual_seed(seed),
    }
    if groups:
        images = DataLoader(collate_fn=operator.itemgetter(0), **options)
        return AspectRatioGroupedDataset(images, batch_size), sampler
    return DataLoader(batch_size=batch_size, collate_fn=trivial_batch_collator, **options), sampler


def resumable_sampler(loader: Iterable[List[Dict[str, Any]]]) -> Optional[ResumableSampler]:
    """The sampler of a loader that :func:`build_resumable_train_loader` has built; None for any other."""
    images = loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader
    sampler = getattr(images, "sampler", None)
    return sampler if isinstance(sampler, ResumableSampler) else None


def _outlive_signals(worker_id: int) -> None:
    """
    Keeps a data-loader worker at work after a signal that reached every process of a run.

    Without its data the step under way could not be finished, and no checkpoint would be saved.
    """
    tie_worker(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The training process ends a worker that hangs by SIGTERM, so that one may not be ignored for good.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE_SECONDS))


def _build_sampler(cfg: CfgNode, dataset: Sequence[Dict[str, Any]], seed: int) -> Iterable[int]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logging.getLogger(__name__).info("Training sampler %s with seed %d", name, seed)
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; train_net.py resumes {list(SAMPLERS)}, choose one of them"
    )


def _orientations(cfg: CfgNode, dataset: Sequence[Dict[str, Any]]) -> List[bool]:
    try:
        return [image["width"] > image["height"] for image in dataset]
    except KeyError as error:
        raise ValueError(
            f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN}, and a dict of these data sets has no {error}, by which "
            "images are grouped; add width and height, or set DATALOADER.ASPECT_RATIO_GROUPING False"
        ) from error
