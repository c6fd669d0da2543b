"""
The 3x3 convolutions of the backbones: plain, group or depthwise separable.

The Quantization Mimic paper (arXiv 1805.02152) compares its tiny networks with networks of group and of
depthwise separable convolutions. Cost of one output cell, for C channels in, D out and G groups, in
multiply-adds: plain 9 C D, group 9 C D / G, depthwise separable 9 C + C D.
"""

from typing import Optional

import torch
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn

from qmimic_d2.modeling.backbone.build import Norm, check_choice

__all__ = ["CONVS", "DepthwiseSeparableConv", "build_conv3x3", "check_conv", "replace_conv3x3"]

# Values of MODEL.VGG.CONV and MODEL.RESNETS.CONV.
CONVS = ("plain", "group", "depthwise")


class DepthwiseSeparableConv(nn.Module):
    """
    A depthwise 3x3 convolution with norm and ReLU, then a 1x1 convolution with norm.

    The block of MobileNet (Howard et al., arXiv 1704.04861, figure 3). Its state dict has ``depthwise.weight``,
    ``depthwise.norm.weight``, ``pointwise.weight`` and ``pointwise.norm.weight``. Unlike
    ``detectron2.layers.DepthwiseSeparableConv2d`` it can have a stride.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        norm: Norm = "",
        out_norm: Norm = "",
        activation: Optional[nn.Module] = None,
    ):
        """
        Args:
            in_channels: of the depthwise convolution, which keeps them.
            out_channels: of the 1x1 convolution.
            stride, dilation: of the depthwise convolution.
            norm: of the depthwise convolution; "" for none, and a bias.
            out_norm: of the 1x1 convolution; "" for none, and a bias.
            activation: after the 1x1 convolution; None for none.
        """
        super().__init__()
        self.depthwise = _conv3x3(
            in_channels,
            in_channels,
            groups=in_channels,
            stride=stride,
            dilation=dilation,
            norm=norm,
            activation=nn.ReLU(inplace=True),
        )
        self.pointwise = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=out_norm == "",
            norm=get_norm(out_norm, out_channels),
            activation=activation,
        )
        weight_init.c2_msra_fill(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        return self.pointwise(self.depthwise(x))


def check_conv(node: str, conv: str, groups: int) -> None:
    """Raises a ValueError if ``conv`` is not in :data:`CONVS`, or if it is "group" with fewer than two groups."""
    check_choice(f"{node}.CONV", conv, CONVS)
    if conv == "group" and groups < 2:
        raise ValueError(f"{node}.CONV_GROUPS is {groups}; give at least 2, or set {node}.CONV to 'plain'.")


def build_conv3x3(
    *,
    node: str,
    conv: str,
    groups: int,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    dilation: int = 1,
    norm: Norm = "",
    out_norm: Norm = "",
    activation: Optional[nn.Module] = None,
) -> nn.Module:
    """
    A 3x3 convolution of one of the kinds :data:`CONVS`, which keeps the size at stride 1.

    "group" is the group convolution of AlexNet and ResNeXt: a 3x3 convolution with groups, and no layer that mixes
    them. A VGG has no other layers, so its groups meet in the heads only.

    Args:
        node: the configuration node of ``conv`` and ``groups``, for the error.
        groups: of "group"; the other kinds do not read it.
        norm: of the depthwise convolution of "depthwise".
        out_norm: of the output; "" for none, and a bias.
        activation: of the output; None for none.

    Raises:
        ValueError: if the groups do not divide the channels.
    """
    shared = dict(stride=stride, dilation=dilation, activation=activation)
    if conv == "depthwise":
        return DepthwiseSeparableConv(
            in_channels=in_channels, out_channels=out_channels, norm=norm, out_norm=out_norm, **shared
        )
    if conv == "plain":
        groups = 1
    if in_channels % groups != 0 or out_channels % groups != 0:
        raise ValueError(
            f"{node}.CONV_GROUPS is {groups}, which does not divide a convolution's {in_channels} channels in and "
            f"{out_channels} out; use fewer groups or a smaller {node}.WIDTH_DIVISOR."
        )
    return _conv3x3(in_channels, out_channels, groups=groups, norm=out_norm, **shared)


def replace_conv3x3(block: CNNBlockBase, *, node: str, conv: str, groups: int, norm: Norm) -> None:
    """
    Replaces the plain 3x3 convolutions of a residual block by "group" or "depthwise" ones.

    Args:
        block: Detectron2's BasicBlock or BottleneckBlock, whose own ReLUs follow its convolutions.
        norm: of every convolution in it.

    Raises:
        ValueError: see :func:`build_conv3x3`.
    """
    for name in ("conv1", "conv2"):
        plain = getattr(block, name)
        if plain.kernel_size == (3, 3):
            replacement = build_conv3x3(
                node=node,
                conv=conv,
                groups=groups,
                in_channels=plain.in_channels,
                out_channels=plain.out_channels,
                stride=plain.stride[0],
                dilation=plain.dilation[0],
                norm=norm,
                out_norm=norm,
            )
            setattr(block, name, replacement)


def _conv3x3(in_channels: int, out_channels: int, *, groups: int, dilation: int, norm: Norm, **further) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=norm == "",  # a norm has a bias of its own
        norm=get_norm(norm, out_channels),
        **further,
    )
    weight_init.c2_msra_fill(conv)
    if groups > 1:
        # The initialization assumes that every output reads each input; only the outputs of one group do.
        with torch.no_grad():
            conv.weight.mul_(groups**0.5)
    return conv
