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
    values = _values_per_region(g, maps, bins)
    # (M, C, group, bin) as one row of group and bin, of which the entries group == bin stay
    rows = _reshape(g, pooled, -1, values, bins * bins)
    diagonal = g.op("Gather", rows, _constant(g, torch.arange(bins) * (bins + 1)), axis_i=2)
    return _reshape(g, diagonal, -1, values, height, width), None


def _ps_roi_pool(g, maps, rois, spatial_scale, pooled_height, pooled_width):
    """
    Position-sensitive RoIPool (R-FCN): the average of whole cells, by four entries of the maps' integral image.

    Which cells a bin holds is torchvision's rule
    (https://github.com/pytorch/vision/blob/v0.16.0/torchvision/csrc/ops/cpu/ps_roi_pool_kernel.cpp). The sums
    are float64, whose rounding a difference of large sums does not show. For one image, as all of an
    exported network is.
    """
    height, width = (symbolic_helper._parse_arg(each, "i") for each in (pooled_height, pooled_width))
    scale = symbolic_helper._parse_arg(spatial_scale, "f")
    values = _values_per_region(g, maps, height * width)

    def integers(*numbers):
        return _constant(g, torch.tensor(numbers))

    size = g.op("Cast", g.op("Shape", maps), to_i=torch.onnx.TensorProtoDataType.FLOAT)
    limits = g.op("Sub", size, _constant(g, torch.tensor(1.0)))
    scaled = g.op("Mul", _slice_columns(g, rois, 1, 5), _constant(g, torch.tensor(scale)))
    away = g.op("Floor", g.op("Add", g.op("Abs", scaled), _constant(g, torch.tensor(0.5))))
    corners = g.op("Mul", g.op("Sign", scaled), away)  # rounded, halves away from zero

    def cells(column: int, axis: int, count: int):
        """First cell and end of every bin along an axis, each (M, count), and the map's length."""
        first, last = (_slice_columns(g, corners, each, each + 1) for each in (column, column + 2))
        length = g.op("Max", g.op("Sub", last, first), _constant(g, torch.tensor(1.0)))
        step = g.op("Div", length, _constant(g, torch.tensor(float(count))))
        limit = g.op("Gather", limits, integers(axis), axis_i=0)
        bounds = []
        for rounding, shift in (("Floor", 0.0), ("Ceil", 1.0)):
            bound = g.op(rounding, g.op("Mul", step, _constant(g, torch.arange(count) + shift)))
            bound = g.op("Max", g.op("Add", bound, first), _constant(g, torch.tensor(0.0)))
            bound = g.op("Min", bound, limit)
            bounds.append(g.op("Cast", bound, to_i=torch.onnx.TensorProtoDataType.INT64))
        return bounds

    (left, right), (top, bottom) = cells(0, 3, width), cells(1, 2, height)
    top, bottom = (g.op("Unsqueeze", each, integers(2)) for each in (top, bottom))
    left, right = (g.op("Unsqueeze", each, integers(1)) for each in (left, right))
    area = g.op("Mul", g.op("Sub", bottom, top), g.op("Sub", right, left))

    # (1, C bins, H, W) as rows of C values, one for every bin and cell, each the sum above and left of the cell
    sums = g.op("Cast", maps, to_i=torch.onnx.TensorProtoDataType.DOUBLE)
    for axis in (2, 3):
        sums = g.op("CumSum", sums, _constant(g, torch.tensor(axis)))
    sums = g.op("Pad", sums, integers(0, 0, 1, 1, 0, 0, 0, 0))
    row = g.op("Slice", g.op("Shape", sums), integers(3), integers(4))
    table = _reshape(g, sums, values, height * width, -1)
    plane = g.op("Slice", g.op("Shape", table), integers(2), integers(3))
    table = _reshape(g, g.op("Transpose", table, perm_i=[1, 2, 0]), -1, values)
    bin_index = torch.arange(height * width).reshape(1, height, width)
    start = g.op("Mul", _constant(g, bin_index), plane)

    def sum_to(y, x):
        index = g.op("Add", g.op("Add", g.op("Mul", y, row), x), start)
        return g.op("Gather", table, index, axis_i=0)

    total = g.op("Sub", sum_to(bottom, right), sum_to(top, right))
    total = g.op("Add", g.op("Sub", total, sum_to(bottom, left)), sum_to(top, left))
    count = g.op("Cast", g.op("Max", area, integers(1)), to_i=torch.onnx.TensorProtoDataType.DOUBLE)
    pooled = g.op("Div", total, g.op("Unsqueeze", count, integers(3)))
    pooled = g.op("Cast", pooled, to_i=torch.onnx.TensorProtoDataType.FLOAT)
    return g.op("Transpose", pooled, perm_i=[0, 3, 1, 2]), None


def _values_per_region(g, maps, bins: int):
    """C, as a tensor (1,): a trace does not always tell it."""
    channels = g.op("Slice", g.op("Shape", maps), *(_constant(g, torch.tensor([each])) for each in (1, 2)))
    return g.op("Div", channels, _constant(g, torch.tensor([bins])))


def _reshape(g, value, *lengths):
    """To a shape of numbers, -1 for the rest, and tensors (1,)."""
    parts = [_constant(g, torch.tensor([each])) if isinstance(each, int) else each for each in lengths]
    return g.op("Reshape", value, g.op("Concat", *parts, axis_i=0))


def _slice_columns(g, table, start: int, end: int):
    bounds = [_constant(g, torch.tensor([each])) for each in (start, end, 1)]
    return g.op("Slice", table, *bounds)


_SYMBOLICS: Dict[str, Callable] = {
    "aten::copysign": _copysign,
    "aten::exp2": _exp2,
    "torchvision::ps_roi_align": _ps_roi_align,
    "torchvision::ps_roi_pool": _ps_roi_pool,
}
