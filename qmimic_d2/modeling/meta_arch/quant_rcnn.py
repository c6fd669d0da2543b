"""An R-CNN whose backbone features are quantized."""

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.roi_heads import Res5ROIHeads

from qmimic_d2.modeling.attach import quantizer_arguments
from qmimic_d2.modeling.family import named_head_features
from qmimic_d2.modeling.meta_arch.attached import WithParts
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, check_proposal_levels, is_in_trunk

__all__ = ["QuantRCNN"]


@META_ARCH_REGISTRY.register()
class QuantRCNN(WithParts, GeneralizedRCNN):
    """
    Detectron2's R-CNN with a quantizer on its backbone's features: the quantized teacher, the quantization-only
    baseline and the shipped student.

    Its ``state_dict`` has the names of :class:`GeneralizedRCNN`'s. Without a quantizer its results are the same.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode):
        with named_head_features(cfg, "RPN", "ROI_HEADS"):
            args = super().from_config(cfg)
        if is_in_trunk(cfg):
            backbone = build_trunk_adapter(cfg, args["backbone"])
            check_proposal_levels(cfg, backbone)
            args["backbone"] = backbone
            # built again, because they read the wider maps
            args["proposal_generator"] = build_proposal_generator(cfg, backbone.output_shape())
            args["roi_heads"] = build_roi_heads(cfg, backbone.output_shape())
        if isinstance(args["roi_heads"], Res5ROIHeads):
            _check_res5(args["roi_heads"], args["backbone"])
        return {**args, **quantizer_arguments(cfg)}


def _check_res5(heads: Res5ROIHeads, backbone: Backbone) -> None:
    name = heads.in_features[0]
    channels = backbone.output_shape()[name].channels
    wanted = getattr(next(iter(heads.res5)), "in_channels", channels)
    if channels != wanted:
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME is {type(heads).__name__!r}, whose stage res5 reads {wanted} channels, and the "
            f"backbone's {name!r} has {channels}: it has the widths of a ResNet-50 and knows no "
            "MODEL.RESNETS.WIDTH_DIVISOR. Set MODEL.ROI_HEADS.NAME 'StandardROIHeads' and MODEL.ROI_BOX_HEAD.NAME "
            "'FastRCNNConvFCHead'"
        )
