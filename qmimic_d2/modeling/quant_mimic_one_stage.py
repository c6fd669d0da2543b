"""One-stage students in training: RetinaNet and FCOS that imitate a frozen, quantized teacher."""

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from qmimic_d2.modeling.mimic_student import MimicStudent
from qmimic_d2.modeling.quant_fcos import QuantFCOS
from qmimic_d2.modeling.quant_retinanet import QuantRetinaNet

__all__ = ["QuantMimicFCOS", "QuantMimicRetinaNet"]


@META_ARCH_REGISTRY.register()
class QuantMimicRetinaNet(MimicStudent, QuantRetinaNet):
    """
    :class:`QuantRetinaNet` with a teacher beside it and ``loss_mimic`` among its losses.

    It proposes and samples no regions, so ``MODEL.QMIMIC.MIMIC.ROI_SOURCE`` has to name others. With
    ``MODEL.QMIMIC.TEACHER.CONFIG_FILE`` "" it is :class:`QuantRetinaNet`.
    """

    head_names = ("head",)

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: of :class:`MimicStudent` and :class:`QuantRetinaNet`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(cfg)
        return {**args, **cls.mimic_arguments(cfg, args["backbone"])}


@META_ARCH_REGISTRY.register()
class QuantMimicFCOS(MimicStudent, QuantFCOS):
    """
    :class:`QuantFCOS` with a teacher beside it and ``loss_mimic`` among its losses.

    As for :class:`QuantMimicRetinaNet`, ``MODEL.QMIMIC.MIMIC.ROI_SOURCE`` has to be named.
    """

    head_names = ("head",)

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: of :class:`MimicStudent` and :class:`QuantFCOS`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(cfg)
        return {**args, **cls.mimic_arguments(cfg, args["backbone"])}
