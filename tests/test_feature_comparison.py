"""Student against teacher on one dictionary: every figure by hand, sums that add up, and what is undefined."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from qmimic_d2.diagnostics.feature_comparison import (
    FIGURES,
    FeatureComparison,
    compare_features,
    histogram_codes,
    histogram_indices,
    write_comparison,
)
from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer

# Shape letters: M regions, C channels.

DICTIONARIES = {
    "uniform": UniformQuantizer(0.5),
    "bounded": UniformQuantizer(0.5, num_codes=3),
    "bounded, long": UniformQuantizer(0.01, num_codes=100),
    "signed": UniformQuantizer(0.5, signed=True),
    "signed, bounded": UniformQuantizer(0.5, num_codes=3, signed=True),
    "power of two": PowerOfTwoQuantizer(0.25),
    "power of two, bounded": PowerOfTwoQuantizer(0.25, num_codes=3),
    "power of two, signed": PowerOfTwoQuantizer(0.25, signed=True),
}


def row(*values):
    """Features of one region with one channel, shape (1, 1, bins)."""
    return torch.tensor(values, dtype=torch.float32)[None, None]


def figures(student, teacher, quantizer):
    return compare_features(student, teacher, quantizer).figures()


def random_pair(shape=(4, 3, 2, 2), seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) * scale for _ in range(2))


def assert_same(first, second):
    """Counts are equal; sums of squares up to another order of summation."""
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == pytest.approx(other, rel=1e-5, nan_ok=True), name


# ------------------------------------------------------------------------------- every figure by hand


def test_all_figures_by_hand():
    #              code 0    1    1    0    3   -> 0
    student = row(0.2, 0.6, 1.4, 0.0, 2.6, -3.0)
    #              code 0    1    2    0    5    0
    teacher = row(0.0, 1.0, 2.0, 0.5, 5.0, 0.0)
    comparison = compare_features(student, teacher, UniformQuantizer(1.0))
    product = 0.6 * 1.0 + 1.4 * 2.0 + 2.6 * 5.0
    student_energy = 0.2**2 + 0.6**2 + 1.4**2 + 2.6**2 + 3.0**2
    teacher_energy = 1.0 + 4.0 + 0.25 + 25.0
    error = 0.2**2 + 0.4**2 + 0.6**2 + 0.5**2 + 2.4**2 + 3.0**2
    expected = {
        "match_ratio": 4 / 6,
        "match_ratio_nonzero": 1 / 3,
        "within_one": 5 / 6,
        "within_one_nonzero": 2 / 3,
        "cosine": product / math.sqrt(student_energy * teacher_energy),
        "relative_error": math.sqrt(error / teacher_energy),
        "student_sparsity": 3 / 6,
        "teacher_sparsity": 3 / 6,
        "student_saturation": 0.0,
        "teacher_saturation": 0.0,
        "student_dead_channels": 0.0,
        "teacher_dead_channels": 0.0,
        "student_at_threshold": 0.0,  # of 0.2 and 0.6; near are 0.4 to 0.6, without their ends
        "teacher_rms": math.sqrt(teacher_energy / 6),
    }
    assert comparison.figures() == pytest.approx(expected)
    assert tuple(comparison.figures()) == FIGURES
    assert comparison.num_rois == 1 and comparison.num_entries == 6
    assert comparison.student_histogram.tolist() == [3, 2, 0, 1] + [0] * 29
    assert comparison.teacher_histogram.tolist() == [3, 1, 1, 0, 0, 1] + [0] * 27


def test_a_signed_dictionary_counts_steps_across_zero():
    #              code -1    1   -2    0   -1    0
    student = row(-0.6, 0.7, -2.0, 0.1, -1.0, 0.2)
    #              code  1    1   -1   -1    0    0
    teacher = row(1.0, 1.0, -1.0, -1.0, 0.0, -0.4)
    comparison = compare_features(student, teacher, UniformQuantizer(1.0, signed=True))
    found = comparison.figures()
    assert found["match_ratio"] == pytest.approx(2 / 6)
    assert found["match_ratio_nonzero"] == pytest.approx(1 / 5)
    assert found["within_one"] == pytest.approx(5 / 6)  # -1 and 1 are two steps apart
    assert found["within_one_nonzero"] == pytest.approx(4 / 5)
    assert (found["student_sparsity"], found["teacher_sparsity"]) == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    middle = slice(30, 35)  # codes -2 to 2 of -32 to 32
    assert comparison.student_histogram[middle].tolist() == [1, 2, 2, 1, 0]
    assert comparison.teacher_histogram[middle].tolist() == [0, 2, 2, 2, 0]


def test_within_one_of_a_power_of_two_is_a_step_of_the_dictionary():
    # codes 0, 1, 2, 4, 8, 16: neighbours may be 8 apart in value, and 8 and 2 are two steps apart
    student = row(16.0, 8.0, 0.0, 0.0, 4.0)
    teacher = row(8.0, 2.0, 1.0, 2.0, 4.0)
    found = figures(student, teacher, PowerOfTwoQuantizer(1.0))
    assert found["match_ratio"] == pytest.approx(1 / 5)
    assert found["within_one"] == found["within_one_nonzero"] == pytest.approx(3 / 5)
    uniform = figures(student, teacher, UniformQuantizer(1.0))
    assert uniform["within_one"] == pytest.approx(2 / 5)


def test_codes_decide_about_a_match_and_features_about_cosine_and_error():
    found = figures(row(0.6, 1.2), row(1.2, 0.6), UniformQuantizer(1.0))
    assert found["match_ratio"] == 1.0
    assert found["cosine"] == pytest.approx(2 * 0.72 / (0.36 + 1.44))
    assert found["relative_error"] == pytest.approx(math.sqrt(2 * 0.36 / (0.36 + 1.44)))
    assert figures(row(2.0, 4.0), row(1.0, 2.0), UniformQuantizer(1.0))["cosine"] == pytest.approx(1.0)
    assert figures(row(-1.0, 0.0), row(1.0, 0.0), UniformQuantizer(1.0))["cosine"] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "quantizer, student, teacher",
    [
        (UniformQuantizer(1.0, num_codes=3), 3 / 5, 2 / 5),  # last code 2: 1.6, 2.4 and 9
        (UniformQuantizer(1.0, num_codes=3, signed=True), 4 / 5, 2 / 5),  # -9 is at its mirror image
        (PowerOfTwoQuantizer(1.0, num_codes=3), 3 / 5, 2 / 5),
        (UniformQuantizer(1.0), 0.0, 0.0),
    ],
)
def test_saturation_is_the_share_of_the_outermost_code(quantizer, student, teacher):
    found = figures(row(1.6, 2.4, 9.0, -9.0, 1.4), row(2.0, 2.0, 1.0, 0.0, 0.0), quantizer)
    assert found["student_saturation"] == pytest.approx(student)
    assert found["teacher_saturation"] == pytest.approx(teacher)


@pytest.mark.parametrize(
    "quantizer, share",
    [
        (UniformQuantizer(2.0), 2 / 4),  # 0.9 and 1.1 of 0.3, 0.9, 1.1 and 1.9
        (UniformQuantizer(2.0, num_codes=2), 2 / 4),
        (PowerOfTwoQuantizer(2.0), 2 / 4),
        (UniformQuantizer(2.0, signed=True), 3 / 5),  # and -0.9
        (UniformQuantizer(0.02), float("nan")),
    ],
)
def test_share_at_the_threshold(quantizer, share):
    student = row(0.3, 0.9, 1.1, 1.9, 2.0, 0.0, -0.9, 3.0)
    found = figures(student, row(*[1.0] * 8), quantizer)["student_at_threshold"]
    assert found == pytest.approx(share, nan_ok=True)


def test_a_saturated_side_matches_whatever_is_beyond():
    found = figures(row(9.0, 2.0), row(2.0, 30.0), UniformQuantizer(1.0, num_codes=3))
    assert found["match_ratio"] == 1.0


def test_dead_channels_are_silent_in_every_region_and_bin():
    student, teacher = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    student[0, 0, 0, 0], student[1, 1, 1, 1], student[0, 2] = 1.0, 1.0, 0.5  # 0.5 has code 0
    teacher[1, 3] = 1.0
    comparison = compare_features(student, teacher, UniformQuantizer(1.0))
    assert comparison.figures()["student_dead_channels"] == 0.5
    assert comparison.figures()["teacher_dead_channels"] == 0.75
    assert comparison.student_active.tolist() == [1, 1, 0, 0]
    assert comparison.teacher_active.tolist() == [0, 0, 0, 4]


def test_sparsity_and_dead_channels_need_no_bins():
    found = figures(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.ones(2, 2), UniformQuantizer(1.0))
    assert (found["student_sparsity"], found["student_dead_channels"]) == (0.75, 0.5)
    assert (found["teacher_sparsity"], found["teacher_dead_channels"]) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------ histograms


@pytest.mark.parametrize(
    "quantizer, expected",
    [
        (UniformQuantizer(0.5), [0.5 * index for index in range(33)]),
        (UniformQuantizer(0.5, num_codes=3), [0.0, 0.5, 1.0]),
        (UniformQuantizer(0.5, num_codes=3, signed=True), [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (UniformQuantizer(0.5, signed=True), [0.5 * index for index in range(-32, 33)]),
        (UniformQuantizer(0.5, num_codes=256), [0.5 * index for index in range(33)]),
        (PowerOfTwoQuantizer(0.25, num_codes=4), [0.0, 0.25, 0.5, 1.0]),
        (PowerOfTwoQuantizer(0.25), [0.0, *(0.25 * 2.0**index for index in range(32))]),
    ],
)
def test_bins(quantizer, expected):
    assert histogram_codes(quantizer) == expected
    assert len(histogram_indices(quantizer)) == len(expected)


def test_codes_beyond_the_last_bin_are_counted_in_it_and_still_told_apart():
    student, teacher = row(31.0, 32.0, 33.0, 100.0), row(32.0, 33.0, 33.0, 50.0)
    comparison = compare_features(student, teacher, UniformQuantizer(1.0))
    assert comparison.student_histogram[-2:].tolist() == [1, 3]
    assert comparison.teacher_histogram[-2:].tolist() == [0, 4]
    assert (comparison.num_equal, comparison.num_within_one) == (1, 3)
    signed = compare_features(-student, teacher, UniformQuantizer(1.0, signed=True))
    assert signed.student_histogram[:2].tolist() == [3, 1] and signed.student_histogram.sum() == 4
    assert signed.num_within_one == 0


# ---------------------------------------------------------------------------------------- adding up


@pytest.mark.parametrize("quantizer", DICTIONARIES.values(), ids=DICTIONARIES)
def test_comparisons_add_up(quantizer):
    student, teacher = random_pair((7, 3, 2, 2))
    whole = compare_features(student, teacher, quantizer)
    parts = [compare_features(student[rows], teacher[rows], quantizer) for rows in ([0, 1], [2], [], [3, 4, 5, 6])]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert_same(total, whole)
    assert total.figures() == pytest.approx(whole.figures(), nan_ok=True)
    assert total.num_rois == 7 and total.num_entries == 84
    assert int(total.student_histogram.sum()) == int(total.teacher_histogram.sum()) == 84


@pytest.mark.parametrize("quantizer", DICTIONARIES.values(), ids=DICTIONARIES)
def test_the_figures_follow_their_definitions_entry_by_entry(quantizer):
    student, teacher = random_pair()
    found = figures(student, teacher, quantizer)
    pairs = list(zip(quantizer.codes(student).flatten().tolist(), quantizer.codes(teacher).flatten().tolist()))
    occupied = [(s, t) for s, t in pairs if s or t]
    last = quantizer.num_codes - 1
    expected = {
        "match_ratio": sum(s == t for s, t in pairs) / len(pairs),
        "match_ratio_nonzero": sum(s == t for s, t in occupied) / len(occupied),
        "within_one": sum(abs(s - t) <= 1 for s, t in pairs) / len(pairs),
        "within_one_nonzero": sum(abs(s - t) <= 1 for s, t in occupied) / len(occupied),
        "student_sparsity": sum(s == 0 for s, _ in pairs) / len(pairs),
        "teacher_sparsity": sum(t == 0 for _, t in pairs) / len(pairs),
        "student_saturation": sum(abs(s) == last for s, _ in pairs) / len(pairs),
        "teacher_saturation": sum(abs(t) == last for _, t in pairs) / len(pairs),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(student.flatten(), teacher.flatten(), 0).item())
    assert found["relative_error"] == pytest.approx(((student - teacher).norm() / teacher.norm()).item())


def test_more_than_a_chunk(monkeypatch):
    student, teacher = random_pair((5, 3, 2, 2))
    whole = compare_features(student, teacher, UniformQuantizer(0.5))
    for chunk in (1, 12, 30):  # less than a region, one region, two
        monkeypatch.setattr("qmimic_d2.diagnostics.feature_comparison._CHUNK", chunk)
        assert_same(compare_features(student, teacher, UniformQuantizer(0.5)), whole)


def test_codes_of_a_teacher_that_is_quantized_already_stay():
    quantizer = UniformQuantizer(0.5)
    student, teacher = random_pair()
    plain, coded = (compare_features(student, each, quantizer) for each in (teacher, quantizer.quantize(teacher)))
    assert torch.equal(plain.teacher_histogram, coded.teacher_histogram)
    assert (plain.num_equal, plain.num_within_one) == (coded.num_equal, coded.num_within_one)


def test_it_leaves_its_inputs_and_the_random_numbers_alone():
    student, teacher = random_pair()
    student.requires_grad_(True)
    before, state = student.detach().clone(), torch.get_rng_state()
    comparison = compare_features(student, teacher, UniformQuantizer(0.5))
    assert torch.equal(student.detach(), before) and torch.equal(torch.get_rng_state(), state)
    assert not any(each.requires_grad for each in vars(comparison).values() if isinstance(each, torch.Tensor))


def test_reduced_precision_and_autocast():
    student, teacher = random_pair()
    half = student.to(torch.bfloat16)
    expected = compare_features(half.float(), teacher, UniformQuantizer(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compare_features(half, teacher, UniformQuantizer(0.5)), expected)


# -------------------------------------------------------------------------------------- what is undefined


@pytest.mark.parametrize("quantizer", DICTIONARIES.values(), ids=DICTIONARIES)
def test_without_a_region_every_figure_is_nan_and_nothing_is_added(quantizer):
    empty = compare_features(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2), quantizer)
    assert empty.num_rois == empty.num_entries == 0 and empty.is_finite
    assert tuple(empty.figures()) == FIGURES and all(math.isnan(each) for each in empty.figures().values())
    other = compare_features(*random_pair(), quantizer)
    assert_same(empty + other, other)


def test_features_that_are_zero_everywhere():
    found = figures(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), UniformQuantizer(1.0, num_codes=4))
    undefined = {"match_ratio_nonzero", "within_one_nonzero", "cosine", "relative_error", "student_at_threshold"}
    assert {name for name, value in found.items() if math.isnan(value)} == undefined
    assert {name: value for name, value in found.items() if name not in undefined} == {
        **{"match_ratio": 1.0, "within_one": 1.0, "student_sparsity": 1.0, "teacher_sparsity": 1.0},
        **{"student_saturation": 0.0, "teacher_saturation": 0.0},
        **{"student_dead_channels": 1.0, "teacher_dead_channels": 1.0, "teacher_rms": 0.0},
    }


def test_one_side_that_is_zero_everywhere():
    quantizer = UniformQuantizer(1.0)
    silent_student = figures(row(0.0, 0.0), row(2.0, 0.0), quantizer)
    assert math.isnan(silent_student["cosine"]) and silent_student["relative_error"] == 1.0
    assert (silent_student["match_ratio"], silent_student["match_ratio_nonzero"]) == (0.5, 0.0)
    silent_teacher = figures(row(2.0, 0.0), row(0.0, 0.0), quantizer)
    assert math.isnan(silent_teacher["cosine"]) and math.isnan(silent_teacher["relative_error"])
    assert silent_teacher["student_sparsity"] == 0.5


def test_features_below_half_a_stride_match_as_zeros_and_have_a_cosine():
    found = figures(row(0.4, -3.0), row(0.2, 0.0), UniformQuantizer(1.0))
    assert found["match_ratio"] == 1.0 and math.isnan(found["match_ratio_nonzero"])
    assert found["cosine"] == pytest.approx(0.08 / math.sqrt((0.16 + 9.0) * 0.04))


@pytest.mark.parametrize("quantizer", [UniformQuantizer(0.5), UniformQuantizer(0.5, num_codes=3, signed=True)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_diverged_features_make_every_figure_nan(quantizer, value, side):
    pair = list(random_pair())
    pair[side][2, 1, 0, 1] = value
    diverged = compare_features(*pair, quantizer)
    assert diverged.num_rois == 4 and not diverged.is_finite
    total = compare_features(*random_pair(seed=1), quantizer) + diverged
    assert total.num_rois == 8
    assert all(math.isnan(each) for each in total.figures().values())
    assert len(total.student_histogram) == len(histogram_codes(quantizer)) and total.student_histogram.isnan().all()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 1\) and \(2, 4, 1\).*adapter"):
        compare_features(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), UniformQuantizer(1.0))


def test_a_quantizer_without_codes_is_refused():
    with pytest.raises(ValueError, match="Clamp.*use a UniformQuantizer"):
        compare_features(row(1.0), row(1.0), ClampQuantizer(1.0))


# --------------------------------------------------------------------------------------------- writing


def test_the_guide_explains_every_figure():
    guide = (Path(__file__).resolve().parent.parent / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    assert [name for name in FIGURES if f"`{name}`" not in guide] == []


def written_events(comparison: FeatureComparison, quantizer, suffix=""):
    with EventStorage(40) as storage:
        write_comparison(storage, comparison, quantizer, suffix)
    return storage


def test_scalars_and_histograms_are_written():
    quantizer = UniformQuantizer(1.0, num_codes=4, signed=True)
    comparison = compare_features(row(1.0, 1.2, -2.0, 0.0), row(9.0, 1.0, 0.0, 0.0), quantizer)
    storage = written_events(comparison, quantizer, "_p3")
    expected = {f"qmimic/{name}_p3": (value, 40) for name, value in comparison.figures().items()}
    assert storage.latest() == expected
    assert not any(storage.smoothing_hints().values())
    student, teacher = storage._histograms
    assert student == {
        "tag": "qmimic/student_codes_p3",
        "min": -2,
        "max": 1,
        "num": 4,
        "sum": 0,
        "sum_squares": 6,
        "bucket_limits": [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5],
        "bucket_counts": [0, 1, 0, 1, 2, 0, 0],
        "global_step": 40,
    }
    assert (teacher["tag"], teacher["bucket_counts"]) == ("qmimic/teacher_codes_p3", [0, 0, 0, 2, 1, 0, 1])


def test_histograms_have_the_entries_that_detectron2s_own_have():
    with EventStorage() as storage:
        storage.put_histogram("own", torch.arange(4.0), bins=2)
        comparison = compare_features(row(1.0), row(2.0), UniformQuantizer(1.0))
        write_comparison(storage, comparison, UniformQuantizer(1.0))
    own, student, teacher = storage._histograms
    assert set(own) == set(student) == set(teacher)
    assert len(student["bucket_limits"]) == len(student["bucket_counts"]) == 33


def test_nobody_reads_the_histograms_and_they_do_not_pile_up():
    comparison = compare_features(row(1.0), row(2.0), UniformQuantizer(1.0))
    with EventStorage() as storage:
        for _ in range(3):
            write_comparison(storage, comparison, UniformQuantizer(1.0))
            storage.step()
    assert [(each["tag"], each["global_step"]) for each in storage._histograms] == [
        ("qmimic/student_codes", 2),
        ("qmimic/teacher_codes", 2),
    ]


def test_diverged_features_are_written_as_nan_without_histogram():
    comparison = compare_features(row(math.nan), row(1.0), UniformQuantizer(1.0))
    storage = written_events(comparison, UniformQuantizer(1.0))
    assert len(storage.latest()) == len(FIGURES)
    assert all(math.isnan(value) for value, _ in storage.latest().values())
    assert storage._histograms == []
