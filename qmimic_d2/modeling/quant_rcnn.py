"""An R-CNN whose backbone features are quantized."""

from typing import Optional, Sequence, Tuple

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)

from qmimic_d2.modeling.quantizer import Quantizer, build_quantizer
from qmimic_d2.modeling.quantizer_hook import attach_quantizer
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, is_in_trunk

__all__ = ["QuantRCNN"]

# Values that MODEL.QMIMIC.QUANTIZER.STUDENT_AT may hold.
_STUDENT_PLACES = ("features", "mimic")


@META_ARCH_REGISTRY.register()
class QuantRCNN(GeneralizedRCNN):
    """
    Detectron2's R-CNN with a quantizer on its backbone's features, and nothing else.

    The quantized teacher, the quantization-only baseline and the shipped student. Its ``state_dict``
    has the names of :class:`GeneralizedRCNN`'s. Without a quantizer it is that class to the last bit.
    """

    @configurable
    def __init__(
        self,
        *,
        quantizer: Optional[Quantizer] = None,
        quantized_features: Sequence[str] = (),
        **kwargs,
    ):
        """
        Args:
            quantizer: put on the named features, so that proposal generator and RoI heads read codes;
                None for full-precision features.
            quantized_features: names among the backbone's outputs.
            kwargs: of :class:`GeneralizedRCNN`.

        Raises:
            ValueError: a name is not among the backbone's outputs.
        """
        super().__init__(**kwargs)
        if quantizer is not None:
            attach_quantizer(self.backbone, quantizer, quantized_features)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(cfg)
        if is_in_trunk(cfg):
            backbone = build_trunk_adapter(cfg, args["backbone"])
            args["backbone"] = backbone
            # these read the wider maps
            args["proposal_generator"] = build_proposal_generator(cfg, backbone.output_shape())
            args["roi_heads"] = build_roi_heads(cfg, backbone.output_shape())
        quantizer = build_quantizer(cfg)
        args["quantizer"] = quantizer if "features" in _student_places(cfg) else None
        node = cfg.MODEL.QMIMIC.QUANTIZER
        args["quantized_features"] = tuple(node.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES)
        return args


def _student_places(cfg: CfgNode) -> Tuple[str, ...]:
    places = cfg.MODEL.QMIMIC.QUANTIZER.STUDENT_AT
    unknown = [place for place in places if place not in _STUDENT_PLACES]
    if unknown:
        raise ValueError(
            f"MODEL.QMIMIC.QUANTIZER.STUDENT_AT is {places!r}; it may hold {list(_STUDENT_PLACES)}, and [] "
            "stands for neither"
        )
    return tuple(places)
