"""What one training step of a detector computes on its way and the mimic needs."""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from qmimic_d2.modeling.rois import TrainingRegions

__all__ = ["StepRecord"]


class StepRecord:
    """
    Filled by forward hooks, so that Detectron2's own forward runs as it is.

    It records inside a ``with`` block only, and is empty after it, so that no graph outlives the step.

    Attributes:
        is_recording: inside the block.
        maps: the backbone's maps before any quantizer, by name, shape (N, C, H, W).
        regions: what the step knows of.
        box_pooling: what the box head's pooler was given (maps, boxes of each image), and what it returned;
            None where it was not called.
    """

    def __init__(self):
        self.is_recording = False
        self._separates: Optional[bool] = False
        self._clear()

    def _clear(self) -> None:
        self.maps: Dict[str, Tensor] = {}
        self.regions = TrainingRegions()
        self.box_pooling: Optional[Tuple[List[Tensor], List[Boxes], Tensor]] = None

    def __enter__(self) -> "StepRecord":
        self.is_recording = True
        return self

    def __exit__(self, *exc_info) -> None:
        self.is_recording = False
        self._clear()

    def watch_backbone(self, backbone: nn.Module, *, separates: bool = False) -> None:
        """
        Records the maps. In front of the quantizer's hook: the mimic compares r of the map as it was before.

        Args:
            separates: gradients are taken at several maps, of which one may be computed from another. Where reentrant
                activation checkpoints are between them, which refuse that, the step goes on with views of the maps: a
                view's gradient is that of its readers alone.
        """
        self._separates = None if separates else False
        backbone.register_forward_hook(self._on_backbone, prepend=True)

    def watch_roi_heads(self, roi_heads: nn.Module) -> None:
        """Records the regions of an R-CNN, and what its box pooler does, if it has one."""
        roi_heads.register_forward_hook(self._on_roi_heads)
        box_pooler = getattr(roi_heads, "box_pooler", None)
        if isinstance(box_pooler, nn.Module):
            box_pooler.register_forward_hook(self._on_box_pooler)

    def _on_backbone(self, backbone: nn.Module, inputs, output) -> Optional[Dict[str, Tensor]]:
        if not self.is_recording:
            return None
        if self._separates is None and torch.is_grad_enabled():
            self._separates = _has_reentrant_checkpoint(list(output.values()))
        views = {name: each.view_as(each) for name, each in output.items()} if self._separates else None
        self.maps = dict(views or output)
        return views

    def _on_roi_heads(self, roi_heads: nn.Module, inputs, output) -> None:
        if self.is_recording:
            self.regions = TrainingRegions(sampled=list(output[0]), proposals=list(inputs[2]))

    def _on_box_pooler(self, pooler: nn.Module, inputs, output) -> None:
        # a cascade pools once per stage; the first pools the sampled proposals
        if self.is_recording and self.box_pooling is None and len(inputs) == 2:
            self.box_pooling = (*inputs, output)


def _has_reentrant_checkpoint(maps: List[Tensor]) -> bool:
    """Whether a checkpoint of PyTorch or fairscale, which are of one name, is among what the maps were computed by."""
    seen = set()
    waiting = [each.grad_fn for each in maps]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False
