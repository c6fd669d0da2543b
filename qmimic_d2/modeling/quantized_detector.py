"""A detector whose backbone features are quantized: what every meta-architecture of this project shares."""

from typing import Dict, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from torch import nn

from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.quantizer import Quantizer, build_quantizer
from qmimic_d2.modeling.quantizer_hook import attach_quantizer

__all__ = ["QuantizedDetector"]

# Values that MODEL.QMIMIC.QUANTIZER.STUDENT_AT may hold.
_STUDENT_PLACES = ("features", "mimic")


class QuantizedDetector(nn.Module):
    """
    Puts a quantizer on the backbone of the detector class it stands in front of, and nothing else.

    ``state_dict`` keeps that class's names. Without a quantizer it is that class to the last bit.

    A subclass is ``class X(QuantizedDetector, Detector)``; its ``from_config`` adds :meth:`quantizer_arguments` to the
    detector's.
    """

    def __init__(
        self,
        *,
        quantizer: Optional[Quantizer] = None,
        quantized_features: Sequence[str] = (),
        **kwargs,
    ):
        """
        Args:
            quantizer: put on the named features, so that everything behind the backbone reads codes;
                None for full-precision features.
            quantized_features: names among the backbone's outputs.
            kwargs: of the detector class.

        Raises:
            ValueError: a name is not among the backbone's outputs.
        """
        super().__init__(**kwargs)
        if quantizer is not None:
            attach_quantizer(self.backbone, quantizer, quantized_features)

    @staticmethod
    def quantizer_arguments(cfg: CfgNode) -> Dict:
        """The arguments of ``__init__`` that a config describes."""
        quantizer = build_quantizer(cfg)
        return {
            "quantizer": quantizer if "features" in _student_places(cfg) else None,
            "quantized_features": tuple(cfg.MODEL.QMIMIC.QUANTIZER.IN_FEATURES or head_features(cfg)),
        }


def _student_places(cfg: CfgNode) -> Tuple[str, ...]:
    places = cfg.MODEL.QMIMIC.QUANTIZER.STUDENT_AT
    unknown = [place for place in places if place not in _STUDENT_PLACES]
    if unknown:
        raise ValueError(
            f"MODEL.QMIMIC.QUANTIZER.STUDENT_AT is {places!r}; it may hold {list(_STUDENT_PLACES)}, and [] "
            "stands for neither"
        )
    return tuple(places)
