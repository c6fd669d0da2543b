"""
Standard ONNX forms of operators that torch's exporter has none for.

Shape letters:
    M: number of regions.
    C: channels of one bin's score map.
    k: bins per side.
"""

import contextlib
from typing import Callable, Dict, Iterator

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic

__all__ = ["OPSET", "project_symbolics"]

# The first one whose RoiAlign has the half-pixel offset of Detectron2's ROIAlignV2.
OPSET = 16


@contextlib.contextmanager
def project_symbolics() -> Iterator[None]:
    """Registers the forms below with ``torch.onnx`` while the block runs."""
    for name, symbolic in _SYMBOLICS.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in _SYMBOLICS:
            unregister_custom_op_symbolic(name, OPSET)


def _constant(g, value: torch.Tensor):
    return g.op("Constant", value_t=value)


def _exp2(g, exponent):
    return g.op("Pow", _constant(g, torch.tensor(2.0)), exponent)


def _copysign(g, magnitude, sign):
    """Of a magnitude >= 0. The sign of a zero is not kept, which no code depends on."""
    return g.op("Where", g.op("Less", sign, _constant(g, torch.tensor(0.0))), g.op("Neg", magnitude), magnitude)


def _ps_roi_align(g, maps, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio):
    """
    Position-sensitive RoIAlign (R-FCN) as a RoIAlign of all k * k groups of channels at k x k bins, of which
    bin (i, j) keeps group (i, j) alone.

    torchvision lays the channels out as (C, k, k), and its sampling points are those of the half-pixel
    RoIAlign: https://github.com/pytorch/vision/blob/v0.16.0/torchvision/csrc/ops/cpu/ps_roi_align_kernel.cpp.
    It costs k * k times the pooling that is needed.
    """
    height, width = (symbolic_helper._parse_arg(each, "i") for each in (pooled_height, pooled_width))
    scale = symbolic_helper._parse_arg(spatial_scale, "f")
    samples = symbolic_helper._parse_arg(sampling_ratio, "i")
    axis = _constant(g, torch.tensor([1]))
    batch_index = g.op("Squeeze", _slice_columns(g, rois, 0, 1), axis)
    pooled = g.op(
        "RoiAlign",
        maps,
        _slice_columns(g, rois, 1, 5),
        g.op("Cast", batch_index, to_i=torch.onnx.TensorProtoDataType.INT64),
        coordinate_transformation_mode_s="half_pixel",
        spatial_scale_f=scale,
        output_height_i=height,
        output_width_i=width,
        sampling_ratio_i=max(samples, 0),
    )
    bins = height * width
    channels = symbolic_helper._get_tensor_dim_size(maps, 1)
    values = -1 if channels is None else channels // bins  # -1 could not be told without a region
    # (M, C, group, bin) as one row of group and bin, of which the entries group == bin stay
    rows = g.op("Reshape", pooled, _constant(g, torch.tensor([0, values, bins * bins])))
    diagonal = g.op("Gather", rows, _constant(g, torch.arange(bins) * (bins + 1)), axis_i=2)
    return g.op("Reshape", diagonal, _constant(g, torch.tensor([0, values, height, width]))), None


def _slice_columns(g, table, start: int, end: int):
    bounds = [_constant(g, torch.tensor([each])) for each in (start, end, 1)]
    return g.op("Slice", table, *bounds)


_SYMBOLICS: Dict[str, Callable] = {
    "aten::copysign": _copysign,
    "aten::exp2": _exp2,
    "torchvision::ps_roi_align": _ps_roi_align,
}
