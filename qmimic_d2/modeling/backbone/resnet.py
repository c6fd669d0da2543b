"""
ResNet with every channel count divided by one number, made of Detectron2's own blocks.

Detectron2's ``build_resnet_backbone`` fixes the widths of ResNet-18 and ResNet-34, so this file calls
``ResNet.make_stage`` itself. Module and parameter names are Detectron2's.
"""

import logging
from typing import Any, Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet

from qmimic_d2.modeling.backbone.build import (
    build_fpn,
    check_choice,
    check_out_features,
    check_stage_strides,
    divide_width,
    resolve_norm,
)
from qmimic_d2.modeling.backbone.convolution import check_conv, replace_conv3x3

logger = logging.getLogger(__name__)

_BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_BASIC_DEPTHS = (18, 34)
_FEATURE_NAMES = ("stem", "res2", "res3", "res4", "res5")
_NUM_STAGES = 4

# Default of MODEL.RESNETS.RES2_OUT_CHANNELS, which fits bottleneck blocks; and the width of res2 in a ResNet-18 or
# ResNet-34.
_BOTTLENECK_RES2_CHANNELS = 256
_BASIC_RES2_CHANNELS = 64


def make_divided_resnet(
    *,
    in_channels: int = 3,
    depth: int = 18,
    width_divisor: int = 1,
    norm: str = "BN",
    stage_strides: Sequence[int] = (1, 2, 2, 2),
    out_features: Sequence[str] = ("res5",),
    stem_out_channels: int = 64,
    res2_out_channels: int = 256,
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
    res5_dilation: int = 1,
    freeze_at: int = 0,
    conv: str = "plain",
    conv_groups: int = 2,
) -> ResNet:
    """
    A ResNet with every channel count divided; ``depth=18, width_divisor=16`` is ResNet18-1-16.

    ResNet18-1-16 is the Pascal VOC student of the Quantization Mimic paper (arXiv 1805.02152).

    Args:
        in_channels: channels of the input image.
        depth: 18, 34 or 50.
        width_divisor: divides every channel count below.
        norm: "", "BN", "SyncBN", "FrozenBN" or "GN" (groups as in ``build.num_norm_groups``).
        stage_strides: of the first block of res2, res3, res4, res5; the stem has stride 4.
        out_features: among "stem", "res2", ..., "res5". Later stages are not built.
        stem_out_channels: undivided width of the stem.
        res2_out_channels: undivided width of res2's output; each later stage doubles it. ResNet-18
            and ResNet-34 have 64 there; 256, Detectron2's default, means 64 for them.
        num_groups: groups of the bottleneck's 3x3 convolution; 1 for depth 18 and 34.
        width_per_group: undivided width of one such group in res2.
        stride_in_1x1: whether a bottleneck's stride is in its first 1x1 convolution (MSRA's weights) or in its 3x3
            convolution (torchvision's weights).
        res5_dilation: 1 or 2; 2 dilates res5 and sets its stride to 1. 1 for depth 18 and 34.
        freeze_at: 1 freezes the stem, 2 the stem and res2, and so on.
        conv: kind of every 3x3 convolution after the stem, one of ``convolution.CONVS``.
        conv_groups: groups of the kind "group".

    Raises:
        ValueError: an argument is not among its options or does not fit the others; names its key.
    """
    key = "MODEL.RESNETS."
    check_choice(key + "DEPTH", depth, tuple(_BLOCKS_PER_STAGE))
    check_choice(key + "RES5_DILATION", res5_dilation, (1, 2))
    strides = check_stage_strides(key + "STAGE_STRIDES", stage_strides, _NUM_STAGES)
    check_conv("MODEL.RESNETS", conv, conv_groups)
    if conv != "plain":
        check_choice(f"With {key}CONV {conv!r}, {key}NUM_GROUPS", num_groups, (1,))
    out_features = check_out_features(key + "OUT_FEATURES", out_features, _FEATURE_NAMES)
    resolved_norm = resolve_norm(key + "NORM", norm)
    if depth in _BASIC_DEPTHS:
        _check_basic_depth(depth, num_groups, res5_dilation, res2_out_channels)
        res2_out_channels = _BASIC_RES2_CHANNELS

    def divided(channels: int) -> int:
        return divide_width(channels, width_divisor, key=key + "WIDTH_DIVISOR")

    stem = BasicStem(in_channels=in_channels, out_channels=divided(stem_out_channels), norm=resolved_norm)
    stages: List[List[CNNBlockBase]] = []
    block_in = stem.out_channels
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        dilation = res5_dilation if i == _NUM_STAGES - 1 else 1
        stride = strides[i] if dilation == 1 else 1
        block_out = divided(res2_out_channels * 2**i)
        if stride > 1 and block_in == block_out:
            raise ValueError(
                f"{key}STAGE_STRIDES is {list(strides)}, but res{i + 2} has as many channels in as "
                f"out ({block_out}), so its first block has no projection on its shortcut and "
                f"cannot have stride {stride}. Set that entry to 1."
            )
        arguments: Dict[str, Any] = {
            "num_blocks": num_blocks,
            "stride_per_block": [stride] + [1] * (num_blocks - 1),
            "in_channels": block_in,
            "out_channels": block_out,
            "norm": resolved_norm,
        }
        if depth in _BASIC_DEPTHS:
            arguments["block_class"] = BasicBlock
        else:
            bottleneck = divided(num_groups * width_per_group * 2**i)
            if bottleneck % num_groups != 0:
                raise ValueError(
                    f"{key}NUM_GROUPS is {num_groups}, which does not divide the {bottleneck} "
                    f"channels that {key}WIDTH_DIVISOR {width_divisor} leaves in res{i + 2}'s "
                    f"bottleneck; use fewer groups or a smaller divisor."
                )
            arguments.update(
                block_class=BottleneckBlock,
                bottleneck_channels=bottleneck,
                stride_in_1x1=stride_in_1x1,
                dilation=dilation,
                num_groups=num_groups,
            )
        stages.append(ResNet.make_stage(**arguments))
        if conv != "plain":
            for block in stages[-1]:
                replace_conv3x3(block, node="MODEL.RESNETS", conv=conv, groups=conv_groups, norm=resolved_norm)
        block_in = block_out
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


def _check_basic_depth(depth: int, num_groups: int, res5_dilation: int, res2_out_channels: int) -> None:
    """Raises a ValueError if ResNet-18 or ResNet-34 has a setting of bottleneck blocks."""
    for key, value, options in (
        ("NUM_GROUPS", num_groups, (1,)),
        ("RES5_DILATION", res5_dilation, (1,)),
        ("RES2_OUT_CHANNELS", res2_out_channels, (_BASIC_RES2_CHANNELS, _BOTTLENECK_RES2_CHANNELS)),
    ):
        check_choice(f"With MODEL.RESNETS.DEPTH {depth}, MODEL.RESNETS.{key}", value, options)


@BACKBONE_REGISTRY.register()
def build_divided_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    A divided ResNet from ``MODEL.RESNETS`` and ``MODEL.BACKBONE.FREEZE_AT``.

    With ``WIDTH_DIVISOR`` 1 and the default ``STAGE_STRIDES`` it is the network of Detectron2's
    ``build_resnet_backbone``, but ResNet-18 and ResNet-34 need no ``RES2_OUT_CHANNELS 64``. torchvision's weights need
    ``STRIDE_IN_1X1 False``; for their preprocessing see ``imagenet_names.py``.

    Raises:
        ValueError: see :func:`make_divided_resnet`; also if ``DEFORM_ON_PER_STAGE`` is on.
    """
    node = cfg.MODEL.RESNETS
    if any(node.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {node.DEFORM_ON_PER_STAGE}, but the divided "
            f"ResNet has no deformable convolution; set all four to False."
        )
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if node.WIDTH_DIVISOR > 1:
        _warn_if_untrained_parts_are_fixed(node.WIDTH_DIVISOR, freeze_at, node.NORM)
    return make_divided_resnet(
        in_channels=input_shape.channels,
        depth=node.DEPTH,
        width_divisor=node.WIDTH_DIVISOR,
        norm=node.NORM,
        stage_strides=node.STAGE_STRIDES,
        out_features=node.OUT_FEATURES,
        stem_out_channels=node.STEM_OUT_CHANNELS,
        res2_out_channels=node.RES2_OUT_CHANNELS,
        num_groups=node.NUM_GROUPS,
        width_per_group=node.WIDTH_PER_GROUP,
        stride_in_1x1=node.STRIDE_IN_1X1,
        res5_dilation=node.RES5_DILATION,
        freeze_at=freeze_at,
        conv=node.CONV,
        conv_groups=node.CONV_GROUPS,
    )


def _warn_if_untrained_parts_are_fixed(width_divisor: int, freeze_at: int, norm: str) -> None:
    # Detectron2's defaults (FREEZE_AT 2, FrozenBN) are made for ImageNet weights. Without them they train, but badly.
    if freeze_at > 0:
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT is %d and MODEL.RESNETS.WIDTH_DIVISOR is %d: unless trained "
            "weights of this divided network are loaded, random weights are frozen. "
            "Set MODEL.BACKBONE.FREEZE_AT 0 to train it from scratch.",
            freeze_at,
            width_divisor,
        )
    if norm == "FrozenBN":
        logger.warning(
            "MODEL.RESNETS.NORM is 'FrozenBN' and MODEL.RESNETS.WIDTH_DIVISOR is %d: unless "
            "trained weights of this divided network are loaded, nothing is normalized. "
            "Set MODEL.RESNETS.NORM 'BN' to train it from scratch.",
            width_divisor,
        )


@BACKBONE_REGISTRY.register()
def build_divided_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Detectron2's FPN over a divided ResNet, from ``MODEL.RESNETS`` and ``MODEL.FPN``.

    Errors are those of :func:`build_divided_resnet_backbone` and ``build.build_fpn``.
    """
    bottom_up = build_divided_resnet_backbone(cfg, input_shape)
    return build_fpn(cfg, bottom_up, strides_key="MODEL.RESNETS.STAGE_STRIDES")


@BACKBONE_REGISTRY.register()
def build_divided_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The FPN of Detectron2's RetinaNet, with "p6" and "p7" by convolutions on "res5", over a divided ResNet."""
    bottom_up = build_divided_resnet_backbone(cfg, input_shape)
    return build_fpn(cfg, bottom_up, strides_key="MODEL.RESNETS.STAGE_STRIDES", for_retinanet=True)
