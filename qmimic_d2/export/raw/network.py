"""The network of a one-stage detector without its decoding, and what its decoding needs."""

from dataclasses import replace
from typing import List, Tuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch import Tensor, nn

from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.raw.decoding import Decoding, Level
from qmimic_d2.modeling.family import head_outputs

__all__ = ["RawNetwork", "describe_raw"]


class RawNetwork(nn.Module):
    """Backbone and head of a RetinaNet or FCOS: an image (1, 3, h, w) in grey levels in, the head's maps out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()  # torch's exporter gives the mode of this module back to the model

    def forward(self, image: Tensor) -> List[Tensor]:
        """The maps of one level after the other, each of shape (1, channels, H, W)."""
        model = self.model
        by_name = model.backbone((image - model.pixel_mean) / model.pixel_std)
        outputs = model.head([by_name[name] for name in model.head_in_features])
        return [each for level in zip(*outputs) for each in level]


def describe_raw(model: nn.Module, description: ModelDescription) -> ModelDescription:
    """
    The description of a detector, for its raw network.

    Args:
        model: on the CPU, in evaluation mode.
        description: of the whole detector.

    Raises:
        ValueError: the detector is of another family, or has an inference of its own; or its input has no fixed size,
            or one that the backbone would pad.
    """
    kinds = head_outputs(model)
    if not kinds:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {type(model).__name__!r}; onnx-raw and onnx-raw-int8 are for RetinaNet, FCOS "
            "and classes that inherit their inference; a second stage needs regions in the network: use onnx"
        )
    spec = description.input_spec
    height, width = spec.fixed_height, spec.fixed_width
    if not spec.is_fixed:
        side = max(_padded(model, spec.min_size or 1, spec.min_size or 1))
        raise ValueError(f"a raw network has one size of input; give --fixed-size HxW, such as {side}x{side}")
    padded_height, padded_width = _padded(model, height, width)
    if (padded_height, padded_width) != (height, width):
        raise ValueError(
            f"--fixed-size is {height}x{width}, and the backbone pads it to {padded_height}x{padded_width}; give this"
        )
    if min(height, width) < spec.least:
        raise ValueError(f"--fixed-size is {height}x{width}; the backbone has a stride of {spec.least} pixels")
    decoding = _decoding(model, torch.zeros(1, 3, height, width), "centerness" in kinds)
    return replace(description, decoding=decoding)


def _padded(model: nn.Module, height: int, width: int) -> Tuple[int, int]:
    """Height and width to which Detectron2 pads an image."""
    image = torch.zeros(1, 1, 1).expand(3, height, width)
    return tuple(model.preprocess_image([{"image": image}]).tensor.shape[-2:])


def _decoding(model: nn.Module, image: Tensor, has_centerness: bool) -> Decoding:
    generator, transform = model.anchor_generator, model.box2box_transform
    if type(generator) is not DefaultAnchorGenerator:
        raise ValueError(
            f"the anchors are those of a {type(generator).__name__}; a raw export decodes those of "
            "DefaultAnchorGenerator (MODEL.ANCHOR_GENERATOR.NAME); use onnx"
        )
    is_linear = isinstance(transform, Box2BoxTransformLinear) and transform.normalize_by_size
    if not (is_linear or isinstance(transform, Box2BoxTransform)):
        raise ValueError(f"boxes are coded by {type(transform).__name__}, which a raw export cannot decode; use onnx")
    with torch.no_grad():
        outputs = RawNetwork(model)(image)
    maps = outputs[:: len(outputs) // len(model.head_in_features)]
    levels = tuple(
        Level(name, *each.shape[-2:], int(stride), float(generator.offset * stride), _tuples(cells))
        for name, each, stride, cells in zip(
            model.head_in_features, maps, generator.strides, generator.cell_anchors
        )
    )
    decoding = Decoding(
        levels=levels,
        num_classes=int(model.num_classes),
        box_coding="distances" if is_linear else "deltas",
        has_centerness=has_centerness,
        delta_weights=(1.0,) * 4 if is_linear else tuple(map(float, transform.weights)),
        largest_log_scale=0.0 if is_linear else float(transform.scale_clamp),
        score_threshold=float(model.test_score_thresh),
        top_k=int(model.test_topk_candidates),
        nms_threshold=float(model.test_nms_thresh),
        max_detections=int(model.max_detections_per_image),
    )
    shapes = [tuple(each.shape) for each in outputs]
    if shapes != list(decoding.output_shapes.values()):
        raise ValueError(
            f"the head gives maps of shapes {shapes}, and decoding takes {decoding.output_shapes}; use onnx"
        )
    return decoding


def _tuples(boxes: Tensor) -> Tuple[Tuple[float, ...], ...]:
    return tuple(map(tuple, boxes.tolist()))
