"""
VGG with every channel count divided by one number, for Detectron2.

Shape letters:
    N: number of images.
    C: channels of a feature.
    H, W: height and width of the input, in pixels.
"""

from typing import Any, Dict, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from qmimic_d2.modeling.backbone.build import (
    Norm,
    build_fpn,
    check_choice,
    check_out_features,
    check_stage_strides,
    divide_width,
    resolve_norm,
)
from qmimic_d2.modeling.backbone.convolution import build_conv3x3, check_conv

# Table 1 of the paper, columns A, B and D: convolutions in each stage.
_CONVS_PER_STAGE = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
_STAGE_CHANNELS = (64, 128, 256, 512, 512)
_FEATURE_NAMES = ("conv1", "conv2", "conv3", "conv4", "conv5")


class VGGStage(CNNBlockBase):
    """
    One stage of a VGG: an optional max pooling, then 3x3 convolutions ``conv1``, ``conv2``, ... with norm and ReLU.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        num_convs: int,
        norm: Norm = "",
        last_norm: bool = True,
        pool_stride: int = 1,
        conv_stride: int = 1,
        conv: str = "plain",
        conv_groups: int = 1,
        is_first: bool = False,
    ):
        """
        Args:
            out_channels: of every convolution.
            norm: what ``detectron2.layers.get_norm`` takes; "" for none.
            last_norm: whether the last convolution has the norm too.
            pool_stride: kernel and stride of the max pooling at the start; 1 for none. As in torchvision, it drops the
                last rows or columns that do not fill a window.
            conv_stride: of the first convolution.
            conv: kind of the convolutions, one of ``convolution.CONVS``.
            conv_groups: groups of the kind "group".
            is_first: whether the first convolution reads the image; it is plain then.

        Raises:
            ValueError: ``conv_groups`` does not divide the channels.
        """
        super().__init__(in_channels, out_channels, pool_stride * conv_stride)
        self.pool_stride = pool_stride
        self.conv_names = tuple(f"conv{i + 1}" for i in range(num_convs))
        for i, name in enumerate(self.conv_names):
            layer = build_conv3x3(
                node="MODEL.VGG",
                conv="plain" if is_first and i == 0 else conv,
                groups=conv_groups,
                in_channels=in_channels if i == 0 else out_channels,
                out_channels=out_channels,
                stride=conv_stride if i == 0 else 1,
                norm=norm,
                out_norm=norm if last_norm or i < num_convs - 1 else "",
                activation=nn.ReLU(inplace=True),
            )
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        if self.pool_stride > 1:
            x = F.max_pool2d(x, kernel_size=self.pool_stride, stride=self.pool_stride)
        for name in self.conv_names:
            x = getattr(self, name)(x)
        return x


class VGG(Backbone):
    """
    The convolutional part of a VGG, every channel count divided by ``width_divisor``.

    VGG-1-32 of the Quantization Mimic paper (arXiv 1805.02152) is ``depth=16, width_divisor=32``.
    The network is that of "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv 1409.1556). The
    pooling is at the start of a stage, so that a stage's feature is the one before the next pooling. Features are named
    "conv1" to "conv5"; a convolution in a checkpoint is ``conv5.conv3.weight``, its norm ``conv5.conv3.norm.weight``.

    The weights of torchvision's ``vgg11``, ``vgg13``, ``vgg16`` and their ``_bn`` forms fit
    ``width_divisor=1``; see ``imagenet_names.py``, also for the preprocessing they expect.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        depth: int = 16,
        width_divisor: int = 1,
        norm: str = "",
        last_norm: bool = True,
        stage_strides: Sequence[int] = (1, 2, 2, 2, 2),
        out_features: Sequence[str] = ("conv5",),
        freeze_at: int = 0,
        conv: str = "plain",
        conv_groups: int = 2,
    ):
        """
        Args:
            in_channels: channels of the input image.
            depth: 11, 13 or 16.
            width_divisor: divides every channel count; a divisor of 64.
            norm: "", "BN", "SyncBN", "FrozenBN" or "GN" (groups as in ``build.num_norm_groups``).
            last_norm: whether the last convolution of the network has the norm too.
            stage_strides: stride of the first convolution, then kernel and stride of the max pooling of stages 2 to
                5; 1 for no pooling.
            out_features: names of the features to return. Stages after the last of these are not built, so that no
                parameter is without a gradient.
            freeze_at: number of stages to freeze; see :meth:`freeze`.
            conv: kind of every convolution but the first, one of ``convolution.CONVS``.
            conv_groups: groups of the kind "group".

        Raises:
            ValueError: an argument is not among its options; names its key.
        """
        super().__init__()
        check_choice("MODEL.VGG.DEPTH", depth, tuple(_CONVS_PER_STAGE))
        check_choice("MODEL.VGG.FREEZE_AT", freeze_at, tuple(range(len(_FEATURE_NAMES) + 1)))
        check_conv("MODEL.VGG", conv, conv_groups)
        resolved_norm = resolve_norm("MODEL.VGG.NORM", norm)
        strides = check_stage_strides("MODEL.VGG.STAGE_STRIDES", stage_strides, len(_FEATURE_NAMES))
        out_features = check_out_features("MODEL.VGG.OUT_FEATURES", out_features, _FEATURE_NAMES)
        # All five, even if fewer are built: whether a divisor is valid should not depend on OUT_FEATURES.
        widths = [
            divide_width(channels, width_divisor, key="MODEL.VGG.WIDTH_DIVISOR")
            for channels in _STAGE_CHANNELS
        ]

        num_stages = 1 + max(_FEATURE_NAMES.index(name) for name in out_features)
        self.stage_names = _FEATURE_NAMES[:num_stages]
        self._out_features = list(out_features)
        self._out_feature_channels: Dict[str, int] = {}
        self._out_feature_strides: Dict[str, int] = {}
        stride = 1
        for i, name in enumerate(self.stage_names):
            stage = VGGStage(
                in_channels=in_channels if i == 0 else widths[i - 1],
                out_channels=widths[i],
                num_convs=_CONVS_PER_STAGE[depth][i],
                norm=resolved_norm,
                last_norm=last_norm or i < num_stages - 1,
                pool_stride=1 if i == 0 else strides[i],
                conv_stride=strides[i] if i == 0 else 1,
                conv=conv,
                conv_groups=conv_groups,
                is_first=i == 0,
            )
            self.add_module(name, stage)
            stride *= stage.stride
            self._out_feature_channels[name] = stage.out_channels
            self._out_feature_strides[name] = stride
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        node = cfg.MODEL.VGG
        return {
            "in_channels": input_shape.channels,
            "depth": node.DEPTH,
            "width_divisor": node.WIDTH_DIVISOR,
            "norm": node.NORM,
            "last_norm": node.LAST_NORM,
            "stage_strides": node.STAGE_STRIDES,
            "out_features": node.OUT_FEATURES,
            "freeze_at": node.FREEZE_AT,
            "conv": node.CONV,
            "conv_groups": node.CONV_GROUPS,
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            x: (N, C, H, W) preprocessed images.

        Returns:
            from feature name to (N, C, H / stride, W / stride), rounded down by each pooling. Every feature ends in a
            ReLU.

        Raises:
            ValueError: ``x`` does not have four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"VGG takes an input of shape (N, C, H, W); got {tuple(x.shape)}.")
        outputs = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> "VGG":
        """
        Freezes the first stages, as ``detectron2.modeling.backbone.ResNet.freeze`` does, and returns this network.

        Their parameters require no gradient, and their BatchNorm layers become FrozenBatchNorm.

        Args:
            freeze_at: number of stages: 1 freezes conv1, 2 conv1 and conv2, and so on.
        """
        for name in self.stage_names[:freeze_at]:
            getattr(self, name).freeze()
        return self


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """A :class:`VGG` from ``MODEL.VGG``."""
    return VGG(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Detectron2's FPN over a :class:`VGG`, from ``MODEL.VGG`` and ``MODEL.FPN``.

    With the default strides, ``IN_FEATURES`` ["conv2", "conv3", "conv4", "conv5"] (named in
    ``MODEL.VGG.OUT_FEATURES`` as well) gives "p1" to "p4" at strides 2 to 16, and "p5" subsampled. Errors are those
    of ``build.build_fpn``.
    """
    bottom_up = build_vgg_backbone(cfg, input_shape)
    return build_fpn(cfg, bottom_up, strides_key="MODEL.VGG.STAGE_STRIDES")


@BACKBONE_REGISTRY.register()
def build_retinanet_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    As :func:`build_vgg_fpn_backbone`, with RetinaNet's two levels instead of the subsampled one.

    With the default strides and ``IN_FEATURES`` ["conv4", "conv5"] it gives "p3" and "p4", and "p5" and "p6" by
    convolutions on "conv5".
    """
    bottom_up = build_vgg_backbone(cfg, input_shape)
    return build_fpn(cfg, bottom_up, strides_key="MODEL.VGG.STAGE_STRIDES", for_retinanet=True)
