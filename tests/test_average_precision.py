"""AP as one number, of a whole test set and of a part of it, with a detector that is told the answers."""

import math
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from tiny_coco import registered_coco
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.engine.average_precision import APEvaluation


class Oracle(nn.Module):
    """Detects the object of every image (see ``registered_coco``) whose id is among ``known_ids``."""

    def __init__(self, known_ids):
        super().__init__()
        self.known_ids = set(known_ids)

    def forward(self, batched_inputs):
        return [{"instances": self.detect(each["image_id"])} for each in batched_inputs]

    def detect(self, image_id):
        count = int(image_id in self.known_ids)
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(torch.tensor([[8.0, 8.0, 32.0, 40.0]])[:count])
        instances.scores = torch.tensor([0.9])[:count]
        instances.pred_classes = torch.tensor([(image_id - 10) % 3])[:count]
        return instances


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture
def dataset(tmp_path):
    with registered_coco(tmp_path, count=6) as name:
        yield name


def test_all_images(cfg, dataset, capsys):
    evaluation = APEvaluation(cfg, dataset)
    assert (evaluation.num_images, evaluation.num_images_in_dataset) == (6, 6)
    assert not evaluation.is_subset
    assert evaluation(Oracle(range(10, 16))) == pytest.approx(100.0)
    # every class has two objects, and one of them is found: recall 0.5, with COCO's 101 points 51 / 101
    assert evaluation(Oracle(range(10, 13))) == pytest.approx(100 * 51 / 101)
    assert math.isnan(evaluation(Oracle([])))
    assert capsys.readouterr().out == ""
    assert not os.path.exists(cfg.OUTPUT_DIR)


def test_images_outside_of_the_subset_do_not_count(cfg, dataset):
    evaluation = APEvaluation(cfg, dataset, max_images=3)
    assert (evaluation.num_images, evaluation.num_images_in_dataset) == (3, 6)
    assert evaluation.is_subset
    # evenly spaced: 10, 12, 14, the classes 0, 2, 1
    assert evaluation(Oracle([10, 12, 14])) == pytest.approx(100.0)
    assert evaluation(Oracle([10])) == pytest.approx(100 / 3)


def test_more_images_than_there_are_is_no_subset(cfg, dataset):
    assert not APEvaluation(cfg, dataset, max_images=7).is_subset


def test_an_evaluator_that_takes_whole_sets_only(cfg, dataset, monkeypatch):
    monkeypatch.setattr("qmimic_d2.engine.average_precision.build_evaluator", lambda *args: object())
    with pytest.raises(ValueError, match="takes the whole test set only"):
        APEvaluation(cfg, dataset, max_images=3)


def test_an_evaluator_without_box_ap(cfg, dataset, monkeypatch):
    monkeypatch.setattr(
        "qmimic_d2.engine.average_precision.inference_on_dataset", lambda *args: {"segm": {"AP": 1.0}}
    )
    with pytest.raises(ValueError, match=r"tiny_coco.*\['segm'\]"):
        APEvaluation(cfg, dataset)(Oracle([]))


def test_data_sets_that_cannot_be_evaluated(cfg, tmp_path):
    with pytest.raises(KeyError, match="not_there"):
        APEvaluation(cfg, "not_there")
    with registered_coco(tmp_path, count=1, name="tiny_unknown_kind") as name:
        del MetadataCatalog.get(name).evaluator_type
        with pytest.raises(ValueError, match="tiny_unknown_kind.*evaluator_type ''"):
            APEvaluation(cfg, name)
