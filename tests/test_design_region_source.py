"""A project's own source of regions: a registered function, named in MODEL.QMIMIC.MIMIC.ROI_SOURCE."""

import pytest
import torch
from detectron2.structures import Boxes
from helpers import batch, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2 import attach_mimic
from qmimic_d2.modeling import ROI_SOURCE_REGISTRY


def upper_halves(regions):
    """The upper half of each annotated box."""
    halves = [each.tensor.clone() for each in regions.ground_truth]
    for each in halves:
        each[:, 3] = (each[:, 1] + each[:, 3]) / 2.0
    return [Boxes(each) for each in halves]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    # a project writes @ROI_SOURCE_REGISTRY.register() above the function; the test forgets it afterwards
    monkeypatch.setattr(ROI_SOURCE_REGISTRY, "_obj_map", dict(ROI_SOURCE_REGISTRY._obj_map))
    ROI_SOURCE_REGISTRY.register(upper_halves)


def test_a_source_of_ones_own_trains(tmp_path, monkeypatch):
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*teacher.options, "MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["upper_halves"])
    model = seeded_model(cfg)
    mimic = attach_mimic(model, cfg)
    seen, pairs = [], mimic.pairs
    monkeypatch.setattr(mimic, "pairs", lambda *args: seen.append(args[2]) or pairs(*args))
    inputs = batch()
    assert training_step(model, inputs).losses["loss_mimic"] > 0.0
    for found, each in zip(seen[0], inputs):
        whole = each["instances"].gt_boxes
        assert torch.equal(found.tensor[:, :3], whole.tensor[:, :3])
        assert torch.allclose(found.area(), whole.area() / 2.0)


def test_a_name_is_given_once():
    with pytest.raises(AssertionError, match="already registered"):
        ROI_SOURCE_REGISTRY.register(upper_halves)
