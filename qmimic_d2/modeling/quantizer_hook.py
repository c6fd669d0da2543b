"""The forward hook that quantizes the features of any Detectron2 backbone."""

import logging
from typing import Dict, List, Optional, Sequence

from detectron2.modeling.backbone import FPN
from torch import Tensor, nn

from qmimic_d2.modeling.quantizer import Quantizer

__all__ = ["QuantizerHook", "attach_quantizer", "attached_quantizer"]


class QuantizerHook:
    """
    Replaces the named features of a backbone by their codes.

    It is a forward hook and not a module, so that ``state_dict()`` does not change. ``copy.deepcopy`` and
    ``torch.jit.trace`` keep it. ``torch.jit.script`` cannot, and raises an error.
    """

    def __init__(self, quantizer: Quantizer, features: Sequence[str]):
        self.quantizer = quantizer
        self.features: List[str] = list(features)
        self._handle = None

    def __call__(self, backbone: nn.Module, inputs, output: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return {
            name: self.quantizer(feature) if name in self.features else feature
            for name, feature in output.items()
        }

    @property
    def __name__(self) -> str:
        """
        ``torch.jit.script`` reads this name of every hook that it compiles.

        Raises:
            AttributeError: always; says what to do instead.
        """
        raise AttributeError(
            "torch.jit.script cannot compile the quantizer on the backbone's features. Trace the detector instead: "
            "python -m qmimic_d2 export --format torchscript, or Detectron2's export_model.py with "
            "--export-method tracing. Or export it without the quantizer: --quantizer drop"
        )

    def remove(self) -> None:
        """Detaches the hook; the backbone gives full-precision features again. A second call does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def attached_quantizer(backbone: nn.Module) -> Optional[QuantizerHook]:
    """The hook that quantizes this backbone's features, or None."""
    for hook in backbone._forward_hooks.values():
        if isinstance(hook, QuantizerHook):
            return hook
    return None


def attach_quantizer(backbone: nn.Module, quantizer: Quantizer, features: Sequence[str]) -> QuantizerHook:
    """
    Quantizes features of a backbone from now on. A backbone has one such hook; a new one replaces it.

    Args:
        backbone: a Detectron2 backbone, whose forward returns maps (N, C, H, W) by name.
        quantizer: applied to every named map.
        features: names among ``backbone.output_shape()``.

    Returns:
        The hook, whose ``remove()`` undoes this.

    Raises:
        ValueError: a name is not among the backbone's features.
    """
    check_features(features, backbone.output_shape(), "MODEL.QMIMIC.QUANTIZER.IN_FEATURES")
    warn_of_lost_signs(backbone, quantizer, features)
    hook = QuantizerHook(quantizer, features)
    previous = attached_quantizer(backbone)
    if previous is None:
        hook._handle = backbone.register_forward_hook(hook)
    else:  # at the same place among the hooks, so that later hooks still read codes
        hook._handle, previous._handle = previous._handle, None
        backbone._forward_hooks[hook._handle.id] = hook
    return hook


def warn_of_lost_signs(backbone: nn.Module, quantizer: Quantizer, features: Sequence[str]) -> None:
    """Warns if an unsigned dictionary meets the maps of an FPN."""
    if isinstance(backbone, FPN) and not quantizer.signed:
        logging.getLogger(__name__).warning(
            "The maps %s come from an FPN, which ends in no ReLU: a dictionary without negative codes erases half of "
            "them. Set MODEL.QMIMIC.QUANTIZER.SIGNED True",
            list(features),
        )


def check_features(
    features: Sequence[str], available: Dict[str, object], key: str, of: str = "the backbone"
) -> None:
    """Raises a ValueError that names ``key`` if a feature is not available."""
    unknown = [name for name in features if name not in available]
    if unknown:
        raise ValueError(
            f"{key} names {unknown}, which {of} does not have; it gives {sorted(available)}"
        )
