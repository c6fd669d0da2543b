"""Configuration keys of the backbones."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """
    Add ``MODEL.VGG.*``, ``MODEL.RESNETS.WIDTH_DIVISOR`` and ``MODEL.RESNETS.STAGE_STRIDES``.

    No other key of ``cfg`` changes, so a configuration made for Detectron2 alone still builds
    the model it built before.

    Args:
        cfg: the configuration to extend, as ``detectron2.config.get_cfg()`` returns it.
    """
    cfg.MODEL.VGG = CN()

    # Which VGG, by its count of layers with weights, the three fully connected ones (absent here)
    # included. Options: 11, 13, 16.
    cfg.MODEL.VGG.DEPTH = 16

    # Every channel count (64, 128, 256, 512, 512) is divided by this: 32 makes VGG-1-32, whose
    # stages are 2, 4, 8, 16 and 16 channels wide. 1 = the full network, which ImageNet weights
    # fit. Must divide 64.
    cfg.MODEL.VGG.WIDTH_DIVISOR = 1

    # Normalization between each convolution and its ReLU. Options: "" (plain VGG; the convolutions
    # have a bias), "BN", "SyncBN", "FrozenBN", "GN". "GN" has 32 groups as in Detectron2 where
    # the width allows, else as many as leave at least two channels in each. "FrozenBN" normalizes
    # nothing until trained statistics are loaded.
    cfg.MODEL.VGG.NORM = ""

    # Whether the last convolution of the network carries the norm too. False leaves the scale of
    # the last feature free, as in a VGG without normalization; that convolution then has a bias.
    # No effect with NORM "". With FPN, "last" is the last of the bottom-up network.
    cfg.MODEL.VGG.LAST_NORM = True

    # Features to return, from "conv1" to "conv5": each stage's output behind its last ReLU and
    # before the next pooling. Stages after the last one named are not built.
    cfg.MODEL.VGG.OUT_FEATURES = ["conv5"]

    # How much each of the five stages downsamples. The first number is the stride of the very
    # first convolution; each other is kernel and stride of the max pooling before that stage, 1 =
    # no pooling. The stride of a feature, in pixels of the input, is the product up to its stage:
    # the default gives conv5 at 16, [2, 2, 2, 1, 1] gives it at 8.
    cfg.MODEL.VGG.STAGE_STRIDES = [1, 2, 2, 2, 2]

    # Freeze the first stages: 0 = none, 1 = conv1, 2 = conv1 and conv2, up to 5. Their parameters
    # get no gradient and their BatchNorm becomes FrozenBN. Takes the place of
    # MODEL.BACKBONE.FREEZE_AT, whose default (2) would freeze random weights in a network that is
    # trained from scratch; the VGG does not read that one.
    cfg.MODEL.VGG.FREEZE_AT = 0

    # The two keys below are read by build_divided_resnet_backbone and
    # build_divided_resnet_fpn_backbone only, never by Detectron2's own build_resnet_backbone.

    # Every channel count is divided by this, the stem's and the bottlenecks' included: DEPTH 18
    # with 16 makes ResNet18-1-16, 4 channels in the stem and 4, 8, 16, 32 in res2 to res5.
    # 1 = the full network. A divided network has no ImageNet weights, so set
    # MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM "BN" to train it from scratch.
    cfg.MODEL.RESNETS.WIDTH_DIVISOR = 1

    # Stride of the first block of res2, res3, res4, res5; the stem before them has stride 4. The
    # default gives res5 at stride 32, [1, 2, 2, 1] at 16. The first must be 1 with DEPTH 18 and
    # 34, whose first block has no projection that could follow a stride. RES5_DILATION 2 sets
    # res5's stride to 1, as it does in Detectron2.
    cfg.MODEL.RESNETS.STAGE_STRIDES = [1, 2, 2, 2]
