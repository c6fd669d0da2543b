"""
Pooling of feature maps at regions of interest, level by level.

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: channels; H, W: cells of the map.
    P: pooler resolution, in bins.  G: samples per bin and axis.  K: cells per bin and axis.
"""

import functools
import math
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import RoIPool

__all__ = ["POOLER_TYPES", "LevelPooler", "SparseRoIAlign", "sparse_roi_align"]

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
        if self.is_sparse(feature):
            return sparse_roi_align(feature, self.sparse(level, feature, rois))
        return self._poolers[level](feature, rois.to(feature.dtype))

    def is_sparse(self, feature: Tensor) -> bool:
        """Whether a map is pooled by a :class:`SparseRoIAlign`: cheaper on a CPU (benchmarks/README.md)."""
        return (
            self.pooler_type != "ROIPool"
            and feature.device.type == "cpu"
            and feature.dtype in (torch.float32, torch.float64)
        )

    def sparse(self, level: int, feature: Tensor, rois: Tensor) -> "SparseRoIAlign":
        """As :meth:`pool`, the matrix that pools such a map and every other one of its size."""
        num, _, height, width = feature.shape
        pooler = self._poolers[level]
        return SparseRoIAlign(
            rois.to(feature.dtype),
            (num, height, width),
            self.resolution,
            pooler.spatial_scale,
            self.sampling_ratio,
            pooler.aligned,
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


class SparseRoIAlign:
    """
    ROIAlign of regions as a sparse matrix: values and gradients of ``torchvision.ops.roi_align`` to rounding.

    A bin is the same weighted sum of a few cells in every channel::

        pooled[bin, c] = sum_k  weight[bin, k] * map[cell[bin, k], c]

    ROIAlign averages bilinear samples, so a weight is that of the cell's column times that of its row. This sum and its
    transpose, the gradient, are embedding bags. They read and write all channels of a cell at once, where torchvision's
    CPU kernel takes every sample of every channel by itself.

    Args:
        rois: shape (M, 5): index of the image, then (x0, y0, x1, y1) in pixels of the image; the
            regions of one image stand together, images in rising order.
        shape: N, H and W of the maps.
        size: P.
        scale: cells per pixel.
        sampling_ratio: G; 0 = as many as a bin has cells, rounded up.
        aligned: shift by half a pixel, as ROIAlignV2 does; otherwise regions are at least a cell wide.

    Raises:
        ValueError: the regions are out of order, or one belongs to an image that is not there.
    """

    def __init__(
        self,
        rois: Tensor,
        shape: Tuple[int, int, int],
        size: int,
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ):
        num, height, width = shape
        image_of = rois[:, 0].int()
        counts = torch.bincount(image_of, minlength=num)
        if len(counts) > num or (image_of[1:] < image_of[:-1]).any():
            raise ValueError(
                f"SparseRoIAlign: rois[:, 0] must rise from 0 to at most {num - 1}, the last image; "
                "sort the regions by their image"
            )
        boxes = rois[:, 1:].detach().t() * scale - (0.5 if aligned else 0.0)
        extent = boxes[2:] - boxes[:2]
        if not aligned:
            extent = extent.clamp(min=1.0)
        cells, weights = _sampling_weights(boxes[:2], extent, (width, height), size, sampling_ratio)
        (columns, rows), (across, down) = cells.unbind(2), weights.unbind(2)  # (P, K, M)
        rows = (image_of * height + rows) * width
        # Every pair of a row and a column. The regions stand last up to here, where broadcasting is fast.
        cell = (rows[:, None, :, None] + columns[:, None]).flatten(0, 3).t().flatten()
        weight = (down[:, None, :, None] * across[:, None]).flatten(0, 3).t().flatten()
        most = columns.shape[1] ** 2
        if most > 9:  # K is that of the largest region, and the others' further weights are 0
            is_used = weight != 0.0
            offsets = _offsets(is_used.view(-1, most).sum(dim=1))
            cell, weight = cell[is_used], weight[is_used]
        else:
            offsets = torch.arange(0, len(cell) + 1, most, dtype=torch.int32)
        self._by_bin = _SparseRows(cell, weight, offsets)
        self._shape, self._size = shape, size
        self._first_bins = [bins * size * size for bins in [0, *counts.cumsum(0).tolist()]]

    @functools.cached_property
    def _by_cell(self) -> "_SparseRows":
        cell, weight, offsets = self._by_bin
        num_cells = math.prod(self._shape)
        order = cell.argsort(stable=True)
        bin_of = torch.repeat_interleave(offsets.diff())
        counts = torch.bincount(cell, minlength=num_cells)
        return _SparseRows(bin_of.index_select(0, order), weight.index_select(0, order), _offsets(counts))

    def parts(self, most_bins: int) -> Iterator[Tuple[int, int]]:
        """First image and end of every few images: as many as have at most so many bins, but one or more."""
        first, num = 0, self._shape[0]
        for end in range(1, num + 1):
            if end == num or self._first_bins[end + 1] - self._first_bins[first] > most_bins:
                yield first, end
                first = end

    def pool(self, feature: Tensor, first: int = 0, end: Optional[int] = None) -> Tensor:
        """
        Args:
            feature: a map of all images, shape (N, H, W, C), contiguous.
            first, end: the images whose regions are wanted; all by default.

        Returns:
            shape (M of these images, P, P, C).
        """
        bins = (self._first_bins[first], self._first_bins[-1 if end is None else end])
        pooled = self._by_bin.part(*bins).times(feature.flatten(0, 2))
        return pooled.view(-1, self._size, self._size, feature.shape[-1])

    def spread(self, grad: Tensor, first: int = 0, end: Optional[int] = None) -> Tensor:
        """The transpose of :meth:`pool`: the gradient at its result to that at these images' maps, (N, H, W, C)."""
        num, height, width = self._shape
        end = num if end is None else end
        rows = self._by_cell.part(first * height * width, end * height * width, shift=self._first_bins[first])
        return rows.times(grad.flatten(0, 2)).view(end - first, height, width, -1)


class _SparseRows(NamedTuple):
    """
    Rows of a sparse matrix.

    Attributes:
        index: column of each entry, int32.
        weight: of each entry.
        offsets: where each row begins, and the end of the last, int32.
    """

    index: Tensor
    weight: Tensor
    offsets: Tensor

    def part(self, first: int, end: int, shift: int = 0) -> "_SparseRows":
        """The rows from ``first`` up to ``end``, and columns from ``shift`` on."""
        entries = slice(int(self.offsets[first]), int(self.offsets[end]))
        index = self.index[entries]
        offsets = self.offsets[first : end + 1]
        return _SparseRows(
            index - shift if shift else index,
            self.weight[entries],
            offsets - entries.start if entries.start else offsets,
        )

    def times(self, dense: Tensor) -> Tensor:
        """The product with a matrix of shape (columns, C)."""
        return torch.embedding_bag(
            dense, self.index, self.offsets, per_sample_weights=self.weight, include_last_offset=True
        )[0]


def sparse_roi_align(feature: Tensor, matrix: SparseRoIAlign) -> Tensor:
    """
    Args:
        feature: shape (N, C, H, W), as the matrix was made for, float32 or float64.
        matrix: of the regions.

    Returns:
        shape (M, C, P, P); gradients flow to ``feature``. Computed in its dtype under autocast too, as
        torchvision's is.
    """
    pooled = _SparseProduct.apply(feature.permute(0, 2, 3, 1).contiguous(), matrix)
    return pooled.permute(0, 3, 1, 2).contiguous()


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature: Tensor, matrix: SparseRoIAlign) -> Tensor:
        ctx.matrix = matrix
        return matrix.pool(feature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.matrix.spread(grad.contiguous()), None


def _offsets(counts: Tensor) -> Tensor:
    """Where groups of these sizes begin, and the end of the last."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _sampling_weights(
    start: Tensor, extent: Tensor, cells: Sequence[int], size: int, sampling_ratio: int
) -> Tuple[Tensor, Tensor]:
    """
    The cells that a bin averages along each axis.

    Args:
        start, extent: of the regions, in cells, shape (2, M).
        cells: number of cells of each axis, W and H.

    Returns:
        Their indices, int32, and weights, shape (P, K, 2, M).
    """
    if sampling_ratio > 0:
        samples = torch.full_like(extent, sampling_ratio)
    else:
        samples = torch.ceil(extent / size).clamp_(min=0)
    divisor = samples.clamp(min=1)
    is_empty = not len(start[0])
    most = 1 if is_empty else int(divisor.max())
    sample = torch.arange(most, dtype=start.dtype)[:, None, None]
    bins = torch.arange(size, dtype=start.dtype)[:, None, None, None]
    # surplus samples of a region repeat its last one and do not count
    offset = bins + (torch.minimum(sample, divisor - 1) + 0.5) / divisor
    position = start + offset * (extent / size)  # (P, G, 2, M)
    # Samples more than a cell outside the map count as 0, nearer ones as the border's value.
    limit = start.new_tensor(cells)[:, None]
    counted = (position >= -1.0) & (position <= limit) & (sample < samples)
    position = position.clamp_(min=0.0).clamp_(max=limit - 1)
    first = position.amin(dim=1, keepdim=True).floor_()
    width = 2 if is_empty else int((position.amax(dim=1, keepdim=True) - first).max()) + 2
    cell = first + torch.arange(width, dtype=start.dtype)[:, None, None]
    hat = (1.0 - (position[:, :, None] - cell[:, None]).abs_()).clamp_(min=0.0)  # (P, G, K, 2, M)
    weight = (hat * (counted / divisor)[:, :, None]).sum(dim=1)
    return cell.clamp_(max=limit - 1).int(), weight
