"""An R-CNN whose backbone features are quantized."""

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.roi_heads import Res5ROIHeads

from qmimic_d2.modeling.attach import attach_parts, quantizer_arguments
from qmimic_d2.modeling.family import named_head_features
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, check_proposal_levels, is_in_trunk

__all__ = ["QuantRCNN"]


@META_ARCH_REGISTRY.register()
class QuantRCNN(GeneralizedRCNN):
    """
    Detectron2's R-CNN with a quantizer on its backbone's features: the quantized teacher, the quantization-only
    baseline and the shipped student.

    Its ``state_dict`` has the names of :class:`GeneralizedRCNN`'s. Without a quantizer its results are the same.
    """

    @configurable
    def __init__(self, *, quantizer=None, quantized_features=(), mimic=None, **kwargs):
        """
        Args:
            quantizer, quantized_features, mimic: see :func:`qmimic_d2.modeling.attach.attach_parts`.
            kwargs: of :class:`GeneralizedRCNN`.

        Raises:
            ValueError: as these do, or ``Res5ROIHeads`` has a stage of other widths than the backbone.
        """
        super().__init__(**kwargs)
        if isinstance(self.roi_heads, Res5ROIHeads):
            self._check_res5(self.roi_heads)
        attach_parts(self, quantizer=quantizer, quantized_features=quantized_features, mimic=mimic)

    def _check_res5(self, heads: Res5ROIHeads) -> None:
        name = heads.in_features[0]
        channels = self.backbone.output_shape()[name].channels
        wanted = getattr(next(iter(heads.res5)), "in_channels", channels)
        if channels != wanted:
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME is {type(heads).__name__!r}, whose stage res5 reads {wanted} channels, and the "
                f"backbone's {name!r} has {channels}: it has the widths of a ResNet-50 and knows no "
                "MODEL.RESNETS.WIDTH_DIVISOR. Set MODEL.ROI_HEADS.NAME 'StandardROIHeads' and MODEL.ROI_BOX_HEAD.NAME "
                "'FastRCNNConvFCHead'"
            )

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
        return {**args, **quantizer_arguments(cfg)}
