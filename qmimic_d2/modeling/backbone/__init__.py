"""Tiny backbones: VGG and ResNet whose every channel count is divided by one number.

Importing this package registers, in Detectron2's ``BACKBONE_REGISTRY``:
``build_vgg_backbone``, ``build_vgg_fpn_backbone``, ``build_retinanet_vgg_fpn_backbone``,
``build_divided_resnet_backbone``, ``build_divided_resnet_fpn_backbone`` and
``build_divided_retinanet_resnet_fpn_backbone``. Their keys come from :func:`qmimic_d2.add_qmimic_config`.
"""

from qmimic_d2.modeling.backbone.imagenet_names import convert_torchvision_names
from qmimic_d2.modeling.backbone.resnet import (
    build_divided_resnet_backbone,
    build_divided_resnet_fpn_backbone,
    build_divided_retinanet_resnet_fpn_backbone,
    make_divided_resnet,
)
from qmimic_d2.modeling.backbone.vgg import (
    VGG,
    VGGStage,
    build_retinanet_vgg_fpn_backbone,
    build_vgg_backbone,
    build_vgg_fpn_backbone,
)

__all__ = [
    "VGG",
    "VGGStage",
    "build_divided_resnet_backbone",
    "build_divided_resnet_fpn_backbone",
    "build_divided_retinanet_resnet_fpn_backbone",
    "build_retinanet_vgg_fpn_backbone",
    "build_vgg_backbone",
    "build_vgg_fpn_backbone",
    "convert_torchvision_names",
    "make_divided_resnet",
]
