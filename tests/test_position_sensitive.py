"""Position-sensitive pooling against loops over cells and samples that are written from the equations."""

import math

import pytest
import torch
from detectron2.structures import Boxes

from qmimic_d2.modeling.roi_heads import PositionSensitivePooler

TYPES = ("PSROIPool", "PSROIAlign")

# Boxes in pixels of two images of 36 x 24; their maps have 6 x 9 cells of 4 pixels.
BOXES = {
    "inside": ([[3.1, 2.2, 20.3, 15.4], [8, 4, 16, 12]], [[4.5, 5.7, 25.1, 13.3]]),
    "whole map": ([[0, 0, 36, 24]], [[0, 0, 36, 24]]),
    "last cells": ([[32, 20, 36, 24]], [[20, 12, 36, 24]]),
    "partly outside": ([[-10.3, -7.2, 9.1, 8.4], [29.7, 15.2, 51.9, 40.1]], [[-20.1, -20.2, 60.3, 50.4]]),
    "wholly outside": ([[-90, -80, -40, -30]], [[100, 2, 120, 9], [3, 200, 9, 300]]),
    "no area": ([[7, 5, 7, 5], [9, 3, 9, 14]], [[11, 6, 20, 6]]),
    "tiny": ([[7.1, 5.2, 7.3, 5.3]], [[12.5, 9.5, 13.1, 9.9]]),
    "halves": ([[2, 6, 18, 14]], [[6, 2, 26, 22]]),
    "second image only": ([], [[3.3, 2.1, 21.7, 15.9]]),
    "none": ([], []),
}


def boxes_of(*images):
    return [Boxes(torch.tensor(each, dtype=torch.float64).view(-1, 4)) for each in images]


def slow_pool(channel, box, row, column, k):
    """Equation 1: the average of the cells of one bin, of one channel; the box in cells, which the map ends."""
    box = [min(v, end) for v, end in zip(box, (*channel.shape[::-1], *channel.shape[::-1]))]
    x0, y0, x1, y1 = (math.floor(abs(v) + 0.5) * (1 if v >= 0 else -1) for v in box)  # halves away from zero
    height, width = max(y1 - y0, 1), max(x1 - x0, 1)
    total, count = 0.0, 0
    for y in range(y0 + row * height // k, y0 - (-(row + 1) * height // k)):
        for x in range(x0 + column * width // k, x0 - (-(column + 1) * width // k)):
            if 0 <= y < channel.shape[0] and 0 <= x < channel.shape[1]:
                total += float(channel[y, x])
                count += 1
    return total / count if count else 0.0


def slow_align(channel, box, row, column, k, samples=2):
    """The average of bilinear samples of one bin, cell centres at halves; the box in cells."""
    height, width = channel.shape
    x0, y0, x1, y1 = (v - 0.5 for v in box)
    total = 0.0
    for a in range(samples):
        for b in range(samples):
            y = y0 + (y1 - y0) / k * (row + (a + 0.5) / samples)
            x = x0 + (x1 - x0) / k * (column + (b + 0.5) / samples)
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            for cell_y in range(height):
                for cell_x in range(width):
                    weight = max(0, 1 - abs(y - cell_y)) * max(0, 1 - abs(x - cell_x))
                    total += weight * float(channel[cell_y, cell_x])
    return total / samples**2


SLOW = {"PSROIPool": slow_pool, "PSROIAlign": slow_align}


def slow(pooler_type, maps, boxes, k, stride):
    """All regions, values, rows and columns of bins, one after the other."""
    num_values = maps.shape[1] // (k * k)
    pooled = torch.zeros(sum(len(each) for each in boxes), num_values, k, k, dtype=maps.dtype)
    regions = [(image, box) for image, each in enumerate(boxes) for box in each.tensor.tolist()]
    for m, (image, box) in enumerate(regions):
        in_cells = [v / stride for v in box]
        for c in range(num_values):
            for i in range(k):
                for j in range(k):
                    channel = maps[image, c * k * k + i * k + j]
                    pooled[m, c, i, j] = SLOW[pooler_type](channel, in_cells, i, j, k)
    return pooled


@pytest.mark.parametrize("pooler_type", TYPES)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("case", BOXES)
def test_equals_the_loops(case, k, pooler_type):
    maps = torch.randn(2, 2 * k * k, 6, 9, dtype=torch.float64)
    boxes = boxes_of(*BOXES[case])
    pooled = PositionSensitivePooler(num_bins=k, stride=4, pooler_type=pooler_type)(maps, boxes)
    assert pooled.shape == (sum(len(each) for each in boxes), 2, k, k)
    torch.testing.assert_close(pooled, slow(pooler_type, maps, boxes, k, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooler_type", TYPES)
def test_order_of_channels(pooler_type):
    k, num_values = 3, 2
    maps = torch.arange(k * k * num_values, dtype=torch.float32).view(1, -1, 1, 1).expand(1, -1, 8, 8)
    pooled = PositionSensitivePooler(num_bins=k, stride=1, pooler_type=pooler_type)(
        maps.contiguous(), [Boxes(torch.tensor([[1.0, 1.0, 7.0, 7.0]]))]
    )
    assert pooled[0].tolist() == [
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]],
        [[9.0, 10.0, 11.0], [12.0, 13.0, 14.0], [15.0, 16.0, 17.0]],
    ]


def test_average_of_whole_cells_by_hand():
    # One map for each of 2 x 2 bins, all alike, cell (y, x) = 10 y + x. The box covers columns 1 to 3 and rows 0
    # and 1; the column in the middle belongs to both bins.
    rows, columns = torch.arange(4.0)[:, None], torch.arange(4.0)[None]
    maps = (10 * rows + columns).expand(1, 4, 4, 4).contiguous()
    pooled = PositionSensitivePooler(num_bins=2, stride=8)(maps, [Boxes(torch.tensor([[8.0, 0.0, 32.0, 16.0]]))])
    assert pooled.tolist() == [[[[1.5, 2.5], [11.5, 12.5]]]]


def test_the_last_row_and_column_of_a_map_are_pooled():
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 3, 3] = 16.0
    box = [Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]))]
    pooled = PositionSensitivePooler(num_bins=1, stride=1)(maps, box)
    assert pooled.flatten().tolist() == [1.0, 16.0]


def test_aligned_sampling_by_hand():
    # Cell (y, x) = x: its centre lies at x + 0.5, so the value at x is x - 0.5.
    maps = torch.arange(8.0).expand(1, 2 * 2, 8, 8).contiguous()
    pooler = PositionSensitivePooler(num_bins=2, stride=2, pooler_type="PSROIAlign", sampling_ratio=1)
    # In cells 1 to 4 across: samples at 1.75 and 3.25.
    pooled = pooler(maps, [Boxes(torch.tensor([[2.0, 4.0, 8.0, 8.0]]))])
    assert pooled.tolist() == [[[[1.25, 2.75], [1.25, 2.75]]]]


@pytest.mark.slow
@pytest.mark.parametrize("pooler_type", TYPES)
def test_gradients(pooler_type):
    pooler = PositionSensitivePooler(num_bins=2, stride=4, pooler_type=pooler_type)
    maps = torch.randn(2, 4, 6, 9, dtype=torch.float64, requires_grad=True)
    for case in ("inside", "last cells", "partly outside", "wholly outside", "no area"):
        boxes = boxes_of(*BOXES[case])
        assert torch.autograd.gradcheck(lambda x, boxes=boxes: pooler(x, boxes), (maps,)), case


def test_a_bin_gives_its_gradient_to_its_own_map_alone():
    maps = torch.zeros(1, 4, 4, 4, requires_grad=True)
    pooled = PositionSensitivePooler(num_bins=2, stride=1)(maps, [Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0]]))])
    pooled[0, 0, 1, 0].backward()
    expected = torch.zeros(4, 4, 4)
    expected[2, 2:, :2] = 0.25  # row 1, column 0 of the bins: the third map, four cells
    assert torch.equal(maps.grad[0], expected)


@pytest.mark.parametrize("pooler_type", TYPES)
def test_no_region_leaves_a_gradient_of_zero(pooler_type):
    maps = torch.randn(2, 8, 6, 9, requires_grad=True)
    pooled = PositionSensitivePooler(num_bins=2, stride=4, pooler_type=pooler_type)(maps, boxes_of([], []))
    assert pooled.shape == (0, 2, 2, 2)
    pooled.sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooler_type", TYPES)
def test_half_precision_is_pooled_in_float32(pooler_type, dtype):
    pooler = PositionSensitivePooler(num_bins=2, stride=4, pooler_type=pooler_type)
    maps, boxes = torch.randn(2, 8, 6, 9).to(dtype), boxes_of(*BOXES["inside"])
    assert torch.equal(pooler(maps, boxes), pooler(maps.float(), boxes))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_bins": 0}, ["MODEL.RFCN.NUM_BINS", "0", "1 or more"]),
        ({"pooler_type": "ROIAlign"}, ["MODEL.RFCN.POOLER_TYPE", "'ROIAlign'", "'PSROIPool'", "'PSROIAlign'"]),
        ({"sampling_ratio": 0}, ["MODEL.RFCN.SAMPLING_RATIO", "0", "1 or more"]),
    ],
)
def test_bad_options(arguments, words):
    with pytest.raises(ValueError) as error:
        PositionSensitivePooler(**{"num_bins": 2, "stride": 4, **arguments})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_it_names_its_options():
    assert "PSROIPool, num_bins=3, stride=8" in repr(PositionSensitivePooler(num_bins=3, stride=8))
