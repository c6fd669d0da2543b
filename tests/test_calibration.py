"""Calibration: statistics by hand on a fake backbone, default strides, AP per stride, the recommendation."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from helpers import RESNET_FPN, batch, randomize, seeded_model, tiny_cfg
from tiny_coco import registered_coco
from torch import nn

from qmimic_d2 import analysis
from qmimic_d2.analysis import feature_statistics
from qmimic_d2.modeling import PowerOfTwoQuantizer, UniformQuantizer, attach_quantizer
from qmimic_d2.modeling.quantizer_hook import attached_quantizer


class Identity(Backbone):
    """Gives the image itself as its feature "f"; and as "half", every second row and column of it."""

    def forward(self, x):
        return {"f": x, "half": x[:, :, ::2, ::2]}

    def output_shape(self):
        return {"f": ShapeSpec(channels=1, stride=1), "half": ShapeSpec(channels=1, stride=2)}


class FakeDetector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Identity()

    def preprocess_image(self, batched_inputs):
        return ImageList.from_tensors([each["image"] for each in batched_inputs])


def loader_of(*rows):
    """One image per row of values, each in a batch of its own."""
    return [[{"image": torch.tensor(row, dtype=torch.float32).reshape(1, 1, -1)}] for row in rows]


def measure(*rows, features=("f",)):
    return analysis.measure_features(FakeDetector(), loader_of(*rows), features)["f"]


def codes_of(quantizer, *rows):
    return analysis.measure_codes(FakeDetector(), loader_of(*rows), ["f"], [quantizer])["f"][0]


# ------------------------------------------------------------------------------------- features


def test_statistics_of_a_feature_over_two_images():
    statistics = measure([0.0, 0.0, 1.0], [3.0, 0.0])
    assert statistics.num_values == statistics.percentile_sample == 5
    assert statistics.zero_share == pytest.approx(3 / 5)
    assert statistics.negative_share == 0.0
    assert statistics.mean == pytest.approx(4 / 5)
    assert statistics.rms == pytest.approx(math.sqrt(10 / 5))
    assert (statistics.min, statistics.max) == (0.0, 3.0)
    # sorted 0 0 0 1 3: the 50th percentile is the middle one, the 90th lies 0.6 of the way from 1 to 3
    assert statistics.percentiles[50.0] == 0.0
    assert statistics.percentiles[90.0] == pytest.approx(2.2)
    assert list(statistics.percentiles) == [50.0, 90.0, 99.0, 99.9]
    assert not analysis.is_signed(statistics)


def test_negative_values_make_a_feature_signed():
    statistics = measure([-1.0, 0.0, 2.0, -3.0])
    assert statistics.negative_share == 0.5
    assert statistics.min == -3.0
    assert analysis.is_signed(statistics)


def test_cells_in_the_padding_do_not_count():
    images = [{"image": torch.ones(1, 2, 2)}, {"image": torch.full((1, 3, 4), 2.0)}]
    statistics = analysis.measure_features(FakeDetector(), [images], ["f", "half"])
    assert statistics["f"].num_values == 4 + 12
    assert statistics["half"].num_values == 1 + 2 * 2
    assert statistics["f"].zero_share == statistics["half"].zero_share == 0.0
    assert statistics["f"].mean == pytest.approx((4 * 1 + 12 * 2) / 16)


def test_percentiles_of_a_bounded_sample(monkeypatch):
    monkeypatch.setattr(feature_statistics, "SAMPLE_SIZE", 1000)
    rows = torch.rand(20, 500, generator=torch.Generator().manual_seed(7)).tolist()
    statistics = measure(*rows)
    assert statistics.num_values == 10000
    assert 400 < statistics.percentile_sample <= 1000
    assert statistics.percentiles[50.0] == pytest.approx(0.5, abs=0.08)
    assert statistics.max == pytest.approx(max(max(row) for row in rows))
    assert measure(*rows) == statistics, "the sample must be the same every time"


def test_features_are_measured_before_the_models_own_quantizer():
    model = FakeDetector().train()
    own = attach_quantizer(model.backbone, UniformQuantizer(10.0), ["f"])
    statistics = analysis.measure_features(model, loader_of([1.0, 2.0]), ["f"])["f"]
    assert statistics.max == 2.0
    assert attached_quantizer(model.backbone).quantizer is own.quantizer
    assert model.training
    assert model.backbone(torch.ones(1, 1, 1, 1))["f"].item() == 0.0


@pytest.mark.parametrize(
    "loader, features, message",
    [
        ([], ["f"], "no image"),
        (loader_of([1.0]), ["g"], "'g'"),
        (loader_of([1.0, float("nan")]), ["f"], "'f' has NaN"),
        (loader_of([float("inf")]), ["f"], "'f' has NaN or infinite"),
    ],
)
def test_features_that_cannot_be_measured(loader, features, message):
    with pytest.raises(ValueError, match=message):
        analysis.measure_features(FakeDetector(), loader, features)


def test_collecting_nothing():
    empty = torch.zeros(0)
    for collector in (
        feature_statistics.FeatureDistribution(),
        feature_statistics.CodeUse(UniformQuantizer(1.0)),
    ):
        collector.add(empty)
        with pytest.raises(ValueError, match="no value"):
            collector.result()


# ---------------------------------------------------------------------------------------- codes


def test_uniform_codes_by_hand():
    # codes 0, 0, 1, 1 (a half goes down), 3, 0
    codes = codes_of(UniformQuantizer(1.0), [0.0, 0.4, 0.6], [1.5, 2.6, 0.5])
    assert (codes.codes_used, codes.largest_code) == (3, 3)
    assert codes.zero_share == pytest.approx(3 / 6)
    squares = 0.4**2 + 0.6**2 + 1.5**2 + 2.6**2 + 0.5**2
    errors = 0.4**2 + 0.4**2 + 0.5**2 + 0.4**2 + 0.5**2
    assert codes.relative_error == pytest.approx(math.sqrt(errors / squares))
    assert codes.cosine == pytest.approx((0.6 + 1.5 + 3 * 2.6) / math.sqrt(squares * (1 + 1 + 9)))
    assert codes.saturation == 0.0


def test_saturation_of_a_bounded_dictionary():
    # codes 0, 1, 2 of stride 0.5; beyond 1.0 lie 1.1 and 7.0, and 1.0 does not
    codes = codes_of(UniformQuantizer(0.5, num_codes=3), [0.1, 1.0, 1.1, 7.0])
    assert (codes.codes_used, codes.largest_code) == (2, 2)
    assert codes.saturation == pytest.approx(2 / 4)


def test_signed_codes_count_on_both_sides():
    quantizer = UniformQuantizer(1.0, num_codes=3, signed=True)
    codes = codes_of(quantizer, [-2.0, -5.0, 0.2, 1.0, 3.0])
    assert (codes.codes_used, codes.largest_code) == (4, 2)
    assert codes.saturation == pytest.approx(2 / 5)
    assert codes.zero_share == pytest.approx(1 / 5)


def test_power_of_two_codes():
    # 0, 1, 2, 4, 8: indices 0 to 4; 3.0 lies half-way between 2 and 4 and goes down
    codes = codes_of(PowerOfTwoQuantizer(1.0), [0.0, 1.0, 3.0, 9.0])
    assert (codes.codes_used, codes.largest_code) == (4, 4)
    assert codes.relative_error == pytest.approx(math.sqrt((1 + 1) / (1 + 9 + 81)))


def test_far_apart_codes_are_counted_too():
    assert codes_of(UniformQuantizer(1e-3), [0.0, 5.0, 2000.0]).codes_used == 3


def test_a_feature_that_is_zero_everywhere():
    codes = codes_of(UniformQuantizer(1.0), [0.0, 0.0])
    assert (codes.relative_error, codes.cosine, codes.codes_used) == (0.0, 0.0, 1)
    erased = codes_of(UniformQuantizer(10.0), [1.0, 2.0])
    assert (erased.relative_error, erased.cosine) == (1.0, 0.0)


def test_codes_of_several_features_and_quantizers():
    images = [[{"image": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])}]]
    quantizers = [UniformQuantizer(1.0), UniformQuantizer(4.0)]
    codes = analysis.measure_codes(FakeDetector(), images, ["f", "half"], quantizers)
    assert [each.largest_code for each in codes["f"]] == [4, 1]
    assert [each.largest_code for each in codes["half"]] == [1, 0]


def test_feature_pyramid_of_a_real_model():
    model = randomize(seeded_model(tiny_cfg(*RESNET_FPN)))
    inputs = batch((64, 48), (40, 64))
    statistics = analysis.measure_features(model, [inputs], ["p3", "p5"])
    assert all(analysis.is_signed(each) for each in statistics.values())
    # stride 8, 8 channels; 64 x 48 and 40 x 64 pixels
    assert statistics["p3"].num_values == 8 * (8 * 6 + 5 * 8)
    assert statistics["p5"].num_values == 8 * (2 * 2 + 2 * 2)
    assert model.training


# -------------------------------------------------------------------------------------- strides


def test_default_strides_span_the_rms():
    strides = analysis.default_strides({"f": measure([1.0, 1.0, 1.0])})
    assert strides == [0.031, 0.062, 0.12, 0.25, 0.5, 1.0, 2.0]


def test_default_strides_of_several_features_take_the_rms_of_all_values():
    strides = analysis.default_strides({"a": measure([7.0]), "b": measure([1.0] * 3)})
    assert strides[5] == pytest.approx(float(f"{math.sqrt(52 / 4):.2g}"))


def test_no_stride_suits_a_dead_feature():
    with pytest.raises(ValueError, match="0 everywhere"):
        analysis.default_strides({"f": measure([0.0])})


@pytest.mark.parametrize(
    "strides, aps, limit, expected",
    [
        ([0.25, 0.5, 1.0], [70.0, 69.6, 60.0], 0.5, 0.5),
        ([1.0, 0.25, 0.5], [60.0, 70.0, 69.6], 0.5, 0.5),
        ([0.25, 0.5], [71.0, 72.0], 0.5, 0.5),
        ([0.25, 0.5, 1.0], [69.9, 69.0, 69.7], 0.5, 1.0),
        ([0.25, 0.5], [60.0, 50.0], 0.5, None),
        ([0.25, 0.5], [69.5, 69.4], 0.5, 0.25),
        ([0.25, 0.5], [70.0, 69.9], 0.0, 0.25),
        ([0.25, 0.5], [70.0, float("nan")], 100.0, 0.25),
        ([], [], 0.5, None),
    ],
)
def test_recommended_stride(strides, aps, limit, expected):
    assert analysis.recommend_stride(strides, aps, 70.0, limit) == expected


def test_recommended_stride_is_bounded_for_the_student():
    strides, aps = [0.25, 0.5, 1.0], [70.0, 69.9, 69.8]
    assert analysis.recommend_stride(strides, aps, 70.0, 0.5, max_stride=0.6) == 0.5
    assert analysis.recommend_stride(strides, aps, 70.0, 0.5, max_stride=0.5) == 0.5
    assert analysis.recommend_stride(strides, aps, 70.0, 0.5, max_stride=0.2) is None


def test_a_loss_of_exactly_the_limit_qualifies_in_spite_of_rounding():
    assert 64.4 - 63.9 > 0.5
    assert analysis.recommend_stride([1.0], [63.9], 64.4, 0.5) == 1.0


@pytest.mark.parametrize("full_precision", [0.0, float("nan")])
def test_a_teacher_that_detects_nothing_gives_no_recommendation(full_precision):
    assert analysis.recommend_stride([1.0], [0.0], full_precision, 0.5) is None


# ------------------------------------------------------------------------------------------- AP


def test_each_quantizer_is_in_force_during_its_evaluation():
    model = FakeDetector()
    own = attach_quantizer(model.backbone, UniformQuantizer(3.0), ["half"])

    def evaluate(current):
        maps = current.backbone(torch.full((1, 1, 2, 2), 1.3))
        assert maps["half"].max() == pytest.approx(1.3)
        return maps["f"].max()

    quantizers = [None, UniformQuantizer(0.5), UniformQuantizer(1.0)]
    aps = analysis.measure_ap(model, ["f"], quantizers, evaluate)
    assert aps == pytest.approx([1.3, 1.5, 1.0])
    restored = attached_quantizer(model.backbone)
    assert (restored.quantizer, restored.features) == (own.quantizer, ["half"])


def test_the_quantizer_comes_off_when_an_evaluation_fails():
    model = FakeDetector()

    def fail(current):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        analysis.measure_ap(model, ["f"], [UniformQuantizer(1.0)], fail)
    assert attached_quantizer(model.backbone) is None


# --------------------------------------------------------------------------------------- images


def test_evenly_spaced():
    assert analysis.evenly_spaced("abcdef", 3) == ["a", "c", "e"]
    assert analysis.evenly_spaced([1, 2, 3], 5) == [1, 2, 3]
    assert analysis.evenly_spaced([1, 2, 3, 4, 5], 2) == [1, 3]
    assert analysis.evenly_spaced([], 2) == []


def test_calibration_loader(tmp_path):
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 32, "DATALOADER.NUM_WORKERS", 0)
    with registered_coco(tmp_path, count=5) as name:
        loader, available = analysis.build_calibration_loader(cfg, [name], 2)
        assert (len(loader), available) == (2, 5)
        ids = [[each["image_id"] for each in inputs] for inputs in loader]
        assert ids == [[10], [12]]
        assert [inputs[0]["image"].shape for inputs in loader] == [(3, 32, 32)] * 2, "it can be read again"
        assert len(analysis.build_calibration_loader(cfg, [name], 100)[0]) == 5
        with pytest.raises(ValueError, match="num_images is 0"):
            analysis.build_calibration_loader(cfg, [name], 0)
    with pytest.raises(KeyError, match="not_there"):
        analysis.build_calibration_loader(cfg, ["not_there"], 1)
