"""
Names of torchvision's VGG and ResNet weights, converted to those of this package's backbones.

torchvision's ImageNet weights fit the undivided networks (``WIDTH_DIVISOR 1``) and nothing else.
They expect RGB images in [0, 1], normalized. In Detectron2's scale of 0 to 255 that is

.. code-block:: yaml

    MODEL:
      PIXEL_MEAN: [123.675, 116.28, 103.53]
      PIXEL_STD: [58.395, 57.12, 57.375]
      RESNETS:
        STRIDE_IN_1X1: False   # ResNet-50: the stride is in the 3x3 convolution
    INPUT:
      FORMAT: "RGB"

With Detectron2's default (BGR, not scaled) the same weights load and the features are wrong.

Sources: https://github.com/pytorch/vision/blob/v0.19.0/torchvision/models/vgg.py (``make_layers``)
and https://github.com/pytorch/vision/blob/v0.19.0/torchvision/models/resnet.py.
"""

import re
from typing import Collection, Dict, List, Mapping, Optional

import torch
from torch import Tensor

# eps of nn.BatchNorm2d, which torchvision leaves at its default.
_BATCH_NORM_EPS = 1e-5

_VGG_PARAMETER = re.compile(r"features\.(\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
_RESNET_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(.+)")
_RESNET_MARKS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")


def convert_torchvision_names(
    state: Mapping[str, Tensor], model_keys: Optional[Collection[str]] = None
) -> Optional[Dict[str, Tensor]]:
    """
    Renames the weights of torchvision's VGG or ResNet to those of ``VGG`` or Detectron2's ResNet.

    ``features.0.weight`` becomes ``conv1.conv1.weight``; ``layer1.0.bn1.weight`` becomes
    ``res2.0.conv1.norm.weight``. The classifier is dropped.

    In torchvision's ``vgg*_bn``, convolutions before a BatchNorm have a bias; the convolutions here have none. The
    bias moves into the norm, ``running_mean - bias``, which does not change the output.

    Args:
        state: from parameter name, without any prefix, to tensor. It is not changed.
        model_keys: names in the state dict of the backbone to be filled, without any prefix (of the FPN: without
            ``bottom_up.`` too). The result then fits that model. A BatchNorm is folded into its VGG convolution if
            that has a bias and no norm there (``NORM ""``, ``LAST_NORM False``): the output of an evaluated model
            stays the same. ``num_batches_tracked``, which FrozenBN does not have, is dropped if the model lacks it.
            Other layers that the model lacks stay, so that the caller can report them.

    Returns:
        from the backbone's parameter name to tensor. None for other networks, also those with a ``features`` sequence
        (AlexNet, DenseNet, MobileNet, SqueezeNet), and for checkpoints of Detectron2 or of this package.

    Raises:
        ValueError: torchvision's VGG or ResNet has no parameter of a name in ``state``.
    """
    if _is_vgg(state):
        converted = _convert_vgg(state)
        if model_keys is not None:
            _fold_norms(converted, model_keys)
    elif all(name in state for name in _RESNET_MARKS):
        converted = {_resnet_name(name): tensor for name, tensor in state.items() if not name.startswith("fc.")}
    else:
        return None
    return {
        name: tensor
        for name, tensor in converted.items()
        if model_keys is None or name in model_keys or not name.endswith(".num_batches_tracked")
    }


def _is_vgg(state: Mapping[str, Tensor]) -> bool:
    features = [name for name in state if name.startswith("features.")]
    if not features or any(_VGG_PARAMETER.fullmatch(name) is None for name in features):
        return False
    # AlexNet has the same names, but an 11x11 and a 5x5 kernel.
    shapes = [tuple(state[name].shape) for name in features]
    kernels = [shape[2:] for shape in shapes if len(shape) == 4]
    return len(kernels) > 0 and all(kernel == (3, 3) for kernel in kernels)


def _convert_vgg(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """
    Names each layer by its position in torchvision's ``features`` sequence.

    The sequence repeats (convolution, [BatchNorm], ReLU), with a max pooling at the end of a stage. Only convolutions
    and BatchNorms have parameters. So a gap of one position before a convolution is a ReLU; a gap of two is a ReLU and
    a pooling.
    """
    layers: Dict[int, Dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _VGG_PARAMETER.fullmatch(name)
        if match is not None:
            layers.setdefault(int(match.group(1)), {})[match.group(2)] = tensor
        elif not name.startswith("classifier."):
            raise ValueError(f"{name!r} is not a parameter of torchvision's VGG.")

    converted: Dict[str, Tensor] = {}
    stage, conv, previous = 1, 0, -2
    for position in sorted(layers):
        layer = layers[position]
        if layer["weight"].dim() == 4:
            if position - previous > 2:
                stage, conv = stage + 1, 0
            conv += 1
            for name, tensor in layer.items():
                converted[f"conv{stage}.conv{conv}.{name}"] = tensor
        else:
            norm = dict(layer)
            bias = converted.pop(f"conv{stage}.conv{conv}.bias", None)
            if bias is not None:
                norm["running_mean"] = norm["running_mean"] - bias
            for name, tensor in norm.items():
                converted[f"conv{stage}.conv{conv}.norm.{name}"] = tensor
        previous = position
    return converted


def _fold_norms(converted: Dict[str, Tensor], model_keys: Collection[str]) -> None:
    """Folds, in place, each BatchNorm whose convolution has a bias and no norm in the model."""
    convs: List[str] = [name[: -len(".norm.weight")] for name in converted if name.endswith(".norm.weight")]
    for conv in convs:
        if f"{conv}.bias" not in model_keys or f"{conv}.norm.weight" in model_keys:
            continue
        norm_names = [name for name in converted if name.startswith(f"{conv}.norm.")]
        norm = {name[len(f"{conv}.norm.") :]: converted.pop(name) for name in norm_names}
        scale = norm["weight"] * torch.rsqrt(norm["running_var"] + _BATCH_NORM_EPS)
        converted[f"{conv}.weight"] = converted[f"{conv}.weight"] * scale[:, None, None, None]
        converted[f"{conv}.bias"] = norm["bias"] - norm["running_mean"] * scale


def _resnet_name(name: str) -> str:
    """Detectron2's name for torchvision's: ``res3.0.conv1.norm.bias`` for ``layer2.0.bn1.bias``."""
    block = _RESNET_BLOCK.fullmatch(name)
    if block is None:
        prefix, rest = "stem.", name
    else:
        prefix, rest = f"res{int(block.group(1)) + 1}.{block.group(2)}.", block.group(3)
    for pattern, replacement in (
        (r"(conv\d)\.(weight)", r"\1.\2"),
        (r"bn(\d)\.(\w+)", r"conv\1.norm.\2"),
        (r"downsample\.0\.(weight)", r"shortcut.\1"),
        (r"downsample\.1\.(\w+)", r"shortcut.norm.\1"),
    ):
        if re.fullmatch(pattern, rest) is not None:
            return prefix + re.sub(pattern, replacement, rest)
    raise ValueError(f"{name!r} is not a parameter of torchvision's ResNet.")
