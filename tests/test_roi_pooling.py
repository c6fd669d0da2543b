"""LevelPooler against Detectron2's ROIPooler, on one and on several levels."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from qmimic_d2.modeling import roi_pooling
from qmimic_d2.modeling.quantizer import UniformQuantizer
from qmimic_d2.modeling.roi_pooling import POOLER_TYPES, LevelPooler

FPN_STRIDES = (4, 8, 16, 32)


def shapes(*strides):
    return {f"p{index}": ShapeSpec(channels=3, stride=stride) for index, stride in enumerate(strides)}


def random_boxes(num_images=2, num_boxes=20, size=500.0):
    boxes = []
    for _ in range(num_images):
        corners = torch.rand(num_boxes, 2) * size * 0.7
        extents = torch.rand(num_boxes, 2) ** 3 * size + 1
        boxes.append(Boxes(torch.cat([corners, corners + extents], dim=1)))
    return boxes


def random_maps(strides, num_images=2, size=512, dtype=torch.float32):
    return [torch.randn(num_images, 3, size // stride, size // stride, dtype=dtype) for stride in strides]


def detectron2_pooler(strides, pooler_type, resolution=3, sampling_ratio=2):
    scales = [1.0 / stride for stride in strides]
    return ROIPooler(resolution, scales, sampling_ratio, pooler_type)


def pool_all_levels(pooler, maps, boxes):
    """The regions of all levels, in the order of the boxes."""
    rois_of_level = pooler.assign(boxes)
    pooled = torch.cat([pooler.pool(level, x, rois) for level, (x, rois) in enumerate(zip(maps, rois_of_level))])
    rois = torch.cat(rois_of_level)
    images = torch.cat([torch.full((len(each),), float(index)) for index, each in enumerate(boxes)])
    wanted = torch.cat([images[:, None], Boxes.cat(boxes).tensor], dim=1)
    order = [int((rois == row).all(dim=1).nonzero()[0]) for row in wanted]
    assert sorted(order) == list(range(len(rois))), "every region belongs to one level"
    return pooled[order]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("strides", [(8,), (16,), FPN_STRIDES, (16, 32)])
@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_equals_detectron2(pooler_type, strides, requires_grad):
    boxes = random_boxes()
    maps = [x.requires_grad_(requires_grad) for x in random_maps(strides)]
    ours = pool_all_levels(LevelPooler(shapes(*strides), pooler_type, 3, 2), maps, boxes)
    theirs = detectron2_pooler(strides, pooler_type)(maps, boxes)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if requires_grad:
        grad = torch.randn_like(ours)
        for mine, other in zip(torch.autograd.grad(ours, maps, grad), torch.autograd.grad(theirs, maps, grad)):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_regions_go_to_the_level_of_their_size():
    # level 4 (stride 16) holds 224 pixels, each halving goes down by one; both ends are clamped
    sides = [1, 56, 111.5, 112.5, 223, 225, 300, 449, 2000]
    boxes = [Boxes(torch.tensor([[10.0, 5, 10 + side, 5 + side] for side in sides]))]
    rois_of_level = LevelPooler(shapes(*FPN_STRIDES), "ROIAlignV2", 7, 0).assign(boxes)
    assert [(rois[:, 3] - 10).tolist() for rois in rois_of_level] == [
        [1.0, 56.0, 111.5],
        [112.5, 223.0],
        [225.0, 300.0],
        [449.0, 2000.0],
    ]


def test_regions_carry_the_index_of_their_image():
    boxes = [Boxes(torch.tensor([[0.0, 0, 4, 4]])), Boxes(torch.zeros(0, 4)), Boxes(torch.tensor([[1.0, 2, 3, 4]] * 2))]
    (rois,) = LevelPooler(shapes(8), "ROIAlign", 2, 0).assign(boxes)
    assert rois.tolist() == [[0, 0, 0, 4, 4], [2, 1, 2, 3, 4], [2, 1, 2, 3, 4]]
    first, _ = LevelPooler(shapes(8, 16), "ROIAlign", 2, 0).assign(boxes)
    assert torch.equal(first, rois)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("strides", [(8,), (8, 16)])
@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_no_region(pooler_type, strides, requires_grad):
    pooler = LevelPooler(shapes(*strides), pooler_type, 2, 0)
    rois_of_level = pooler.assign([Boxes(torch.zeros(0, 4))] * 2)
    assert [rois.shape for rois in rois_of_level] == [(0, 5)] * len(strides)
    x = torch.randn(2, 3, 4, 4, requires_grad=requires_grad)
    pooled = pooler.pool(0, x, rois_of_level[0])
    assert pooled.shape == (0, 3, 2, 2) and pooled.requires_grad == requires_grad
    if requires_grad:
        pooled.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_max_pooling_keeps_codes_and_averaging_does_not():
    quantizer = UniformQuantizer(0.5)
    (x,), boxes = random_maps((8,), size=256), random_boxes(size=250)
    for pooler_type in POOLER_TYPES:
        pooler = LevelPooler(shapes(8), pooler_type, 3, 2)
        (rois,) = pooler.assign(boxes)
        pooled_codes, pooled = pooler.pool(0, quantizer(x), rois), pooler.pool(0, x, rois)
        takes_maxima = pooler_type == "ROIPool"
        assert torch.equal(quantizer(pooled_codes), pooled_codes) == takes_maxima
        assert torch.equal(quantizer(pooled), pooled_codes) == takes_maxima, "Q(pool(x)) = pool(Q(x))"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "pooler_type, dtype, is_sparse",
    [
        ("ROIAlignV2", torch.float32, True),
        ("ROIAlign", torch.float64, True),
        ("ROIPool", torch.float32, False),
    ],
)
def test_a_sparse_matrix_averages_on_a_cpu(pooler_type, dtype, is_sparse, requires_grad, monkeypatch):
    calls = []
    sparse = roi_pooling.sparse_roi_align
    monkeypatch.setattr(roi_pooling, "sparse_roi_align", lambda *args: calls.append(args) or sparse(*args))
    x = torch.randn(1, 2, 64, 64, dtype=dtype, requires_grad=requires_grad)
    pooler = LevelPooler(shapes(4), pooler_type, 2, 0)
    boxes = random_boxes(1, 5, size=200.0)
    (rois,) = pooler.assign(boxes)
    pooled = pooler.pool(0, x, rois)
    assert pooled.dtype == dtype and bool(calls) == pooler.is_sparse(x) == is_sparse
    detectron2s = detectron2_pooler((4,), pooler_type, 2, 0)([x], boxes)
    torch.testing.assert_close(pooled, detectron2s, rtol=1e-4, atol=1e-4)


def test_16_bit_maps():
    pooler = LevelPooler(shapes(8), "ROIAlignV2", 2, 2)
    (rois,) = pooler.assign(random_boxes(2, 5, size=100.0))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float16, requires_grad=True)
    pooled = pooler.pool(0, x, rois)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), pooler.pool(0, x.float(), rois), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (
            (shapes(8), "ROIAlignRotated", 7, 0),
            ("POOLER_TYPE", "'ROIAlignRotated'", "'ROIAlignV2', 'ROIAlign', 'ROIPool'"),
        ),
        ((shapes(8), "ROIPool", 0, 0), ("POOLER_RESOLUTION", "is 0", "1 or more")),
        ((shapes(8), "ROIPool", 7, -1), ("POOLER_SAMPLING_RATIO", "is -1", "0 (adaptive) or more")),
        ((shapes(8, 32), "ROIPool", 7, 0), ("IN_FEATURES", "['p0', 'p1']", "[8, 32]", "double")),
        ((shapes(16, 8), "ROIPool", 7, 0), ("IN_FEATURES", "[16, 8]", "Order them so")),
        ((shapes(6, 12), "ROIPool", 7, 0), ("IN_FEATURES", "[6, 12]", "powers of two")),
    ],
)
def test_bad_settings(arguments, parts):
    with pytest.raises(ValueError) as error:
        LevelPooler(*arguments)
    assert "MODEL.QMIMIC.MIMIC." in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_one_map_may_have_any_stride():
    boxes = [Boxes(torch.tensor([[0.0, 0, 12, 12]]))]
    pooler = LevelPooler(shapes(6), "ROIAlign", 1, 1)
    (rois,) = pooler.assign(boxes)
    assert pooler.pool(0, torch.full((1, 3, 4, 4), 2.5), rois).flatten().tolist() == [2.5] * 3
