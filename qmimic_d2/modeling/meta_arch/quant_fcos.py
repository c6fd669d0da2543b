"""An FCOS whose backbone features are quantized. Detectron2 itself builds an FCOS from a LazyConfig only."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from qmimic_d2.modeling.attach import quantizer_arguments
from qmimic_d2.modeling.backbone.build import resolve_norm
from qmimic_d2.modeling.meta_arch.attached import WithParts
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.modeling.trunk_adapter import build_trunk_adapter, is_in_trunk

__all__ = ["QuantFCOS"]


@META_ARCH_REGISTRY.register()
class QuantFCOS(WithParts, FCOS):
    """
    Detectron2's FCOS with a quantizer on its backbone's features, as :class:`~qmimic_d2.modeling.QuantRCNN`.

    A config describes it in ``MODEL.FCOS``. FCOS is Tian et al., ICCV 2019 (https://arxiv.org/abs/1904.01355).
    """

    @classmethod
    def from_config(cls, cfg: CfgNode):
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        if is_in_trunk(cfg):
            backbone = build_trunk_adapter(cfg, backbone)
        return {
            "backbone": backbone,
            "head": _build_head(cfg, backbone),
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **quantizer_arguments(cfg),
        }


def _build_head(cfg: CfgNode, backbone: Backbone) -> FCOSHead:
    node = cfg.MODEL.FCOS
    shapes = backbone.output_shape()
    check_features(node.IN_FEATURES, shapes, "MODEL.FCOS.IN_FEATURES")
    if node.NUM_CONVS < 1:
        raise ValueError(f"MODEL.FCOS.NUM_CONVS is {node.NUM_CONVS}; give 1 or more convolutions")
    input_shape = [shapes[name] for name in node.IN_FEATURES]
    return FCOSHead(
        input_shape=input_shape,
        num_classes=node.NUM_CLASSES,
        conv_dims=[input_shape[0].channels] * node.NUM_CONVS,
        norm=resolve_norm("MODEL.FCOS.NORM", node.NORM),
        prior_prob=node.PRIOR_PROB,
    )
