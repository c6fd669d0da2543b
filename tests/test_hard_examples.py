"""Online hard example mining: the loss of a region, and which regions are kept."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from qmimic_d2.modeling.roi_heads.hard_examples import loss_per_region, select_hardest

NUM_CLASSES = 2


def predictor(**options):
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    return FastRCNNOutputLayers(ShapeSpec(channels=1), box2box_transform=transform, num_classes=NUM_CLASSES, **options)


def proposals_of(boxes, classes, gt_boxes=None):
    instances = Instances((64, 64))
    instances.proposal_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if gt_boxes is not None:
        instances.gt_boxes = Boxes(torch.tensor(gt_boxes).view(-1, 4))
    return instances


BOX = [10.0, 10.0, 20.0, 30.0]  # 10 x 20 pixels, centre (15, 20)
# Its target deltas: 2 / 10 and -5 / 20 of its size further, and as large.
MOVED = [12.0, 5.0, 22.0, 25.0]


def test_by_hand():
    proposals = [
        proposals_of([BOX, BOX, BOX], [1, 0, 2], [MOVED, BOX, MOVED]),
        proposals_of([BOX], [2]),  # an image without annotations
    ]
    # Odds 1 : 3 : 4 of the classes 0, 1 and background.
    logits = torch.tensor([1.0, 3.0, 4.0]).log().expand(4, 3)
    deltas = torch.zeros(4, 8)
    deltas[1, :4] = torch.tensor([0.0, 0.5, 0.0, 0.0])  # of class 0, whose target is 0
    deltas[0, :4] = 9.0  # of class 0, which the first region is not: not counted
    deltas[2] = 9.0  # background: not counted
    losses = loss_per_region(
        predictor(loss_weight={"loss_box_reg": 2.0}), (logits, deltas), proposals
    )
    expected = torch.tensor([8 / 3, 8.0, 2.0, 2.0]).log() + 2.0 * torch.tensor([0.2 + 0.25, 0.5, 0.0, 0.0])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("use_sigmoid_ce", [False, True])
@pytest.mark.parametrize("is_class_agnostic", [False, True])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_its_mean_is_the_sum_of_detectron2s_losses(box_loss, is_class_agnostic, use_sigmoid_ce):
    layers = predictor(
        box_reg_loss_type=box_loss,
        cls_agnostic_bbox_reg=is_class_agnostic,
        use_sigmoid_ce=use_sigmoid_ce,
        smooth_l1_beta=0.1,
        loss_weight={"loss_cls": 0.5, "loss_box_reg": 3.0},
    )
    shift = torch.tensor([1.0, -2.0, 3.0, 1.5])
    boxes = torch.tensor([[10.0, 12.0, 20.0, 30.0], [20.0, 4.0, 60.0, 16.0], [0.0, 0.0, 8.0, 9.0]])
    proposals = [
        proposals_of(boxes.tolist(), [0, 2, 1], (boxes + shift).tolist()),
        proposals_of([], [], []),
        proposals_of(boxes[:2].tolist(), [2, 2]),
    ]
    predictions = torch.randn(5, 3), 0.3 * torch.randn(5, 4 if is_class_agnostic else 8)
    losses = loss_per_region(layers, predictions, proposals)
    with EventStorage():
        expected = layers.losses(predictions, proposals)
    assert losses.shape == (5,) and (losses > 0).all()
    torch.testing.assert_close(losses.mean(), sum(expected.values()))


def test_it_has_no_gradient_and_takes_no_regions():
    layers = predictor()
    logits = torch.randn(2, 3, requires_grad=True)
    proposals = [proposals_of([BOX, BOX], [0, 2], [BOX, BOX])]
    assert not loss_per_region(layers, (logits, torch.zeros(2, 8)), proposals).requires_grad
    empty = loss_per_region(layers, (torch.zeros(0, 3), torch.zeros(0, 8)), [proposals_of([], [])])
    assert empty.shape == (0,)


# Four boxes of 10 x 10; the second overlaps the first by 8 / 12, the others nothing.
FOUR = torch.tensor([[0.0, 0, 10, 10], [2.0, 0, 12, 10], [30.0, 30, 40, 40], [50.0, 50, 60, 60]])


@pytest.mark.parametrize(
    "losses, count, nms_thresh, expected",
    [
        ([0.3, 0.1, 0.9, 0.5], 2, 1.0, [2, 3]),
        ([0.3, 0.1, 0.9, 0.5], 3, 1.0, [0, 2, 3]),
        ([0.3, 0.1, 0.9, 0.5], 9, 1.0, [0, 1, 2, 3]),
        ([0.5, 0.5, 0.5, 0.5], 2, 1.0, [0, 1]),  # of equal losses the earlier
        ([0.8, 0.9, 0.1, 0.2], 2, 1.0, [0, 1]),
        ([0.8, 0.9, 0.1, 0.2], 2, 0.5, [1, 3]),  # the first is suppressed
        ([0.8, 0.9, 0.1, 0.2], 2, 0.7, [0, 1]),
        ([0.8, 0.9, 0.1, 0.2], 9, 0.5, [1, 2, 3]),
        ([0.9, 0.9, 0.1, 0.2], 1, 0.5, [0]),
    ],
)
def test_the_hardest(losses, count, nms_thresh, expected):
    assert select_hardest(torch.tensor(losses), FOUR, count, nms_thresh).tolist() == expected


@pytest.mark.parametrize("nms_thresh", [1.0, 0.7])
def test_none_of_none(nms_thresh):
    assert select_hardest(torch.zeros(0), torch.zeros(0, 4), 3, nms_thresh).tolist() == []
