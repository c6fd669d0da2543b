"""A RetinaNet whose backbone features are quantized."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

from qmimic_d2.modeling.attach import quantizer_arguments
from qmimic_d2.modeling.family import named_head_features
from qmimic_d2.modeling.meta_arch.attached import WithParts
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, is_in_trunk

__all__ = ["QuantRetinaNet"]


@META_ARCH_REGISTRY.register()
class QuantRetinaNet(WithParts, RetinaNet):
    """Detectron2's RetinaNet with a quantizer on its backbone's features, as :class:`~qmimic_d2.modeling.QuantRCNN`."""

    @classmethod
    def from_config(cls, cfg: CfgNode):
        with named_head_features(cfg, "RETINANET"):
            args = super().from_config(cfg)
        if is_in_trunk(cfg):
            args["backbone"] = build_trunk_adapter(cfg, args["backbone"])
            shapes = args["backbone"].output_shape()
            # built again, because it reads the wider maps
            args["head"] = RetinaNetHead(cfg, [shapes[name] for name in args["head_in_features"]])
        return {**args, **quantizer_arguments(cfg)}
