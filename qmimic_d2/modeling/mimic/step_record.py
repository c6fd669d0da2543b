"""What the mimic sees of one forward pass of a detector."""

from typing import Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmimic_d2.modeling.mimic.region_sources import TrainingRegions

__all__ = ["StepRecord"]


class StepRecord:
    """
    Filled by forward hooks, so that the detector's own forward runs as it is.

    It records between :meth:`begin` and :meth:`clear` only, so that no graph outlives the step.

    Args:
        separates: gradients are taken at several maps, of which one may be computed from another. Where reentrant
            activation checkpoints are between them, which refuse that, the step goes on with views of the maps: a
            view's gradient is that of its readers alone.

    Attributes:
        is_recording: between the two calls.
        maps: the backbone's maps before any quantizer, by name, shape (N, C, H, W).
        regions: what the step knows of.
    """

    def __init__(self, *, separates: bool = False):
        self._separates: Optional[bool] = None if separates else False
        self.clear()

    def begin(self) -> None:
        """Starts to record."""
        self.clear()
        self.is_recording = True

    def clear(self) -> None:
        """Stops to record, and drops what was recorded."""
        self.is_recording = False
        self.maps: Dict[str, Tensor] = {}
        self.regions = TrainingRegions()

    def watch(self, model: nn.Module) -> List[RemovableHandle]:
        """
        Records maps of ``model.backbone``, and regions of ``model.roi_heads`` and ``model.proposal_generator`` where
        they exist.

        The maps are read in front of the quantizer's hook: the mimic compares r of the map as it was before.
        """
        # torch.compile wraps a module; the quantizer's hook may be on the wrapped one
        backbone = getattr(model.backbone, "_orig_mod", model.backbone)
        handles = [backbone.register_forward_hook(self._on_backbone, prepend=True)]
        for name, hook in (("proposal_generator", self._on_proposals), ("roi_heads", self._on_roi_heads)):
            part = getattr(model, name, None)
            if isinstance(part, nn.Module):
                handles.append(part.register_forward_hook(hook))
        return handles

    def _on_backbone(self, backbone: nn.Module, inputs, output) -> Optional[Dict[str, Tensor]]:
        if not self.is_recording:
            return None
        if self._separates is None and torch.is_grad_enabled():
            self._separates = _has_reentrant_checkpoint(list(output.values()))
        views = {name: each.view_as(each) for name, each in output.items()} if self._separates else None
        self.maps = dict(views or output)
        return views

    def _on_proposals(self, proposal_generator: nn.Module, inputs, output) -> None:
        if self.is_recording:
            self.regions.proposals = list(output[0] or ())

    def _on_roi_heads(self, roi_heads: nn.Module, inputs, output) -> None:
        if self.is_recording:
            self.regions.sampled = list(output[0] or ())
            if len(inputs) > 2:  # precomputed proposals come from no generator
                self.regions.proposals = list(inputs[2])


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
