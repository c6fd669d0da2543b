"""Where the mimic looks: each source of regions, limits, nothing at all."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from qmimic_d2.modeling.mimic.region_sources import (
    WHOLE_MAP,
    TrainingRegions,
    check_roi_source,
    roi_source_names,
    select_rois,
)


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
        teacher_proposals=[Boxes(boxes(2, start=500.0)), Boxes(boxes(0))],
        ground_truth=[Boxes(boxes(1, start=300.0)), Boxes(boxes(2, start=400.0))],
        image_sizes=[(999, 999), (999, 999)],
    )


def selected(*args):
    return [each.tensor.tolist() for each in select_rois(*args)]


def test_sources(regions):
    assert sorted(roi_source_names()) == ["ground_truth", "neighbourhood", "proposals", "sampled", "teacher_proposals"]
    assert selected(["sampled"], regions) == [boxes(3).tolist(), []]
    assert selected(["proposals"], regions) == [boxes(5, 100.0).tolist(), boxes(1, 200.0).tolist()]
    assert selected(["teacher_proposals"], regions) == [boxes(2, 500.0).tolist(), []]
    assert selected(["ground_truth"], regions) == [boxes(1, 300.0).tolist(), boxes(2, 400.0).tolist()]
    # no neighbour is asked for
    assert selected(["neighbourhood"], regions) == selected(["ground_truth"], regions)


def test_a_union_has_its_parts_in_their_order(regions):
    union = selected(["ground_truth", "sampled"], regions)
    assert union == [[*boxes(1, 300.0).tolist(), *boxes(3).tolist()], boxes(2, 400.0).tolist()]
    assert selected(["ground_truth", "sampled"], regions, 2)[0] == union[0][:2]


def neighbourhood(tensor, jitter=0.25, count=3, seed=0, size=(1000, 1000)):
    regions = TrainingRegions(
        ground_truth=[Boxes(tensor)], image_sizes=[size], jitter=jitter, num_neighbours=count, seed=seed
    )
    return select_rois(["neighbourhood"], regions)[0].tensor


def test_neighbours_lie_near_their_box():
    objects = torch.tensor([[400.0, 400.0, 440.0, 420.0], [600.0, 100.0, 610.0, 180.0]])
    found = neighbourhood(objects, count=50)
    assert found.shape == (2 + 100, 4)
    assert torch.equal(found[:2], objects)
    neighbours = found[2:].view(50, 2, 4)
    sides = objects[:, 2:] - objects[:, :2]
    shifts = ((neighbours[..., :2] + neighbours[..., 2:]) - (objects[:, :2] + objects[:, 2:])) / 2.0 / sides
    growth = (neighbours[..., 2:] - neighbours[..., :2]) / sides - 1.0
    for each in (shifts, growth):
        assert 0.2 < each.abs().max().item() <= 0.25 + 1e-4
        assert abs(each.mean().item()) < 0.06


def test_no_jitter_repeats_the_box():
    one = torch.tensor([[4.0, 6.0, 24.0, 30.0]])
    assert neighbourhood(one, jitter=0.0, count=2).tolist() == one.repeat(3, 1).tolist()


def test_neighbours_stay_in_the_image():
    corner = torch.tensor([[0.0, 0.0, 20.0, 10.0]])
    found = neighbourhood(corner, count=40, size=(10, 20))
    assert found[:, 0::2].min() >= 0.0 and found[:, 0::2].max() <= 20.0
    assert found[:, 1::2].min() >= 0.0 and found[:, 1::2].max() <= 10.0


def test_neighbours_depend_on_the_seed_alone():
    one = torch.tensor([[100.0, 100.0, 200.0, 200.0]])
    torch.manual_seed(1)
    first = neighbourhood(one, seed=7)
    torch.manual_seed(2)
    assert torch.equal(neighbourhood(one, seed=7), first)
    assert not torch.equal(neighbourhood(one, seed=8), first)


def test_an_image_without_objects_has_no_neighbourhood():
    assert neighbourhood(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    "sources",
    [*([each] for each in roi_source_names()), [WHOLE_MAP], ["sampled", "ground_truth"], ("neighbourhood", "sampled")],
)
def test_known_sources(sources):
    check_roi_source(sources)


@pytest.mark.parametrize(
    "sources", [["anchors"], [], [""], ["sampled", "sampled"], ["sampled", "whole_map"], "sampled", "sampled+proposals"]
)
def test_unknown_sources(sources):
    with pytest.raises(ValueError) as error:
        check_roi_source(sources)
    for part in ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", repr(sources), "give a list", "'sampled'", "['whole_map']"):
        assert part in str(error.value)


def test_sources_that_a_detector_does_not_have():
    with pytest.raises(ValueError, match="one or more of \\['ground_truth'\\]"):
        check_roi_source(["sampled"], ["ground_truth"])


def test_the_first_regions_of_each_image(regions):
    assert selected(["proposals"], regions, 2) == [boxes(5, 100.0)[:2].tolist(), boxes(1, 200.0).tolist()]
    assert selected(["sampled"], regions, 1) == [boxes(3)[:1].tolist(), []]
    assert selected(["sampled"], regions, 99) == selected(["sampled"], regions, 0) == selected(["sampled"], regions)
    assert len(regions.proposals[0]) == 5, "the step's own proposals stay"


def test_images_without_a_region_keep_their_place(regions):
    empty = select_rois(["sampled"], regions, 2)[1]
    assert isinstance(empty, Boxes) and empty.tensor.shape == (0, 4)
    assert len(select_rois(["sampled"], regions)) == 2


def test_no_gradient_flows_into_boxes():
    predicted = boxes(2).requires_grad_()
    (each,) = select_rois(["proposals"], TrainingRegions(proposals=[instances(predicted)]))
    assert not each.tensor.requires_grad and predicted.requires_grad


def test_selecting_draws_no_random_number(regions):
    state = torch.get_rng_state()
    for source in roi_source_names():
        select_rois([source], regions, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_that_return_no_sampled_proposals_are_named():
    regions = TrainingRegions(proposals=[instances(boxes(1))])
    with pytest.raises(ValueError) as error:
        select_rois(["sampled"], regions)
    for part in ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", "'sampled'", "'proposals' or 'ground_truth'"):
        assert part in str(error.value)


def test_nothing_known():
    assert select_rois(["proposals"], TrainingRegions()) == []
    assert select_rois(["ground_truth"], TrainingRegions()) == []
    assert TrainingRegions().sampled is not TrainingRegions().sampled, "steps share no list"
