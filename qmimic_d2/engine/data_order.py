"""A training data loader whose order of images continues where a checkpoint left it."""

import itertools
import logging
from typing import Dict, Iterator, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

__all__ = ["ResumableSampler", "build_resumable_train_loader"]


class ResumableSampler(Sampler):
    """
    An endless sampler that can begin after the images that earlier batches have used.

    It walks over the indices alone and loads nothing. Detectron2 groups images by orientation, so an
    image can wait in a half-filled batch while later ones are used: those that were waiting come first
    again, in their order.

    With data-loader workers Detectron2 hands indices out in shards, one per worker, and the order in
    which batches fill differs from the sampler's: then a resumed run sees the same permutation, but a
    few images around the interruption twice or not at all.

    Args:
        sampler: endless, the same stream of indices whenever it is iterated, this process's share.
        is_landscape: of every image of the dataset, whether it is wider than high. All equal where the
            loader does not group images.
        batch_size: images per batch of this process.
    """

    def __init__(self, sampler: Sampler, is_landscape: Sequence[bool], batch_size: int):
        self._sampler = sampler
        self._is_landscape = is_landscape
        self._batch_size = batch_size
        self.num_used_batches = 0

    def __iter__(self) -> Iterator[int]:
        stream = iter(self._sampler)
        return itertools.chain(self._waiting_images(stream), stream)

    def _waiting_images(self, stream: Iterator[int]) -> List[int]:
        waiting: Dict[bool, List[int]] = {True: [], False: []}
        num_batches = 0
        while num_batches < self.num_used_batches:
            index = next(stream)
            group = waiting[self._is_landscape[index]]
            group.append(index)
            if len(group) == self._batch_size:
                num_batches += 1
                group.clear()
        return waiting[True] + waiting[False]


def build_resumable_train_loader(cfg: CfgNode, seed: int) -> Tuple[object, ResumableSampler]:
    """
    Detectron2's training loader of the config, on a :class:`ResumableSampler`.

    Args:
        cfg: names data sets, sampler and batch size as for any Detectron2 training.
        seed: of the order of images, >= 0, the same in every process.

    Returns:
        the loader, and its sampler, to be told the number of used batches before iteration begins.

    Raises:
        ValueError: a sampler that this function does not know.
    """
    dataset = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logging.getLogger(__name__).info("Training sampler %s with seed %d", name, seed)
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(dataset), seed=seed)
    elif name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {name!r}; train_net.py resumes 'TrainingSampler' and "
            "'RepeatFactorTrainingSampler', choose one of them"
        )
    groups = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    is_landscape = [groups and image["width"] > image["height"] for image in dataset]
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    resumable = ResumableSampler(sampler, is_landscape, batch_size)
    # The seed gives the loader a generator of its own: starting it draws nothing from the global one.
    loader = build_detection_train_loader(cfg, dataset=dataset, sampler=resumable, seed=seed)
    return loader, resumable
