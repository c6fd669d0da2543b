"""
R-FCN's RoI heads: position-sensitive score maps, pooled and averaged, with no layer per region.

Source: J. Dai, Y. Li, K. He, J. Sun, "R-FCN: Object Detection via Region-based Fully Convolutional Networks",
NeurIPS 2016, arXiv 1605.06409.

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: channels of the feature.
    K: number of foreground classes.
    k: bins along each side of a region.
"""

import sys
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import weight_init
from torch import Tensor, nn

from qmimic_d2.modeling.backbone.build import Norm, check_choice, resolve_norm
from qmimic_d2.modeling.roi_heads.hard_examples import loss_per_region, select_hardest
from qmimic_d2.modeling.roi_heads.position_sensitive import PositionSensitivePooler

__all__ = ["RFCNOutputLayers", "RFCNROIHeads"]


class RFCNOutputLayers(FastRCNNOutputLayers):
    """
    Fast R-CNN's outputs, losses and inference, with score maps instead of the two linear layers.

    Two 1x1 convolutions make k k (K + 1) maps of class scores, background last, and k k 4 maps of box
    deltas (times K unless they are class-agnostic). Each of a region's k x k bins reads its own maps. The output is the
    average of the bins, as the paper says above equation 2; the equation itself has the sum. The average keeps the
    scale of logits the same for every k.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, pooler: PositionSensitivePooler, **kwargs):
        """
        Args:
            input_shape: its ``channels`` are the feature's.
            pooler: fixes k.
            kwargs: of :class:`FastRCNNOutputLayers`.
        """
        super().__init__(ShapeSpec(channels=input_shape.channels), **kwargs)
        self.pooler = pooler
        # The scales of the initial weights are those of the linear layers.
        self.cls_score = self._score_maps(self.cls_score, std=0.01)
        self.bbox_pred = self._score_maps(self.bbox_pred, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        args = super().from_config(cfg, input_shape)
        node = cfg.MODEL.RFCN
        args["pooler"] = PositionSensitivePooler(
            num_bins=node.NUM_BINS,
            stride=input_shape.stride,
            pooler_type=node.POOLER_TYPE,
            sampling_ratio=node.SAMPLING_RATIO,
        )
        return args

    def _score_maps(self, linear: nn.Linear, *, std: float) -> nn.Conv2d:
        maps = nn.Conv2d(linear.in_features, linear.out_features * self.pooler.num_bins**2, kernel_size=1)
        nn.init.normal_(maps.weight, std=std)
        nn.init.zeros_(maps.bias)
        return maps

    def forward(self, feature: Tensor, boxes: List[Boxes]) -> Tuple[Tensor, Tensor]:
        """
        Args:
            feature: shape (N, C, H, W).
            boxes: N Boxes in pixels of the input image.

        Returns:
            logits of the K + 1 classes, shape (M, K + 1), and deltas, shape (M, 4) or (M, 4 K).
        """
        scores = self.pooler(self.cls_score(feature), boxes)
        deltas = self.pooler(self.bbox_pred(feature), boxes)
        return scores.mean(dim=(2, 3)), deltas.mean(dim=(2, 3))


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(ROIHeads):
    """
    R-FCN on one feature map; ``MODEL.ROI_HEADS.NAME: "RFCNROIHeads"``, with the keys of ``MODEL.RFCN``.

    Sampling, losses (``loss_cls``, ``loss_box_reg``) and inference are Detectron2's, and follow the keys of
    ``MODEL.ROI_HEADS`` and ``MODEL.ROI_BOX_HEAD`` that belong to them. In training it returns the proposals of the
    losses, foreground first.

    With hard examples it predicts all proposals, and the losses are those of the B proposals per image with the highest
    loss (the paper's "Training"). ``batch_size_per_image`` and ``positive_fraction`` then have no effect.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        box_predictor: RFCNOutputLayers,
        conv: Optional[nn.Module] = None,
        num_hard_examples: int = 0,
        hard_example_nms_thresh: float = 1.0,
        **kwargs,
    ):
        """
        Args:
            in_feature: name of the feature.
            box_predictor: score maps, losses and inference.
            conv: applied to the feature before the score maps; None for nothing.
            num_hard_examples: B; 0 = Detectron2's random sampling.
            hard_example_nms_thresh: see :func:`select_hardest`.
            kwargs: of :class:`ROIHeads`.

        Raises:
            ValueError: an option is out of range, or hard examples are asked for with a federated loss.
        """
        super().__init__(**kwargs)
        if num_hard_examples < 0:
            raise ValueError(f"MODEL.RFCN.HARD_EXAMPLES is {num_hard_examples}; give regions per image, 0 = off")
        if not 0.0 < hard_example_nms_thresh <= 1.0:
            raise ValueError(
                f"MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH is {hard_example_nms_thresh}; give an IoU above 0 and at "
                "most 1 (1.0 = no suppression)"
            )
        if num_hard_examples and box_predictor.use_fed_loss:
            raise ValueError(
                f"MODEL.RFCN.HARD_EXAMPLES is {num_hard_examples} and MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True; a "
                "federated loss draws its classes anew for every batch and ranks no regions: switch one off"
            )
        self.in_feature = in_feature
        self.in_features = [in_feature]  # as Detectron2's heads say which maps they read
        self.conv = conv
        self.box_predictor = box_predictor
        self.num_hard_examples = num_hard_examples
        self.hard_example_nms_thresh = hard_example_nms_thresh
        if num_hard_examples:
            # Detectron2's sampling then labels every proposal and drops only those it ignores.
            self.batch_size_per_image, self.positive_fraction = sys.maxsize, 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec]):
        args = super().from_config(cfg)
        in_feature = _only_feature(cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        for key, is_on in (("MASK_ON", cfg.MODEL.MASK_ON), ("KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON)):
            if is_on:
                raise ValueError(f"MODEL.{key} is True, but RFCNROIHeads predicts boxes only; set it to False")
        node = cfg.MODEL.RFCN
        shape = input_shape[in_feature]
        args["in_feature"] = in_feature
        args["conv"] = _build_conv(
            shape.channels,
            node.CONV_DIM,
            kernel_size=node.CONV_KERNEL,
            norm=resolve_norm("MODEL.RFCN.CONV_NORM", node.CONV_NORM),
        )
        args["box_predictor"] = RFCNOutputLayers(
            cfg, ShapeSpec(channels=node.CONV_DIM or shape.channels, stride=shape.stride)
        )
        args["num_hard_examples"] = node.HARD_EXAMPLES
        args["hard_example_nms_thresh"] = node.HARD_EXAMPLE_NMS_THRESH
        return args

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        proposals: List[Instances],
        targets: Optional[List[Instances]] = None,
    ) -> Tuple[List[Instances], Dict[str, Tensor]]:
        """See :meth:`ROIHeads.forward`."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        feature = features[self.in_feature]
        if self.conv is not None:
            feature = self.conv(feature)
        predictions = self.box_predictor(feature, [each.proposal_boxes for each in proposals])
        if not self.training:
            instances, _ = self.box_predictor.inference(predictions, proposals)
            return instances, {}
        if self.num_hard_examples:
            predictions, proposals = self._keep_hardest(predictions, proposals)
        return proposals, self.box_predictor.losses(predictions, proposals)

    def _keep_hardest(
        self, predictions: Tuple[Tensor, Tensor], proposals: List[Instances]
    ) -> Tuple[Tuple[Tensor, Tensor], List[Instances]]:
        counts = [len(each) for each in proposals]
        losses = loss_per_region(self.box_predictor, predictions, proposals).split(counts)
        limits = (self.num_hard_examples, self.hard_example_nms_thresh)
        kept = [
            select_hardest(of_image, each.proposal_boxes.tensor, *limits) for of_image, each in zip(losses, proposals)
        ]
        logits, deltas = (
            torch.cat([rows[index] for rows, index in zip(each.split(counts), kept)]) for each in predictions
        )
        return (logits, deltas), [each[index] for each, index in zip(proposals, kept)]


def _only_feature(names: List[str], input_shape: Dict[str, ShapeSpec]) -> str:
    if len(names) != 1 or names[0] not in input_shape:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)!r}; RFCNROIHeads reads one map, whatever a region's "
            f"size: name one of {list(input_shape)}"
        )
    return names[0]


def _build_conv(in_channels: int, channels: int, *, kernel_size: int, norm: Norm) -> Optional[nn.Module]:
    if channels < 0:
        raise ValueError(f"MODEL.RFCN.CONV_DIM is {channels}; give channels, 0 = no convolution")
    check_choice("MODEL.RFCN.CONV_KERNEL", kernel_size, (1, 3))
    if channels == 0:
        return None
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=get_norm(norm, channels),
        activation=nn.ReLU(inplace=True),
    )
    weight_init.c2_msra_fill(conv)
    return conv
