"""The order of training images: after k batches it is what Detectron2's loader would have gone on with."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from tiny_training import registered_data, training_cfg

from qmimic_d2.data.resumable_loader import ResumableSampler, build_resumable_train_loader, resumable_sampler

MANY = 40


class Cycle:
    """0, 1, ..., size - 1, 0, 1, ..., as often as it is iterated."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return itertools.cycle(range(self.size))


def first(iterable, count):
    return list(itertools.islice(iterable, count))


def indices(sampler, count):
    return [index for index, _ in first(sampler, count)]


# The lying images are 0, 2 and 3; batches of two then are (0, 2), (1, 4), (3, 0), (5, 1), (2, 3), ...
LANDSCAPE = [True, False, True, True, False, False]


@pytest.mark.parametrize(
    "num_used, expected",
    [
        (0, [0, 1, 2, 3, 4]),
        # 0, 1, 2 were drawn: 1 waits
        (1, [1, 3, 4, 5, 0]),
        # 0 to 4 were drawn: 3 waits
        (2, [3, 5, 0, 1, 2]),
        # 0 to 5 and 0: 5 waits
        (3, [5, 1, 2, 3, 4]),
        # ... and 1: nothing waits
        (4, [2, 3, 4, 5, 0]),
    ],
)
def test_images_that_were_waiting_come_first(num_used, expected):
    sampler = ResumableSampler(Cycle(6), LANDSCAPE, batch_size=2)
    sampler.num_used_batches = num_used
    assert indices(sampler, 5) == expected


def test_several_waiting_images_keep_their_order_and_position():
    # 1, 5 and 4 fill the first batch; 0 and 2 wait
    sampler = ResumableSampler([0, 1, 2, 5, 4, 3], LANDSCAPE, batch_size=3)
    sampler.num_used_batches = 1
    assert first(sampler, 3) == [(0, 0), (2, 2), (3, 5)]


def test_images_that_are_not_grouped_never_wait():
    sampler = ResumableSampler(Cycle(5), [False] * 5, batch_size=2)
    sampler.num_used_batches = 4
    assert indices(sampler, 4) == [3, 4, 0, 1]


def test_an_image_keeps_its_position_when_it_comes_again():
    sampler = ResumableSampler(Cycle(6), LANDSCAPE, batch_size=2)
    assert first(sampler, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    sampler.num_used_batches = 1
    assert first(sampler, 4) == [(1, 1), (3, 3), (4, 4), (5, 5)]


def test_positions_of_several_processes_interleave(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    assert first(ResumableSampler(Cycle(6), LANDSCAPE, batch_size=2), 3) == [(0, 1), (1, 4), (2, 7)]


def grouped(stream, is_landscape, batch_size):
    """Batches of indices as Detectron2's AspectRatioGroupedDataset makes them."""
    images = ({"index": i, "width": 2 if is_landscape[i] else 1, "height": 1} for i in stream)
    for batch in AspectRatioGroupedDataset(images, batch_size):
        yield [each["index"] for each in batch]


def shared(sampler, rank, world_size):
    """The part of a Detectron2 sampler that one of several processes iterates."""
    sampler._rank, sampler._world_size = rank, world_size
    return sampler


def make_training_sampler(size, seed):
    return TrainingSampler(size, seed=seed)


def make_repeat_factor_sampler(size, seed):
    return RepeatFactorTrainingSampler(1.0 + 1.5 * torch.rand(size), seed=seed)


@pytest.mark.parametrize("make", [make_training_sampler, make_repeat_factor_sampler])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_go_on_as_detectron2_would_have_gone_on(make, rank, world_size, batch_size):
    size = 17
    is_landscape = (np.random.default_rng(batch_size).random(size) < 0.3).tolist()
    sampler = shared(make(size, seed=7), rank, world_size)
    uninterrupted = first(grouped(sampler, is_landscape, batch_size), MANY)
    for num_used in (0, 1, 2, 7, 20):
        resumable = ResumableSampler(sampler, is_landscape, batch_size)
        resumable.num_used_batches = num_used
        stream = (index for index, _ in resumable)
        resumed = first(grouped(stream, is_landscape, batch_size), MANY - num_used)
        assert resumed == uninterrupted[num_used:]


@pytest.fixture
def data(tmp_path):
    with registered_data(tmp_path / "data") as name:
        yield name


def seen(batches):
    """What can be told apart of batches: files, pixels and boxes after augmentation."""
    return [
        [
            (
                each["file_name"].rpartition("/")[2],
                each["image"].sum(dtype=torch.int64).item(),
                each["image"][:, 0].tolist(),
                each["instances"].gt_boxes.tensor.tolist(),
            )
            for each in batch
        ]
        for batch in batches
    ]


def loaded(cfg, num_used=0, count=12, **options):
    loader, sampler = build_resumable_train_loader(cfg, 3, **options)
    sampler.num_used_batches = num_used
    return seen(first(loader, count))


@pytest.mark.parametrize("groups", [True, False])
def test_loader_resumes_images_and_their_augmentation(data, tmp_path, groups):
    cfg = training_cfg(tmp_path, data, "DATALOADER.ASPECT_RATIO_GROUPING", groups)
    uninterrupted = loaded(cfg)
    for num_used in (1, 2, 5):
        assert loaded(cfg, num_used, 12 - num_used) == uninterrupted[num_used:]
    # an image that comes again is augmented anew
    views = {}
    for name, *view in (each for batch in uninterrupted for each in batch):
        views.setdefault(name, []).append(view)
    assert any(len(set(map(str, each))) > 1 for each in views.values())


@pytest.mark.parametrize("groups", [True, False])
def test_loader_with_workers_gives_the_same_batches(data, tmp_path, groups):
    grouping = ("DATALOADER.ASPECT_RATIO_GROUPING", groups)
    alone = loaded(training_cfg(tmp_path, data, *grouping), 3, 6)
    assert loaded(training_cfg(tmp_path, data, *grouping, "DATALOADER.NUM_WORKERS", 2), 3, 6) == alone


@pytest.mark.parametrize("groups", [True, False])
def test_order_is_that_of_detectron2s_own_loader(data, tmp_path, groups):
    cfg = training_cfg(tmp_path, data, "DATALOADER.ASPECT_RATIO_GROUPING", groups)
    theirs = build_detection_train_loader(cfg, sampler=TrainingSampler(9, seed=3))
    names = [[each["file_name"].rpartition("/")[2] for each in batch] for batch in first(theirs, 12)]
    assert [[name for name, *_ in batch] for batch in loaded(cfg)] == names


def test_repeat_factor_sampler_of_the_config(data, tmp_path):
    cfg = training_cfg(
        tmp_path, data, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9
    )
    uninterrupted = loaded(cfg)
    assert loaded(cfg, 4, 8) == uninterrupted[4:]
    assert loaded(training_cfg(tmp_path, data)) != uninterrupted


def test_another_seed_gives_another_order(data, tmp_path):
    cfg = training_cfg(tmp_path, data)
    loader, _ = build_resumable_train_loader(cfg, 4)
    assert seen(first(loader, 12)) != loaded(cfg)


def test_a_mapper_of_ones_own(data, tmp_path):
    loader, _ = build_resumable_train_loader(training_cfg(tmp_path, data), 3, mapper=lambda image: image)
    assert "annotations" in next(iter(loader))[0]


def test_loading_draws_nothing_from_the_global_generators(data, tmp_path):
    loader, _ = build_resumable_train_loader(training_cfg(tmp_path, data), 3)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first(loader, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_worker_outlives_signals_that_reach_every_process(data, tmp_path):
    def with_process(image):
        return {**image, "pid": os.getpid()}

    cfg = training_cfg(tmp_path, data, "DATALOADER.NUM_WORKERS", 1)
    batches = iter(build_resumable_train_loader(cfg, 3, mapper=with_process)[0])
    worker = next(batches)[0]["pid"]
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    assert {each["pid"] for batch in first(batches, 10) for each in batch} == {worker}


def test_the_sampler_of_a_loader_is_found(data, tmp_path):
    for groups in (True, False):
        cfg = training_cfg(tmp_path, data, "DATALOADER.ASPECT_RATIO_GROUPING", groups)
        loader, sampler = build_resumable_train_loader(cfg, 3)
        assert resumable_sampler(loader) is sampler
        assert resumable_sampler(build_detection_train_loader(cfg)) is None
    assert resumable_sampler([]) is None


def test_unknown_sampler_is_refused(data, tmp_path):
    cfg = training_cfg(tmp_path, data, "DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler")
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN is 'WeightedTrainingSampler'.*choose one of"):
        build_resumable_train_loader(cfg, 3)


def test_images_of_unknown_size_cannot_be_grouped(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qmimic_d2.data.resumable_loader.load_dataset_dicts", lambda *args, **kwargs: [{"file_name": "0.png"}]
    )
    with pytest.raises(ValueError, match="DATASETS.TRAIN is .*'width'.*ASPECT_RATIO_GROUPING False"):
        build_resumable_train_loader(training_cfg(tmp_path, data), 3)
    cfg = training_cfg(tmp_path, data, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    build_resumable_train_loader(cfg, 3)
