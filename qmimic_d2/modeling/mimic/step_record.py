"""What the mimic sees of one forward pass of a detector, and whether its maps are those of the step's images."""

from typing import Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmimic_d2.modeling.mimic.region_sources import ONE_MAP_PER_IMAGE, TrainingRegions

__all__ = ["StepRecord", "check_maps", "named"]


class StepRecord:
    """
    Filled by forward hooks, so that the detector's own forward runs as it is.

    It records between :meth:`begin` and :meth:`clear` only, so that no graph outlives the step.

    Args:
        separates: whether gradients are taken at several maps. One map may be computed from another, and a reentrant
            activation checkpoint between the two refuses that. Then the rest of the step reads views of the maps: a
            view's gradient comes from its readers alone.

    Attributes:
        maps: the backbone's maps before any quantizer, by name, shape (N, C, H, W).
        regions: of the step.
    """

    def __init__(self, *, separates: bool = False):
        self._separates: Optional[bool] = None if separates else False
        self.clear()

    def begin(self) -> None:
        """Starts recording."""
        self.clear()
        self.is_recording = True

    def clear(self) -> None:
        """Stops recording, and drops what was recorded."""
        self.is_recording = False
        self.maps: Dict[str, Tensor] = {}
        self.regions = TrainingRegions()

    def watch(self, model: nn.Module) -> List[RemovableHandle]:
        """
        Records maps of ``model.backbone``, and regions of ``model.roi_heads`` and ``model.proposal_generator`` if they
        exist. The maps are read before the quantizer's hook changes them.
        """
        # torch.compile wraps the backbone; the quantizer's hook may be on the module inside
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
            if len(inputs) > 2:  # precomputed proposals do not come from a generator
                self.regions.proposals = list(inputs[2])


def check_maps(maps_of: Dict[str, Dict[str, Tensor]], num_images: int) -> None:
    """
    Args:
        maps_of: compared maps of shape (N, C, H, W), by name; those of "student", of "teacher" or of both.
        num_images: N, of the boxes or of the input.

    Raises:
        ValueError: a map covers another number of images; names every map and its number.
    """
    counts = {
        f"the {whose}'s map {name!r}": len(each) for whose, maps in maps_of.items() for name, each in maps.items()
    }
    if any(count != num_images for count in counts.values()):
        covered = ", ".join(f"{what} covers {count}" for what, count in counts.items())
        raise ValueError(f"boxes and sizes of {num_images} images do not fit the maps: {covered}. {ONE_MAP_PER_IMAGE}")


def named(maps: Dict[str, Tensor], names: Iterable[str]) -> Dict[str, Tensor]:
    """
    Returns:
        The maps of these names.

    Raises:
        ValueError: one of them is not there.
    """
    missing = [name for name in names if name not in maps]
    if missing:
        raise ValueError(
            f"the backbone gave no map {missing} in this step, but {sorted(maps)}: the mimic reads the student's maps "
            "in a forward hook of model.backbone, which has to be called in every training step"
        )
    return {name: maps[name] for name in names}


def _has_reentrant_checkpoint(maps: List[Tensor]) -> bool:
    """Whether the graph of the maps has a reentrant checkpoint. PyTorch and fairscale give its node the same name."""
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
