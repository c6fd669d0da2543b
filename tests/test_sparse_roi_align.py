"""ROIAlign as a sparse matrix against torchvision's kernel: values and gradients."""

import itertools

import pytest
import torch
from torchvision.ops import roi_align

from qmimic_d2.modeling.roi_pooling import SparseRoIAlign, sparse_roi_align

# Index of the image, then the box in pixels; the maps below have 6 x 9 cells of 4 pixels.
ROIS = {
    "inside": [[0, 3.1, 2.2, 20.3, 15.4], [0, 8, 4, 16, 12], [1, 0.5, 0.7, 35.1, 23.3]],
    "whole map": [[0, 0, 0, 36, 24], [1, 0, 0, 36, 24]],
    "partly outside": [[0, -10.3, -7.2, 9.1, 8.4], [0, 29.7, 15.2, 51.9, 40.1], [1, -20.1, -20.2, 60.3, 50.4]],
    "wholly outside": [[0, -90, -80, -40, -30], [0, 100, 2, 120, 9], [1, 3, 200, 9, 300]],
    "next to the border": [[0, -5, -5, -1, -1], [0, 36, 24, 40, 28], [1, 35.9, 23.9, 37, 26]],
    "zero size": [[0, 7, 5, 7, 5], [0, 9, 3, 9, 14], [1, 11, 6, 20, 6]],
    "tiny": [[0, 7.1, 5.2, 7.3, 5.3], [1, 12.5, 9.5, 13.1, 9.9]],
    "first image only": [[0, 3.3, 2.1, 21.7, 15.9]],
    "last image only": [[1, 3.3, 2.1, 21.7, 15.9], [1, 1, 1, 9, 9]],
    "none": [],
}


def pool(feature, rois, size, scale, sampling_ratio, aligned):
    shape = (len(feature), *feature.shape[2:])
    return sparse_roi_align(feature, SparseRoIAlign(rois, shape, size, scale, sampling_ratio, aligned))


def compare(feature, rois, size, scale, sampling_ratio, aligned, tolerance):
    results = []
    grad = None
    for function in (
        lambda x: pool(x, rois, size, scale, sampling_ratio, aligned),
        lambda x: roi_align(x, rois, (size, size), scale, sampling_ratio, aligned),
    ):
        x = feature.detach().clone().requires_grad_()
        y = function(x)
        grad = torch.randn_like(y) if grad is None else grad
        results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    assert results[0][0].is_contiguous()
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ROIS)
def test_equals_torchvision(case, sampling_ratio, aligned):
    rois = torch.tensor(ROIS[case], dtype=torch.float64).view(-1, 5)
    feature = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    for size in (1, 2, 5):
        compare(feature, rois, size, 0.25, sampling_ratio, aligned, tolerance=1e-12)


def test_regions_whose_corners_are_swapped():
    rois = torch.tensor([[0, 20.0, 15, 3, 2], [1, 30, 3, 8, 19]])
    feature = torch.randn(2, 3, 6, 9)
    for sampling_ratio, aligned in ((1, True), (2, True), (0, False), (2, False)):
        compare(feature, rois, 2, 0.25, sampling_ratio, aligned, tolerance=1e-5)
    # torchvision's kernel fails on a negative number of samples
    assert torch.equal(pool(feature, rois, 2, 0.25, 0, True), torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_equals_torchvision_on_random_regions(sampling_ratio, aligned):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        corners = torch.rand(40, 2, dtype=dtype) * 160 - 16
        extents = torch.rand(40, 2, dtype=dtype) ** 2 * 150
        images = torch.arange(40, dtype=dtype).div(10, rounding_mode="floor")[:, None]
        rois = torch.cat([images, corners, corners + extents], dim=1)
        rois = rois[(images[:, 0] != 2)]  # an image without a region between others
        feature = torch.randn(4, 5, 17, 16, dtype=dtype)
        compare(feature, rois, 7, 1 / 8, sampling_ratio, aligned, tolerance)


def test_other_layouts_and_scales():
    rois = torch.tensor(ROIS["inside"])
    feature = torch.randn(2, 3, 6, 9).to(memory_format=torch.channels_last)
    for feature, scale in itertools.product((feature, feature.transpose(2, 3), feature[:, ::2]), (1.0, 0.25, 1 / 3)):
        compare(feature, rois, 3, scale, 0, True, tolerance=1e-5)


def test_one_cell():
    rois = torch.tensor([[0, 0.0, 0, 8, 8], [0, -3, 1, 4, 30]])
    compare(torch.randn(1, 2, 1, 1), rois, 2, 0.125, 0, True, tolerance=1e-6)


def test_values_by_hand():
    # cells 0..3 in a row; one bin over [0.5, 2.5) of the map's own frame, sampled at its middle 1.5 - 0.5
    feature = torch.arange(4.0).view(1, 1, 1, 4)
    rois = torch.tensor([[0, 0.5, 0.0, 2.5, 1.0]])
    assert pool(feature, rois, 1, 1.0, 1, True).item() == 1.0
    assert pool(feature, rois, 1, 1.0, 1, False).item() == 1.5
    # samples at 0.75 and 1.75 - 0.5 average to the same on a ramp
    assert pool(feature, rois, 1, 1.0, 2, True).item() == 1.0
    assert pool(feature, rois, 2, 1.0, 1, True)[0, 0, 0].tolist() == [0.5, 1.5]


def test_gradient_is_the_derivative():
    rois = torch.tensor(ROIS["partly outside"], dtype=torch.float64)
    feature = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, rois, 2, 0.25, 2, True), feature)


def test_gradients_flow_to_the_map_alone():
    rois = torch.tensor(ROIS["inside"], requires_grad=True)
    feature = torch.randn(2, 3, 6, 9, requires_grad=True)
    pool(feature, rois, 2, 0.25, 0, True).sum().backward()
    assert rois.grad is None and feature.grad.abs().sum() > 0


@pytest.mark.parametrize("sampling_ratio", [0, 2])  # with and without cells that a bin does not use
def test_parts_of_whole_images(sampling_ratio):
    counts = [3, 0, 2, 9, 1, 0]
    corners = torch.rand(sum(counts), 2) * 20
    images = torch.repeat_interleave(torch.tensor(counts))[:, None]
    rois = torch.cat([images, corners, corners + torch.rand(sum(counts), 2) * 40], dim=1)
    matrix = SparseRoIAlign(rois, (6, 7, 9), 2, 0.25, sampling_ratio, True)
    feature = torch.randn(6, 7, 9, 5)
    pooled = matrix.pool(feature)
    gradient = matrix.spread(pooled)
    # bins of a part: as many images as have 20, but one or more
    assert list(matrix.parts(20)) == [(0, 3), (3, 4), (4, 6)]
    assert list(matrix.parts(1)) == [(index, index + 1) for index in range(6)]
    assert list(matrix.parts(1000)) == [(0, 6)]
    for most_bins in (1, 20, 1000):
        parts = list(matrix.parts(most_bins))
        assert torch.equal(torch.cat([matrix.pool(feature, *images) for images in parts]), pooled)
        spread = [matrix.spread(matrix.pool(feature, *images), *images) for images in parts]
        assert torch.equal(torch.cat(spread), gradient)


def test_inputs_stay_as_they_are():
    rois, feature = torch.tensor(ROIS["partly outside"]), torch.randn(2, 3, 6, 9)
    before = rois.clone(), feature.clone()
    pool(feature, rois, 2, 0.25, 0, True)
    assert torch.equal(rois, before[0]) and torch.equal(feature, before[1])


def test_full_precision_under_autocast():
    rois = torch.tensor(ROIS["inside"])
    feature = torch.randn(2, 3, 6, 9)
    expected = pool(feature, rois, 2, 0.25, 0, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool(feature, rois, 2, 0.25, 0, True)
    assert pooled.dtype == torch.float32 and torch.equal(pooled, expected)


@pytest.mark.parametrize("images", [[1, 0], [0, 1, 0], [0, 2], [2]])
def test_regions_out_of_order_are_refused(images):
    rois = torch.tensor([[image, 1.0, 1, 5, 5] for image in images])
    with pytest.raises(ValueError, match=r"rois\[:, 0\] must rise from 0 to at most 1.*sort the regions"):
        pool(torch.randn(2, 3, 6, 9), rois, 2, 0.25, 0, True)
