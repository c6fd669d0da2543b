"""Takes the gradients of a student's detection and mimic losses, and says where that is impossible."""

import logging
from typing import Dict, List, Optional, Sequence

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from qmimic_d2.diagnostics.gradient_share import GradientShare, averaged, gradient_share, summed

__all__ = ["GradientMeter"]

# Of torch.distributed.fsdp, which only its users import: the wrapper, and what fully_shard makes of a module.
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}

_NEEDS_MAP = "MODEL.QMIMIC.MIMIC.SCHEDULE is 'balanced', which needs the gradient at the student's compared maps"
_OTHERWISE = "set MODEL.QMIMIC.MIMIC.SCHEDULE 'warmup' or 'constant' with NORMALIZE_BY 'target'"

_NOT_TWICE = (
    "modules in reentrant activation checkpoints (use_reentrant=False has no such limit) or under torch.compile cannot "
    "be differentiated inside the forward pass"
)

_FROZEN = (
    "%s require no gradient, because the layers up to them are frozen, or run in a reentrant activation checkpoint "
    "whose inputs require none. Freeze fewer (MODEL.BACKBONE.FREEZE_AT, MODEL.VGG.FREEZE_AT) or compare other maps "
    "(MODEL.QMIMIC.MIMIC.IN_FEATURES)"
)


class GradientMeter:
    """
    Takes the gradients of the detection and the mimic losses on the graph of the training's own forward pass.

    There are two places: "map", the student's compared maps, and "backbone", the trainable parameters of the backbone.
    Tensors that require no gradient do not count. If PyTorch cannot give the gradient at a place, a warning names the
    place, and later measurements leave it out.
    """

    def __init__(self):
        self._places = ["map", "backbone"]
        self._has_warned_of_frozen = False

    def measure(
        self,
        model: nn.Module,
        maps: Dict[str, Tensor],
        detection: Dict[str, Tensor],
        mimic: Dict[str, Tensor],
        *,
        writes: bool,
        balances: bool,
    ) -> Dict[str, GradientShare]:
        """
        Args:
            model: the student, with a ``backbone``.
            maps: its compared maps, by name.
            detection, mimic: losses of one step, by name.
            writes: every place is wanted.
            balances: the place "map" is wanted, because the weight depends on it.

        Returns:
            By place, the mean of all processes; without places that cannot be measured.

        Raises:
            ValueError: ``balances``, and the place "map" cannot be measured; says why, and what to set.
        """
        # a balanced weight needs "map" even after a warning: then an error says why it cannot be measured
        measured = self._places if writes else []
        wanted = [place for place in ("map", "backbone") if place in measured or balances and place == "map"]
        if not wanted:
            return {}
        sharded = _sharded_parts(model)
        if sharded:
            return self._give_up(
                wanted,
                balances,
                f"FSDP shards {sharded}, parts of the model, and frees their parameters after the first of two "
                "backward passes. Shard the model as a whole",
            )
        tensors = {
            "map": [each for each in maps.values() if each.requires_grad],
            "backbone": [each for each in model.backbone.parameters() if each.requires_grad],
        }
        wanted = [place for place in wanted if tensors[place]]
        while wanted:
            try:
                shares = gradient_share(summed(detection), summed(mimic), [tensors[place] for place in wanted])
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = f"{_NOT_TWICE}. PyTorch says: {str(error).splitlines()[0]}"
                self._give_up(wanted[-1:], balances, reason, error)
                wanted.pop()
            else:
                return dict(zip(wanted, averaged(shares) if comm.get_world_size() > 1 else shares))
        return {}

    def check_frozen(self, maps: Dict[str, Tensor], *, balances: bool) -> None:
        """
        Warns once if no gradient reaches a compared map: its mimic then trains the adapter alone.

        Args:
            maps: the compared maps of a step, by name.
            balances: whether the weight is a balanced one.

        Raises:
            ValueError: ``balances``, and no gradient reaches any of the maps.
        """
        frozen = [name for name, each in maps.items() if not each.requires_grad]
        if balances and len(frozen) == len(maps):
            raise ValueError(f"{_NEEDS_MAP}: {_FROZEN % frozen}")
        if frozen and not self._has_warned_of_frozen:
            self._has_warned_of_frozen = True
            logging.getLogger(__name__).warning(
                "The mimic teaches the student nothing at some of its compared maps: %s", _FROZEN % frozen
            )

    def _give_up(
        self, places: Sequence[str], balances: bool, reason: str, cause: Optional[Exception] = None
    ) -> Dict[str, GradientShare]:
        if balances and "map" in places:
            raise ValueError(f"{_NEEDS_MAP}, which cannot be taken here: {reason}; or {_OTHERWISE}") from cause
        self._places = [place for place in self._places if place not in places]
        logging.getLogger(__name__).warning(
            "The figures qmimic/grad_*_%s of MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD are left out from now on: %s",
            " and qmimic/grad_*_".join(places),
            reason,
        )
        return {}


def _sharded_parts(model: nn.Module) -> List[str]:
    """Names of the modules below the model that FSDP shards by themselves."""
    return [
        name
        for name, module in model.named_modules()
        if name and any(each.__name__ in _SHARDED for each in type(module).__mro__)
    ]
