"""
ROIAlign as two matrix products, for small maps on a CPU.

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: channels; H, W: cells of the map.
    P: bins per axis.  G: samples per bin and axis.

ROIAlign averages bilinear samples. Both are separable, so the bins of a region are

    pooled[c, i, j] = sum_h sum_w  A[i, h] * map[c, h, w] * B[j, w]

with A (P, H) and B (P, W) the averaged sampling weights of its rows and columns. On a map of a few
hundred cells these products, and above all their gradients, cost a fraction of torchvision's CPU kernel,
which scatters every sample's gradient one by one; on a large map the kernel wins, because A and B are
mostly zeros there.
"""

from typing import List

import torch
from torch import Tensor

__all__ = ["dense_roi_align"]


def dense_roi_align(
    feature: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """
    The values and gradients of ``torchvision.ops.roi_align`` to rounding.

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
