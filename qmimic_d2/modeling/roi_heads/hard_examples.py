"""
Online hard example mining: the regions whose loss is highest (Shrivastava et al., CVPR 2016, arXiv 1604.03540).

Shape letters:
    M: number of regions of all images.
    R: number of regions of one image.
    K: number of foreground classes.
"""

from typing import List, Tuple

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

__all__ = ["loss_per_region", "select_hardest"]

_BOX_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


@torch.no_grad()
def loss_per_region(
    predictor: FastRCNNOutputLayers, predictions: Tuple[Tensor, Tensor], proposals: List[Instances]
) -> Tensor:
    """
    The share of each region in the losses of ``predictor.losses``, with their weights, before the average.

    Args:
        predictor: sets the types and weights of the losses; no federated loss.
        predictions: logits (M, K + 1) and deltas (M, 4) or (M, 4 K).
        proposals: of each image, with ``proposal_boxes``, ``gt_classes``, and ``gt_boxes`` where the image
            has annotations.

    Returns:
        shape (M,): classification loss, and for foreground the box loss as well. Its mean is the sum of
        ``predictor.losses``.
    """
    logits, deltas = predictions
    classes = torch.cat([each.gt_classes for each in proposals])
    losses = _class_loss(predictor, logits, classes) * predictor.loss_weight.get("loss_cls", 1.0)
    foreground = torch.nonzero(classes < predictor.num_classes).squeeze(1)
    boxes = torch.cat([each.proposal_boxes.tensor for each in proposals])[foreground]
    # Regions of an image without annotations are background. Their proposals fill the place of gt_boxes, unread.
    gt_boxes = [each.gt_boxes if each.has("gt_boxes") else each.proposal_boxes for each in proposals]
    gt_boxes = torch.cat([each.tensor for each in gt_boxes])
    deltas = deltas.unflatten(1, (-1, 4))
    box_class = classes[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
    box_losses = _box_loss(predictor, boxes, gt_boxes[foreground], deltas[foreground, box_class])
    losses[foreground] += box_losses * predictor.loss_weight.get("loss_box_reg", 1.0)
    return losses


def select_hardest(losses: Tensor, boxes: Tensor, count: int, nms_thresh: float = 1.0) -> Tensor:
    """
    Indices of the regions of one image whose loss is highest.

    Args:
        losses: shape (R,).
        boxes: shape (R, 4).
        count: B, the most regions that are kept.
        nms_thresh: of two regions whose IoU is above it, only the one with the higher loss counts; 1.0 = all.

    Returns:
        shape (min(B, regions that count),), rising. Of equal losses, the earlier regions are kept.
    """
    order = losses.argsort(descending=True, stable=True)
    if nms_thresh < 1.0:
        # Falling ranks as scores: ties stay in the order above.
        ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
        order = order[nms(boxes[order], ranks, nms_thresh)]
    return order[:count].sort().values


def _class_loss(predictor: FastRCNNOutputLayers, logits: Tensor, classes: Tensor) -> Tensor:
    if not predictor.use_sigmoid_ce:
        return F.cross_entropy(logits, classes, reduction="none")
    targets = F.one_hot(classes, predictor.num_classes + 1)[:, :-1].to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[:, :-1], targets, reduction="none").sum(dim=1)


def _box_loss(predictor: FastRCNNOutputLayers, boxes: Tensor, gt_boxes: Tensor, deltas: Tensor) -> Tensor:
    transform = predictor.box2box_transform
    if predictor.box_reg_loss_type == "smooth_l1":
        targets = transform.get_deltas(boxes, gt_boxes)
        return smooth_l1_loss(deltas, targets, predictor.smooth_l1_beta, reduction="none").sum(dim=1)
    return _BOX_LOSSES[predictor.box_reg_loss_type](transform.apply_deltas(deltas, boxes), gt_boxes)
