"""
Pooling of feature maps at regions of interest, level by level.

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: channels; H, W: cells of the map.
    P: pooler resolution, in bins.  G: samples per bin and axis.
"""

import math
from typing import Dict, List, Sequence

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import RoIPool

# Cells of a map up to which ROIAlign with a gradient is cheaper as matrix products on a CPU;
# benchmarks/step_cost.py measures it.
_DENSE_CELLS = 4096

__all__ = ["POOLER_TYPES", "LevelPooler", "dense_roi_align"]

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


def dense_roi_align(
    feature: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """
    ROIAlign as two matrix products: the values and gradients of ``torchvision.ops.roi_align`` to rounding.

    ROIAlign averages bilinear samples. Both are separable, so the bins of a region are::

        pooled[c, i, j] = sum_h sum_w  A[i, h] * map[c, h, w] * B[j, w]

    with A (P, H) and B (P, W) the averaged sampling weights of its rows and columns. On a map of a few hundred cells
    these products cost a fraction of torchvision's CPU kernel, which scatters every sample's gradient one by one. On a
    large map the kernel wins, because A and B are mostly zeros.

    Args:
        feature: shape (N, C, H, W).
        rois: shape (M, 5): index of the image, then (x0, y0, x1, y1) in pixels of the image; the
            regions of one image stand together, images in rising order.
        size: P.
        scale: cells per pixel.
        sampling_ratio: G; 0 = as many as a bin has cells, rounded up.
        aligned: shift by half a pixel, as ROIAlignV2 does; otherwise regions are at least a cell wide.

    Returns:
        shape (M, C, P, P); gradients flow to ``feature`` alone. Computed in the dtype of ``feature`` under
        autocast too, as torchvision's is.

    Raises:
        ValueError: the regions are out of order, or one belongs to an image that is not there.
    """
    height, width = feature.shape[-2:]
    boxes = rois[:, 1:].detach() * scale - (0.5 if aligned else 0.0)
    extent = boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        extent = extent.clamp(min=1.0)
    columns = _sampling_weights(boxes[:, 0], extent[:, 0], width, size, sampling_ratio)
    rows = _sampling_weights(boxes[:, 1], extent[:, 1], height, size, sampling_ratio)
    image_of = rois[:, 0].long()
    counts = torch.bincount(image_of, minlength=len(feature)).tolist()
    if len(counts) > len(feature) or (image_of[1:] < image_of[:-1]).any():
        raise ValueError(
            f"dense_roi_align: rois[:, 0] must rise from 0 to at most {len(feature) - 1}, the last image; "
            "sort the regions by their image"
        )
    pooled: List[Tensor] = []
    with torch.autocast(feature.device.type, enabled=False):
        for image, image_rows, image_columns in zip(feature, rows.split(counts), columns.split(counts)):
            pooled.append(_pool_image(image, image_rows, image_columns))
    return torch.cat(pooled).contiguous()


def _pool_image(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(C, H, W), (R, P, H) and (R, P, W) to (R, C, P, P)."""
    channels, height, width = image.shape
    if width > height:  # the longer axis first, which leaves the smaller tensor between the products
        return _pool_image(image.transpose(1, 2), columns, rows).transpose(2, 3)
    regions, size, _ = rows.shape
    by_row = rows.reshape(-1, height) @ image.transpose(0, 1).reshape(height, -1)
    by_row = by_row.view(regions, size * channels, width)
    return (by_row @ columns.transpose(1, 2)).view(regions, size, channels, size).transpose(1, 2)


def _sampling_weights(
    start: Tensor, extent: Tensor, cells: int, size: int, sampling_ratio: int
) -> Tensor:
    """
    Weight of every cell in every bin along one axis.

    Args:
        start, extent: of the regions, in cells, shape (M,).
        cells: H or W.

    Returns:
        shape (M, P, cells).
    """
    if sampling_ratio > 0:
        samples = torch.full_like(extent, sampling_ratio)
    else:
        samples = torch.ceil(extent / size)
    most = int(samples.max().clamp(min=1)) if len(samples) else 1
    sample = torch.arange(most, device=start.device, dtype=start.dtype)
    bins = torch.arange(size, device=start.device, dtype=start.dtype)
    divisor = samples.clamp(min=1)
    offset = bins[None, :, None] + ((sample + 0.5) / divisor[:, None])[:, None, :]
    position = start[:, None, None] + offset * (extent / size)[:, None, None]  # (M, P, G)
    # Samples more than a cell outside the map count as 0, nearer ones as the border's value.
    counted = (position >= -1.0) & (position <= cells) & (sample < samples[:, None])[:, None, :]
    position = position.clamp(min=0.0, max=cells - 1)
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    hat = (1.0 - (position[..., None] - cell).abs_()).clamp_(min=0.0)  # (M, P, G, cells)
    weight = counted.to(start.dtype) / divisor[:, None, None]
    return (hat * weight[..., None]).sum(dim=2)
