"""Where the mimic looks: each source of regions, limits, nothing at all."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from qmimic_d2.modeling.rois import ROI_SOURCES, TrainingRegions, select_rois


def boxes(count, start=0.0):
    return torch.arange(count * 4, dtype=torch.float32).view(count, 4) + start


def instances(tensor, name="proposal_boxes"):
    each = Instances((64, 64))
    each.set(name, Boxes(tensor))
    return each


@pytest.fixture
def regions():
    return TrainingRegions(
        sampled=[instances(boxes(3)), instances(boxes(0))],
        proposals=[instances(boxes(5, start=100.0)), instances(boxes(1, start=200.0))],
        ground_truth=[instances(boxes(1, start=300.0), "gt_boxes"), instances(boxes(2, start=400.0), "gt_boxes")],
    )


def selected(*args):
    return [each.tensor.tolist() for each in select_rois(*args)]


def test_sources(regions):
    assert sorted(ROI_SOURCES) == ["ground_truth", "proposals", "sampled"]
    assert selected("sampled", regions) == [boxes(3).tolist(), []]
    assert selected("proposals", regions) == [boxes(5, 100.0).tolist(), boxes(1, 200.0).tolist()]
    assert selected("ground_truth", regions) == [boxes(1, 300.0).tolist(), boxes(2, 400.0).tolist()]


def test_the_first_regions_of_each_image(regions):
    assert selected("proposals", regions, 2) == [boxes(5, 100.0)[:2].tolist(), boxes(1, 200.0).tolist()]
    assert selected("sampled", regions, 1) == [boxes(3)[:1].tolist(), []]
    assert selected("sampled", regions, 99) == selected("sampled", regions, 0) == selected("sampled", regions)
    assert len(regions.proposals[0]) == 5, "the step's own proposals stay"


def test_images_without_a_region_keep_their_place(regions):
    empty = select_rois("sampled", regions, 2)[1]
    assert isinstance(empty, Boxes) and empty.tensor.shape == (0, 4)
    assert len(select_rois("sampled", regions)) == 2


def test_no_gradient_flows_into_boxes():
    predicted = boxes(2).requires_grad_()
    (each,) = select_rois("proposals", TrainingRegions(proposals=[instances(predicted)]))
    assert not each.tensor.requires_grad and predicted.requires_grad


def test_selecting_draws_no_random_number(regions):
    state = torch.get_rng_state()
    for source in ROI_SOURCES:
        select_rois(source, regions, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_that_return_no_sampled_proposals_are_named():
    regions = TrainingRegions(proposals=[instances(boxes(1))])
    with pytest.raises(ValueError) as error:
        select_rois("sampled", regions)
    for part in ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", '"sampled"', '"proposals" or "ground_truth"'):
        assert part in str(error.value)


def test_nothing_known():
    assert select_rois("proposals", TrainingRegions()) == []
    assert select_rois("ground_truth", TrainingRegions()) == []
    assert TrainingRegions().sampled is not TrainingRegions().sampled, "steps share no list"
