"""
How the VGG and the ResNet are built: width, norm, stage strides, FPN.

In each function ``key`` is the configuration key of the value, for the error. The checks run before a module is built.
"""

import math
from collections import abc
from typing import Callable, List, Sequence, Tuple, Union

from detectron2.config import CfgNode
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN")

# Groups of Detectron2's "GN" (detectron2.layers.get_norm).
_MAX_GROUPS = 32

Norm = Union[str, Callable[[int], nn.Module]]


def check_choice(key: str, value, options: Sequence) -> None:
    """Raises a ValueError if ``value`` is not one of ``options``."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{key} is {value!r}, which is not supported; use one of {listed}.")


def check_out_features(key: str, names: Sequence[str], options: Sequence[str]) -> Tuple[str, ...]:
    """Returns the names as a tuple; raises a ValueError if there is none, or one that is not in ``options``."""
    listed = ", ".join(repr(option) for option in options)
    if isinstance(names, str) or len(names) == 0:
        raise ValueError(f"{key} is {names!r}; give a list with at least one of {listed}.")
    for name in names:
        if name not in options:
            raise ValueError(f"{key} is {list(names)!r}: {name!r} is not a feature; use {listed}.")
    return tuple(names)


def check_stage_strides(key: str, strides: Sequence[int], num_stages: int) -> Tuple[int, ...]:
    """Returns the strides as a tuple; raises a ValueError unless they are ``num_stages`` integers of at least 1."""
    # A LazyConfig's lists are sequences, but not of the type list.
    is_list = isinstance(strides, abc.Sequence) and not isinstance(strides, str) and len(strides) == num_stages
    # bool is a subclass of int, and True would pass as a stride of 1.
    if not is_list or any(type(s) is not int or s < 1 for s in strides):
        raise ValueError(f"{key} is {strides!r}; give {num_stages} integers of at least 1, one per stage.")
    return tuple(strides)


def divide_width(channels: int, divisor: int, *, key: str) -> int:
    """``channels / divisor``; a ValueError unless ``divisor`` is a positive integer that divides ``channels``."""
    if type(divisor) is not int or divisor < 1:
        raise ValueError(f"{key} is {divisor!r}; give an integer of at least 1.")
    if channels % divisor != 0:
        raise ValueError(
            f"{key} is {divisor}, which does not divide the network's {channels} channels; "
            f"use a divisor of {channels}, such as a power of two up to it."
        )
    return channels // divisor


def num_norm_groups(channels: int) -> int:
    """
    Groups of a GroupNorm over ``channels`` channels (powers of two): 32, as in Detectron2, from 64 channels on.

    Fewer channels have groups of two: 4 channels make 2 groups, 32 make 16. One channel per group would be instance
    normalization, which removes from every channel how strongly it responds to the image as a whole.
    """
    groups = math.gcd(_MAX_GROUPS, channels)
    return groups // 2 if groups == channels and channels > 1 else groups


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_norm_groups(channels), channels)


def resolve_norm(key: str, norm: str) -> Norm:
    """
    Returns:
        the argument of ``detectron2.layers.get_norm``: the name itself, but for "GN" a function that fits the number of
        groups to the width (see :func:`num_norm_groups`).

    Raises:
        ValueError: ``norm`` is not in ``NORMS``.
    """
    check_choice(key, norm, NORMS)
    return _group_norm if norm == "GN" else norm


def build_fpn(cfg: CfgNode, bottom_up: Backbone, *, strides_key: str, for_retinanet: bool = False) -> FPN:
    """
    Detectron2's FPN over ``bottom_up``. The coarsest level is subsampled to one more level.

    It reads ``MODEL.FPN.*`` as ``build_resnet_fpn_backbone`` does. Levels are named after their stride: "p3" has stride
    8. In Detectron2 the added level always follows "p5"; a VGG has no such level, because its strides end at 16.

    Args:
        bottom_up: backbone that returns every feature of ``MODEL.FPN.IN_FEATURES``.
        strides_key: the key that sets the bottom-up's strides, for the error.
        for_retinanet: instead, add two levels by convolutions on the last input feature (Lin et al., "Focal Loss for
            Dense Object Detection", ICCV 2017), as ``build_retinanet_resnet_fpn_backbone`` does.

    Raises:
        ValueError: the bottom-up lacks an input feature, the strides do not double from one input feature to the next,
            or a norm or fuse type is unknown.
    """
    shapes = bottom_up.output_shape()
    in_features = check_out_features("MODEL.FPN.IN_FEATURES", cfg.MODEL.FPN.IN_FEATURES, tuple(shapes))
    check_choice("MODEL.FPN.FUSE_TYPE", cfg.MODEL.FPN.FUSE_TYPE, ("sum", "avg"))
    strides: List[int] = [shapes[name].stride for name in in_features]
    doubles = all(fine * 2 == coarse for fine, coarse in zip(strides, strides[1:]))
    if not doubles or not math.log2(strides[0]).is_integer():
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES {list(in_features)} have strides {strides}; an FPN needs "
            f"powers of two, each twice the one before. Change {strides_key} or "
            f"MODEL.FPN.IN_FEATURES."
        )
    if for_retinanet:
        last = in_features[-1]
        top_block = LastLevelP6P7(shapes[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, last)
    else:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{int(math.log2(strides[-1]))}"
    return FPN(
        bottom_up=bottom_up,
        in_features=list(in_features),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=resolve_norm("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM),
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
