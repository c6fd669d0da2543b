"""lambda over time."""

import math

import pytest
import torch
from helpers import tiny_cfg

from qmimic_d2.modeling.mimic.weight import SCHEDULES, BalancedWeight, MimicWeight, build_mimic_weight

MIMIC = "MODEL.QMIMIC.MIMIC"


def values(weight, iterations):
    return [weight.at(iteration) for iteration in iterations]


def test_constant():
    assert values(MimicWeight(weight=2.5), (0, 1, 10**9)) == [2.5, 2.5, 2.5]
    # the length belongs to the warm-up alone
    assert MimicWeight(weight=2.5, schedule="constant", warmup_iters=500).at(0) == 2.5


def test_warmup_rises_linearly_from_zero():
    weight = MimicWeight(weight=8.0, schedule="warmup", warmup_iters=4)
    assert values(weight, range(7)) == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_a_warmup_of_no_iterations_is_none():
    assert MimicWeight(weight=3.0, schedule="warmup", warmup_iters=0).at(0) == 3.0


def test_cosine_falls_to_zero_at_the_end():
    weight = MimicWeight(weight=8.0, schedule="cosine", max_iter=6)
    # 60, 90 and 120 degrees
    assert values(weight, (0, 2, 3, 4, 6, 7)) == pytest.approx([8.0, 6.0, 4.0, 2.0, 0.0, 0.0], abs=1e-12)


def test_step_multiplies_at_every_step():
    weight = MimicWeight(weight=8.0, schedule="step", steps=(2, 5), gamma=0.5)
    assert values(weight, (0, 1, 2, 4, 5, 100)) == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["constant", "warmup", "cosine", "step"])
def test_stop(schedule):
    weight = MimicWeight(weight=1.0, schedule=schedule, max_iter=10, steps=(8,), stop_iter=5)
    assert weight.at(4) > 0.0
    assert values(weight, (5, 6, 100)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_zero_stays_zero(schedule):
    make = BalancedWeight if schedule == "balanced" else MimicWeight
    weight = make(weight=0.0, schedule=schedule, warmup_iters=10, steps=(5,))
    assert values(weight, (0, 5, 10, 100)) == [0.0] * 4
    assert not weight.wants_balance(0)


def test_weights_are_floats():
    assert isinstance(MimicWeight(weight=1).at(0), float)
    assert isinstance(MimicWeight(weight=1, schedule="warmup", warmup_iters=3).at(1), float)


# --------------------------------------------------------------------------------------------- balanced


def balanced(**arguments):
    return BalancedWeight(**{"weight": 100.0, "schedule": "balanced", "share": 0.5, **arguments})


def test_balanced_begins_with_the_weight_and_forgets_it_at_the_first_measurement():
    for start in (0.01, 1.0, 100.0):
        weight = balanced(weight=start, share=0.75)
        assert weight.at(0) == start
        weight.balance(detection_norm=6.0, mimic_norm=2.0)
        # 0.75 / 0.25 * 6 / 2
        assert weight.at(0) == pytest.approx(9.0, rel=1e-12)


def test_balanced_reaches_the_wanted_share():
    weight = balanced(share=0.3)
    for _ in range(3):
        weight.balance(0.5, 40.0)
    mimic = weight.at(30) * 40.0
    assert mimic / (mimic + 0.5) == pytest.approx(0.3, rel=1e-12)


def test_balanced_takes_the_running_geometric_mean():
    weight = balanced(share=0.5, momentum=0.5)
    weight.balance(1.0, 1.0)
    weight.balance(8.0, 1.0)
    # weights 1/3 and 2/3 once the start's bias is corrected: 8^(2/3)
    assert weight.at(20) == pytest.approx(4.0, rel=1e-12)
    assert balanced(share=0.5, momentum=0.0).at(0) == 100.0


def test_balanced_without_momentum_follows_the_last_measurement():
    weight = balanced(momentum=0.0)
    for norm in (3.0, 5.0):
        weight.balance(norm, 1.0)
        assert weight.at(0) == pytest.approx(norm, rel=1e-12)


def test_balanced_is_bounded():
    weight = balanced(bounds=(0.1, 10.0))
    weight.balance(1e9, 1e-9)
    assert weight.at(1) == pytest.approx(10.0, rel=1e-12)
    weight = balanced(bounds=(0.1, 10.0))
    weight.balance(1e-9, 1e9)
    assert weight.at(1) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("norms, rests, wanted", [((1e3, 1e-3), "10", "1e+06"), ((1e-3, 1e3), "0.1", "1e-06")])
def test_a_weight_at_its_bound_is_reported_once(caplog, norms, rests, wanted):
    weight = balanced(bounds=(0.1, 10.0))
    weight.balance(1.0, 1.0)
    assert caplog.messages == []
    weight = balanced(bounds=(0.1, 10.0))
    for _ in range(3):
        weight.balance(*norms)
    (message,) = caplog.messages
    assert f"rests at {rests}, a bound of MODEL.QMIMIC.MIMIC.BALANCE_BOUNDS [0.1, 10.0]" in message
    assert f"BALANCE_SHARE 0.5 takes a weight of {wanted}" in message


def test_the_share_at_a_bound_is_reported(caplog):
    weight = balanced(bounds=(0.1, 10.0), share=0.8)
    weight.balance(10.0, 1.0)
    # lambda of 10 makes both norms equal, one of 40 would give 0.8
    assert "has 0.5 of the gradient" in caplog.text and "a weight of 40" in caplog.text


def test_a_weight_that_nothing_balances_is_reported_once(caplog):
    weight = balanced(weight=3.0)
    for _ in range(9):
        weight.balance(2.0, 0.0)
    assert caplog.messages == []
    for _ in range(5):
        weight.balance(2.0, 0.0)
    (message,) = caplog.messages
    assert "10 measurements in a row" in message and "LOSS_WEIGHT 3" in message
    assert "norm 2, that of the mimic 0" in message
    caplog.clear()
    weight = balanced()
    weight.balance(1.0, 1.0)
    for _ in range(20):
        weight.balance(2.0, 0.0)
    assert caplog.messages == []


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_balanced_passes_over_what_says_nothing(norms):
    weight = balanced()
    weight.balance(2.0, 1.0)
    before = weight.at(10)
    weight.balance(*norms)
    assert weight.at(10) == before


def test_balanced_measures_every_period_while_the_mimic_is_on():
    weight = balanced(period=3, stop_iter=7)
    assert [weight.wants_balance(iteration) for iteration in range(10)] == [
        *(True, False, False, True, False, False, True, False, False, False)
    ]
    weight.balance(1.0, 1.0)
    assert weight.at(6) > 0.0 and weight.at(7) == 0.0
    assert not any(MimicWeight(weight=1.0).wants_balance(iteration) for iteration in range(10))


def test_balanced_is_restored():
    first, second = balanced(), balanced(weight=3.0)
    for norm in (0.1, 0.7, 1.9):
        first.balance(norm, 0.3)
    second.load_state_dict(first.state_dict())
    for weight in (first, second):
        weight.balance(5.0, 0.7)
    assert second.at(40) == first.at(40)
    assert all(isinstance(entry, torch.Tensor) for entry in first.state_dict().values())


def test_the_others_have_nothing_to_save():
    assert not MimicWeight(weight=1.0).state_dict() and not list(balanced().buffers())


# ------------------------------------------------------------------------------------------------ config


def test_from_config():
    cfg = tiny_cfg(
        *(f"{MIMIC}.SCHEDULE", "step", f"{MIMIC}.LOSS_WEIGHT", 4.0),
        *(f"{MIMIC}.STEPS", [1, 3], f"{MIMIC}.GAMMA", 0.5, f"{MIMIC}.STOP_ITER", 5),
    )
    weight = build_mimic_weight(cfg)
    assert type(weight) is MimicWeight
    assert values(weight, range(6)) == [4.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    cosine = build_mimic_weight(tiny_cfg(f"{MIMIC}.SCHEDULE", "cosine", "SOLVER.MAX_ITER", 10))
    assert cosine.at(5) == pytest.approx(0.5)


def test_balanced_from_config():
    cfg = tiny_cfg(
        *(f"{MIMIC}.SCHEDULE", "balanced", f"{MIMIC}.BALANCE_SHARE", 0.2, f"{MIMIC}.BALANCE_PERIOD", 7),
        *(f"{MIMIC}.BALANCE_MOMENTUM", 0.8, f"{MIMIC}.BALANCE_BOUNDS", [0.5, 2.0]),
    )
    weight = build_mimic_weight(cfg)
    assert isinstance(weight, BalancedWeight)
    assert (weight.share, weight.period, weight.momentum, weight.bounds) == (0.2, 7, 0.8, (0.5, 2.0))


@pytest.mark.parametrize(
    "arguments, parts",
    [
        *(({"weight": bad}, ("LOSS_WEIGHT", repr(bad), "finite number >= 0")) for bad in (-0.1, math.nan, math.inf)),
        ({"schedule": "linear"}, ("SCHEDULE", "'linear'", "'balanced'")),
        ({"schedule": "warmup", "warmup_iters": -1}, ("WARMUP_ITERS", "-1", ">= 0")),
        ({"schedule": "step"}, ("STEPS", "[]")),
        ({"schedule": "step", "steps": (5, 2)}, ("STEPS", "[5, 2]", "rising")),
        ({"schedule": "step", "steps": (-5, 2)}, ("STEPS", "-5")),
        ({"gamma": 0.0}, ("GAMMA", "0.0")),
        ({"gamma": 1.5}, ("GAMMA", "1.5")),
        ({"stop_iter": -1}, ("STOP_ITER", "-1")),
    ],
)
def test_bad_values(arguments, parts):
    with pytest.raises(ValueError) as error:
        MimicWeight(**arguments)
    for part in ("MODEL.QMIMIC.MIMIC.", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        *(({"share": bad}, ("BALANCE_SHARE", repr(bad))) for bad in (0.0, 1.0, -0.5, math.nan)),
        ({"period": 0}, ("BALANCE_PERIOD", "0")),
        *(({"momentum": bad}, ("BALANCE_MOMENTUM", repr(bad))) for bad in (1.0, -0.1)),
        *(({"bounds": bad}, ("BALANCE_BOUNDS",)) for bad in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (1.0,))),
    ],
)
def test_bad_balance(arguments, parts):
    with pytest.raises(ValueError) as error:
        balanced(**arguments)
    for part in ("MODEL.QMIMIC.MIMIC.", *parts):
        assert part in str(error.value)


def test_both_say_what_they_are():
    assert "weight=2.0, schedule=warmup" in repr(MimicWeight(weight=2.0, schedule="warmup"))
    assert "share=0.5" in repr(balanced())
