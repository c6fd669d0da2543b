"""An R-CNN whose backbone features are quantized."""

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)

from qmimic_d2.modeling.head_features import named_head_features
from qmimic_d2.modeling.quantized_detector import QuantizedDetector
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, is_in_trunk

__all__ = ["QuantRCNN"]


@META_ARCH_REGISTRY.register()
class QuantRCNN(QuantizedDetector, GeneralizedRCNN):
    """
    Detectron2's R-CNN with a quantizer on its backbone's features, and nothing else.

    The quantized teacher, the quantization-only baseline and the shipped student. Its ``state_dict``
    has the names of :class:`GeneralizedRCNN`'s. Without a quantizer it is that class to the last bit.
    """

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: of :class:`QuantizedDetector` and :class:`GeneralizedRCNN`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        with named_head_features(cfg, "RPN", "ROI_HEADS"):
            args = super().from_config(cfg)
        if is_in_trunk(cfg):
            backbone = build_trunk_adapter(cfg, args["backbone"])
            args["backbone"] = backbone
            # these read the wider maps
            args["proposal_generator"] = build_proposal_generator(cfg, backbone.output_shape())
            args["roi_heads"] = build_roi_heads(cfg, backbone.output_shape())
        return {**args, **cls.quantizer_arguments(cfg)}
