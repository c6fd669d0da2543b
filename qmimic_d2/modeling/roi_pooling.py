"""
Pooling of feature maps at regions of interest, level by level.

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: channels.
    P: pooler resolution, in bins.
"""

import math
from typing import Dict, List, Sequence

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import RoIPool

from qmimic_d2.modeling.dense_roi_align import dense_roi_align

# Cells of a map up to which ROIAlign with a gradient is cheaper as matrix products on a CPU;
# benchmarks/step_cost.py measures it.
_DENSE_CELLS = 4096

__all__ = ["POOLER_TYPES", "LevelPooler"]

# Values of MODEL.QMIMIC.MIMIC.POOLER_TYPE.
POOLER_TYPES = ("ROIAlignV2", "ROIAlign", "ROIPool")

# FPN's rule (Lin et al., CVPR 2017, equation 1): a region of 224 x 224 pixels belongs to level 4.
_CANONICAL_BOX_SIZE = 224
_CANONICAL_LEVEL = 4


class LevelPooler:
    """
    Pools maps at regions, each region at its own level, as Detectron2's box head assigns it.

    Unlike :class:`detectron2.modeling.poolers.ROIPooler` it keeps the levels apart, because every
    level has its own adapter, loss and figures.

    Args:
        shapes: stride of every map, by name, finest first when there are several.
        pooler_type: one of :data:`POOLER_TYPES`.
        resolution: P.
        sampling_ratio: samples per bin and axis of ROIAlign, 0 = adaptive.

    Raises:
        ValueError: unknown type, resolution < 1, or several maps whose strides do not double.
    """

    def __init__(
        self, shapes: Dict[str, ShapeSpec], pooler_type: str, resolution: int, sampling_ratio: int
    ):
        if pooler_type not in POOLER_TYPES:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.POOLER_TYPE is {pooler_type!r}; choose one of {list(POOLER_TYPES)}"
            )
        if resolution < 1:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.POOLER_RESOLUTION is {resolution}; give 1 or more bins"
            )
        if sampling_ratio < 0:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.POOLER_SAMPLING_RATIO is {sampling_ratio}; give 0 (adaptive) or more"
            )
        self.pooler_type = pooler_type
        self.resolution = resolution
        self.sampling_ratio = sampling_ratio
        self.strides = [each.stride for each in shapes.values()]
        self._levels = _fpn_levels(list(shapes), self.strides) if len(shapes) > 1 else []
        self._poolers = [self._build(1.0 / stride) for stride in self.strides]

    def _build(self, scale: float) -> torch.nn.Module:
        size = (self.resolution, self.resolution)
        if self.pooler_type == "ROIPool":
            return RoIPool(size, spatial_scale=scale)
        aligned = self.pooler_type == "ROIAlignV2"
        return ROIAlign(size, scale, self.sampling_ratio, aligned=aligned)

    def assign(self, boxes: List[Boxes]) -> List[Tensor]:
        """
        Args:
            boxes: N Boxes in pixels of the input image.

        Returns:
            For every level its regions, shape (M of the level, 5): index of the image, then the box.
        """
        rois = convert_boxes_to_pooler_format(boxes)
        if not self._levels:
            return [rois]
        level_of = assign_boxes_to_levels(
            boxes, self._levels[0], self._levels[-1], _CANONICAL_BOX_SIZE, _CANONICAL_LEVEL
        )
        return [rois[level_of == index] for index in range(len(self._levels))]

    def pool(self, level: int, feature: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            level: index of the level.
            feature: shape (N, C, H, W).
            rois: shape (M, 5), as :meth:`assign` gives them.

        Returns:
            shape (M, C, P, P).
        """
        pooler = self._poolers[level]
        if self._is_cheaper_dense(feature):
            return dense_roi_align(
                feature,
                rois.to(feature.dtype),
                self.resolution,
                pooler.spatial_scale,
                self.sampling_ratio,
                pooler.aligned,
            )
        return pooler(feature, rois.to(feature.dtype))

    def _is_cheaper_dense(self, feature: Tensor) -> bool:
        return (
            self.pooler_type != "ROIPool"
            and feature.device.type == "cpu"
            and feature.dtype in (torch.float32, torch.float64)
            and feature.requires_grad
            and feature.shape[-2] * feature.shape[-1] <= _DENSE_CELLS
        )


def _fpn_levels(names: Sequence[str], strides: Sequence[int]) -> List[int]:
    levels = [math.log2(stride) for stride in strides]
    steps = [levels[0] + index for index in range(len(levels))]
    if levels != steps or levels[0] != int(levels[0]):
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.IN_FEATURES {list(names)} have strides {list(strides)}; several levels "
            "share the regions by size, which takes strides that are powers of two and double from "
            "one map to the next. Order them so, or compare one map"
        )
    return [int(level) for level in levels]
