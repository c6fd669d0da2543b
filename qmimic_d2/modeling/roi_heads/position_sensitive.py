"""
Position-sensitive pooling of score maps (R-FCN, Dai et al., NeurIPS 2016, arXiv 1605.06409, equation 1).

Shape letters:
    N: number of images.
    M: number of regions of all images.
    C: values per region, such as classes.
    k: bins along each side of a region.
"""

from typing import List

import torch
from detectron2.layers import shapes_to_tensor
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import ps_roi_align, ps_roi_pool

from qmimic_d2.modeling.backbone.build import check_choice

__all__ = ["POOLER_TYPES", "PositionSensitivePooler"]

# Values of MODEL.RFCN.POOLER_TYPE.
POOLER_TYPES = ("PSROIPool", "PSROIAlign")


class PositionSensitivePooler(nn.Module):
    """
    Cuts every region into k x k bins. Each bin reads its own score maps.

    Channels are ordered by value, then row of the bin, then its column: bin (i, j) of value c reads channel
    (c k + i) k + j.

    Two poolings, both of the scaled box ``b = box / stride``, whose cell (y, x) covers [y, y + 1) x [x, x + 1):

    - "PSROIPool", the paper's equation 1. ``b`` ends where the map ends, and is rounded to whole cells, halves
      away from zero, to at least 1 x 1; bin i holds the rows ``floor(i h / k)`` to ``ceil((i + 1) h / k) - 1``
      of its h rows; its value is their average, and 0 for a bin outside of the map. torchvision's operator
      leaves out the map's last row and column, and beyond them its gradient does not fit its value: both are
      corrected here.
    - "PSROIAlign" (Light-Head R-CNN, arXiv 1711.07264). Nothing is rounded: a bin averages
      ``sampling_ratio``\\ :sup:`2` bilinear samples. torchvision's operator shifts ``b`` by half a cell, so that
      it measures from the cells' centres, as Detectron2's "ROIAlignV2" does (and its "ROIAlign" does not).
      Samples more than one cell outside of the map count as 0.
    """

    def __init__(self, *, num_bins: int, stride: int, pooler_type: str = "PSROIPool", sampling_ratio: int = 2):
        """
        Args:
            num_bins: k.
            stride: of the score maps, in pixels of the input image.
            pooler_type: one of :data:`POOLER_TYPES`.
            sampling_ratio: samples per bin and axis of "PSROIAlign".

        Raises:
            ValueError: an option is unknown or out of range.
        """
        super().__init__()
        check_choice("MODEL.RFCN.POOLER_TYPE", pooler_type, POOLER_TYPES)
        if num_bins < 1:
            raise ValueError(f"MODEL.RFCN.NUM_BINS is {num_bins}; give 1 or more bins per side of a region")
        if sampling_ratio < 1:
            # torchvision's adaptive number, 0, gives NaN for a region without area
            raise ValueError(f"MODEL.RFCN.SAMPLING_RATIO is {sampling_ratio}; give 1 or more samples per bin and axis")
        self.num_bins = num_bins
        self.stride = stride
        self.pooler_type = pooler_type
        self.sampling_ratio = sampling_ratio

    def forward(self, maps: Tensor, boxes: List[Boxes]) -> Tensor:
        """
        Args:
            maps: score maps, shape (N, C k k, H, W). Half precision is pooled in float32.
            boxes: N Boxes in pixels of the input image.

        Returns:
            shape (M, C, k, k), regions in the order of their images.
        """
        if maps.dtype in (torch.float16, torch.bfloat16):
            maps = maps.float()
        rois = convert_boxes_to_pooler_format(boxes).to(maps.dtype)
        if self.pooler_type == "PSROIAlign":
            return ps_roi_align(maps, rois, self.num_bins, 1.0 / self.stride, self.sampling_ratio)
        return self._pool_whole_cells(maps, rois)

    def _pool_whole_cells(self, maps: Tensor, rois: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        ends = shapes_to_tensor([width, height, width, height], maps.device) * self.stride
        rois = torch.cat([rois[:, :1], torch.minimum(rois[:, 1:], ends.to(rois.dtype))], dim=1)
        # The operator ends every bin at H - 1 and W - 1 at the latest, so it never reads this padding.
        return ps_roi_pool(F.pad(maps, (0, 1, 0, 1)), rois, self.num_bins, 1.0 / self.stride)

    def extra_repr(self) -> str:
        return f"{self.pooler_type}, num_bins={self.num_bins}, stride={self.stride}"
