"""Statistics of the evidence, against values computed by hand and from printed tables."""

import pytest

from evidence_lib.statistics import describe, family, holm

# Two-sided 95 % points of Student's t, from any printed table, and the 97.5 % one for two degrees of freedom.
T_1, T_2, T_3 = 12.706, 4.303, 3.182
T_2_TWO_CONTRASTS = 6.205


def test_mean_deviation_and_interval():
    sample = describe([1.0, 2.0, 6.0])
    # deviations -2, -1, 3: variance 14 / 2
    assert (sample.n, sample.mean) == (3, 3.0) and sample.sd == pytest.approx(7.0**0.5)
    half = T_2 * (7.0 / 3.0) ** 0.5
    assert sample.interval == pytest.approx((3.0 - half, 3.0 + half), abs=1e-3)
    assert describe([0.0, 2.0]).interval == pytest.approx((1.0 - T_1, 1.0 + T_1), abs=1e-3)


def test_confidence_widens_the_interval():
    # 90 % with one degree of freedom: t = 6.314
    assert describe([0.0, 2.0], confidence=0.9).interval == pytest.approx((1.0 - 6.314, 1.0 + 6.314), abs=1e-3)


def test_one_value_and_none_have_no_interval():
    one, none = describe([4.5]), describe([])
    assert (one.n, one.mean, one.sd, one.interval) == (1, 4.5, None, None)
    assert (none.n, none.mean, none.sd, none.interval) == (0, None, None, None)


def test_contrast_pairs_seeds_and_leaves_out_what_has_no_partner():
    a = {1: 50.0, 2: 52.0, 3: 60.0, 9: 99.0}
    b = {3: 54.0, 2: 50.0, 1: 49.0, 7: 0.0}
    (contrast,) = family([(a, b)])
    assert contrast.differences == {1: 1.0, 2: 2.0, 3: 6.0}
    assert contrast.sample == describe([1.0, 2.0, 6.0])
    assert contrast.simultaneous == pytest.approx(contrast.sample.interval)  # a family of one
    # t = 3 / sqrt(7/3) = 1.964; with two degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 3.0 / (7.0 / 3.0) ** 0.5
    assert contrast.p == pytest.approx(1.0 - t / (2.0 + t * t) ** 0.5)
    assert contrast.p_holm == contrast.p


def test_pairing_takes_out_what_a_seed_does_to_both():
    a = {1: 40.0, 2: 50.0, 3: 60.0, 4: 70.0}
    b = {1: 39.0, 2: 48.0, 3: 59.0, 4: 68.0}
    (contrast,) = family([(a, b)])
    half = T_3 * (1.0 / 3.0) ** 0.5 / 2.0  # differences 1, 2, 1, 2
    assert contrast.sample.interval == pytest.approx((1.5 - half, 1.5 + half), abs=1e-3)


def test_simultaneous_intervals_are_as_wide_as_the_family_is_large():
    a, b = {1: 1.0, 2: 2.0, 3: 6.0}, {1: 0.0, 2: 0.0, 3: 0.0}
    first, second = family([(a, b), (b, a)])
    half = T_2_TWO_CONTRASTS * (7.0 / 3.0) ** 0.5
    assert first.simultaneous == pytest.approx((3.0 - half, 3.0 + half), abs=1e-2)
    assert second.simultaneous == pytest.approx((-3.0 - half, -3.0 + half), abs=1e-2)
    # each by itself is as in a family of one
    assert first.sample.interval == family([(a, b)])[0].sample.interval
    assert first.p_holm == pytest.approx(2.0 * first.p)


def test_contrasts_without_pairs_count_in_the_family():
    a, b = {1: 1.0, 2: 2.0, 3: 6.0}, {1: 0.0, 2: 0.0, 3: 0.0}
    full, one_pair, nothing = family([(a, b), ({1: 5.0}, {1: 2.0}), (a, {})])
    assert full.simultaneous == family([(a, b)] * 3)[0].simultaneous
    assert full.p_holm == pytest.approx(3.0 * full.p)
    assert one_pair.sample.mean == 3.0
    assert nothing.differences == {} and nothing.sample.n == 0
    for contrast in (one_pair, nothing):
        assert (contrast.sample.interval, contrast.simultaneous, contrast.p, contrast.p_holm) == (None,) * 4
    assert family([]) == []


def test_equal_differences():
    same, shifted = family([({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}), ({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})])
    assert (same.p, same.sample.interval) == (1.0, (0.0, 0.0))
    assert (shifted.p, shifted.simultaneous) == (0.0, (1.0, 1.0))


def test_holm():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04; what is below an earlier one is raised to it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]
    assert holm([]) == []
