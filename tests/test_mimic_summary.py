"""The line after training."""

import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from helpers import tiny_cfg

from qmimic_d2.diagnostics.mimic_summary import MimicSummary, summary_of_shares, warning_of_threshold

NAN = float("nan")


def test_a_share_in_between_is_told_and_nothing_advised():
    line = summary_of_shares([0.2, 0.6, 0.4], 20.0, "constant")
    assert "was 40% (median of 3 measurements, 20% to 60%)" in line
    assert "LOSS_WEIGHT" not in line


def test_an_even_number_of_measurements():
    assert "was 30% (median of 2" in summary_of_shares([0.2, 0.4], 1.0, "constant")


@pytest.mark.parametrize(
    "share, words",
    [
        # 0.01 / 0.99 of the detection's: 99 times the weight makes them equal
        (0.01, ["negligible", "LOSS_WEIGHT larger (it is 2; 2e+02"]),
        (0.99, ["dominant", "LOSS_WEIGHT smaller (it is 2; 0.02"]),
        (0.0, ["negligible", "2; 20"]),
        (1.0, ["dominant", "2; 0.2"]),
    ],
)
def test_a_share_that_is_off_names_the_key_and_a_value(share, words):
    line = summary_of_shares([share, NAN], 2.0, "constant")
    for word in ["(one measurement)", '"balanced"', *words]:
        assert word in line


def test_balanced_has_a_key_of_its_own():
    line = summary_of_shares([0.99], 1.0, "balanced")
    assert "BALANCE_SHARE smaller" in line and "BALANCE_BOUNDS" in line and "LOSS_WEIGHT" not in line


def test_nothing_measured():
    assert summary_of_shares([], 1.0, "constant") is None
    assert summary_of_shares([NAN], 1.0, "constant") is None


def test_features_at_the_threshold_are_warned_of():
    warning = warning_of_threshold([NAN, 0.7, 0.8], 0.75, 0.36)
    for word in [
        *("75% of the student's", "STRIDE smaller (it is 0.75, the", "mean square of 0.36)"),
        *('QUANTIZE_STUDENT False', '"conv1x1_relu"'),
    ]:
        assert word in warning
    assert " at p3 ended" in warning_of_threshold([0.9], 1.0, 0.5, "p3")


def test_a_stride_that_is_small_against_the_features_is_not_warned_of():
    assert warning_of_threshold([0.9], 0.25, 0.29) is None
    assert warning_of_threshold([0.9], 0.25, 0.24) is not None
    assert warning_of_threshold([0.9], 0.25, NAN) is not None  # not known


@pytest.mark.parametrize("shares", [[], [NAN], [0.2, 0.3], [0.4, 0.6]])
def test_features_that_are_spread_are_not(shares):
    assert warning_of_threshold(shares, 1.0, 0.5) is None


def after_training(caplog, *options, shares=(), at_threshold=(), rms=0.2, level="", stopped_at=10):
    hook = MimicSummary(tiny_cfg("MODEL.QMIMIC.TEACHER.CONFIG_FILE", "teacher.yaml", *options))
    with EventStorage() as storage:
        for share in shares:
            storage.put_scalar("qmimic/grad_share_map", share)
            storage.step()
        for share in at_threshold:
            storage.put_scalar(f"qmimic/student_at_threshold{level}", share)
            storage.put_scalar(f"qmimic/teacher_rms{level}", rms)
            storage.step()
    hook.trainer = SimpleNamespace(storage=storage, iter=stopped_at, max_iter=10)
    with caplog.at_level(logging.INFO):
        hook.after_train()
    return caplog.text


def test_it_is_logged_once_training_is_done(caplog):
    assert "was 50% (median of 2" in after_training(caplog, shares=(0.5, 0.5))


def test_a_training_that_stopped_early_says_nothing(caplog):
    assert after_training(caplog, shares=(0.5,), stopped_at=7) == ""


def test_no_teacher_says_nothing(caplog):
    assert after_training(caplog, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "", shares=(0.5,)) == ""


def test_a_share_that_was_not_measured_says_so(caplog):
    assert "GRADIENT_PERIOD is 0" in after_training(caplog, "MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD", 0)


def test_a_mimic_of_weight_zero_has_no_share(caplog):
    options = ("MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD", 0, "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", 0.0)
    assert after_training(caplog, *options) == ""


def test_only_the_last_measurements_count_for_the_threshold(caplog):
    early_only = (*[0.9] * 5, *[0.2] * 10)
    assert "threshold" not in after_training(caplog, at_threshold=early_only)
    late = after_training(caplog, at_threshold=(*[0.2] * 30, *[0.9] * 10))
    assert "90% of the student's" in late and "WARNING" in late


def test_threshold_of_a_small_stride(caplog):
    # its stride is 0.25
    assert "threshold" in after_training(caplog, at_threshold=(0.9,), rms=0.2)
    caplog.clear()
    assert "threshold" not in after_training(caplog, at_threshold=(0.9,), rms=0.3)


def test_threshold_of_a_level(caplog):
    assert "first code at p4 ended" in after_training(caplog, at_threshold=(0.9,), level="_p4")


@pytest.mark.parametrize(
    "options", [("QUANTIZER.NAME", "Clamp"), ("QUANTIZER.NAME", ""), ("MIMIC.QUANTIZE_STUDENT", False)]
)
def test_a_student_that_is_not_rounded_has_no_threshold(caplog, options):
    key, value = options
    found = after_training(caplog, f"MODEL.QMIMIC.{key}", value, at_threshold=(0.9,))
    assert "threshold" not in found
