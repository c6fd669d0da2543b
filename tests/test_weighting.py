"""lambda over time."""

import math

import pytest

from qmimic_d2.modeling.weighting import SCHEDULES, MimicWeight


def test_constant():
    weight = MimicWeight(2.5)
    assert [weight.at(iteration) for iteration in (0, 1, 10**9)] == [2.5, 2.5, 2.5]
    # the length belongs to the warm-up alone
    assert MimicWeight(2.5, "constant", 500).at(0) == 2.5


def test_warmup_rises_linearly_from_zero():
    weight = MimicWeight(8.0, "warmup", 4)
    assert [weight.at(iteration) for iteration in range(7)] == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_a_warmup_of_no_iterations_is_none():
    assert MimicWeight(3.0, "warmup", 0).at(0) == 3.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_zero_stays_zero(schedule):
    weight = MimicWeight(0.0, schedule, 10)
    assert [weight.at(iteration) for iteration in (0, 5, 10, 100)] == [0.0] * 4


def test_weights_are_floats():
    assert isinstance(MimicWeight(1).at(0), float)
    assert isinstance(MimicWeight(1, "warmup", 3).at(1), float)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, -math.inf])
def test_bad_weight(weight):
    with pytest.raises(ValueError) as error:
        MimicWeight(weight)
    for part in ("MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", repr(weight), "finite number >= 0"):
        assert part in str(error.value)


def test_bad_schedule():
    with pytest.raises(ValueError) as error:
        MimicWeight(1.0, "cosine")
    for part in ("MODEL.QMIMIC.MIMIC.SCHEDULE", "'cosine'", "['constant', 'warmup']"):
        assert part in str(error.value)


def test_bad_warmup():
    with pytest.raises(ValueError) as error:
        MimicWeight(1.0, "warmup", -1)
    for part in ("MODEL.QMIMIC.MIMIC.WARMUP_ITERS", "-1", ">= 0"):
        assert part in str(error.value)
