"""
How alike student and teacher are inside regions of interest, measured on one code dictionary.

Shape letters:
    M: number of regions.
    C: channels.
    *: bins of a region.
    K: codes of a histogram.

It keeps counts and sums, so that comparisons of several batches, images or processes can be added. The match ratio
is the paper's (Wei et al., "Quantization Mimic", ECCV 2018, https://arxiv.org/abs/1805.02152v3); the other figures are
this project's.
"""

import math
from dataclasses import dataclass, fields
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from qmimic_d2.modeling.quantizer import CodeQuantizer

__all__ = [
    "FIGURES",
    "LAST_BIN",
    "FeatureComparison",
    "compare_features",
    "histogram_codes",
    "histogram_indices",
    "write_comparison",
]

# The keys of FeatureComparison.figures(), in order.
FIGURES = (
    "match_ratio",
    "match_ratio_nonzero",
    "within_one",
    "within_one_nonzero",
    "cosine",
    "relative_error",
    "student_sparsity",
    "teacher_sparsity",
    "student_saturation",
    "teacher_saturation",
    "student_dead_channels",
    "teacher_dead_channels",
    "student_at_threshold",
    "teacher_rms",
)

# Histograms have a bin for each code up to this index; its bin counts the codes beyond it, too.
LAST_BIN = 32

# Entries that are compared at a time on a CPU, so that codes and scratch stay in a core's cache.
_CHUNK = 1 << 16

# Features with a norm of so many strides have diverged. Smaller codes and their differences fit into 32 bits.
_MOST_STRIDES = 2.0**30


@dataclass
class FeatureComparison:
    """
    Counts and sums of one comparison; ``a + b`` is the comparison of both data together.

    Attributes:
        num_rois: M.
        num_entries: M * C * bins.
        num_equal: entries with the same code on both sides.
        num_within_one: entries whose codes are the same or neighbours in the dictionary.
        num_both_zero: entries whose code is 0 on both sides.
        num_student_below_first, num_student_at_threshold: the student's entries between 0 and the first code s
            (signed: on either side of 0), and those of them within s / 10 of the threshold s / 2.
        num_student_saturated, num_teacher_saturated: entries with the outermost code (signed: either of
            the two); 0 for an unbounded dictionary.
        product, student_energy, teacher_energy, error_energy: sums of s*t, s*s, t*t and (s-t)*(s-t) over
            the features themselves, before they are coded.
        student_active, teacher_active: entries whose code is not 0, by channel, shape (C,).
        student_histogram, teacher_histogram: entries by code, shape (K,); see :func:`histogram_indices`.

    If a feature is NaN, infinite or far too large, all but ``num_rois`` are NaN, and so is every figure.
    """

    num_rois: int
    num_entries: float
    num_equal: float
    num_within_one: float
    num_both_zero: float
    num_student_below_first: float
    num_student_at_threshold: float
    num_student_saturated: float
    num_teacher_saturated: float
    product: float
    student_energy: float
    teacher_energy: float
    error_energy: float
    student_active: Tensor
    teacher_active: Tensor
    student_histogram: Tensor
    teacher_histogram: Tensor

    def __add__(self, other: "FeatureComparison") -> "FeatureComparison":
        names = [each.name for each in fields(self)]
        return FeatureComparison(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def is_finite(self) -> bool:
        """False if the features have diverged, so that every figure is NaN."""
        return math.isfinite(self.num_entries)

    def figures(self) -> Dict[str, float]:
        """
        The comparison in figures, by the names of :data:`FIGURES`.

        Returns:
            Shares in 0..1, the cosine in -1..1, the relative error and the teacher's root mean square (in units of the
            feature) >= 0. A figure is NaN if its denominator is 0. For all of them: without a region; ``_nonzero``: if
            every code is 0; ``cosine``: if one side is 0 everywhere; ``relative_error``: if the teacher is;
            ``student_at_threshold``: if the student has no entry between 0 and the first code.
        """
        num_occupied = self.num_entries - self.num_both_zero
        norms = math.sqrt(self.student_energy) * math.sqrt(self.teacher_energy)
        return {
            "match_ratio": _ratio(self.num_equal, self.num_entries),
            "match_ratio_nonzero": _ratio(self.num_equal - self.num_both_zero, num_occupied),
            "within_one": _ratio(self.num_within_one, self.num_entries),
            "within_one_nonzero": _ratio(self.num_within_one - self.num_both_zero, num_occupied),
            "cosine": _ratio(self.product, norms),
            "relative_error": math.sqrt(_ratio(self.error_energy, self.teacher_energy)),
            "student_sparsity": self._sparsity(self.student_active),
            "teacher_sparsity": self._sparsity(self.teacher_active),
            "student_saturation": _ratio(self.num_student_saturated, self.num_entries),
            "teacher_saturation": _ratio(self.num_teacher_saturated, self.num_entries),
            "student_dead_channels": self._dead_share(self.student_active),
            "teacher_dead_channels": self._dead_share(self.teacher_active),
            "student_at_threshold": _ratio(self.num_student_at_threshold, self.num_student_below_first),
            "teacher_rms": math.sqrt(_ratio(self.teacher_energy, self.num_entries)),
        }

    def _sparsity(self, active: Tensor) -> float:
        return _ratio(self.num_entries - float(active.sum()), self.num_entries)

    def _dead_share(self, active: Tensor) -> float:
        return int((active == 0).sum()) / active.numel() if self.num_entries > 0 else math.nan


def histogram_indices(quantizer: CodeQuantizer) -> List[int]:
    """
    Indices of the codes of a histogram's bins, ascending.

    They end at :data:`LAST_BIN` (signed: they begin at its mirror image), or at the end of a shorter dictionary. In a
    longer dictionary the last bin (signed: the first one, too) also counts the codes beyond it.
    """
    last = _last_bin(quantizer)
    return list(range(-last if quantizer.signed else 0, last + 1))


def histogram_codes(quantizer: CodeQuantizer) -> List[float]:
    """The codes of :func:`histogram_indices`, in units of the feature."""
    return quantizer.dequantize(torch.tensor(histogram_indices(quantizer)), torch.float64).tolist()


@torch.no_grad()
def compare_features(student: Tensor, teacher: Tensor, quantizer: CodeQuantizer) -> FeatureComparison:
    """
    Compares features entry by entry. Draws no random number and changes nothing.

    Args:
        student: r(f_s), before any quantizer, shape (M, C, *).
        teacher: f_t, same shape.
        quantizer: quantizes both maps; a map of its codes stays as it is.

    Returns:
        With tensors on the CPU. M = 0 gives a comparison without entries, which adds nothing to others.

    Raises:
        ValueError: the shapes differ, or the quantizer has no codes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; the adapter "
            "brings the student's channels to the teacher's"
        )
    if not isinstance(quantizer, CodeQuantizer):
        raise ValueError(f"{quantizer} has no codes to compare; use a UniformQuantizer of its stride")
    num_rois, num_channels, num_bins = *student.shape[:2], math.prod(student.shape[2:])
    shape = (num_rois, num_channels, num_bins)
    student, teacher = (each.detach().float().reshape(shape) for each in (student, teacher))
    total = _compare(student[:0], teacher[:0], quantizer)
    per_roi = num_channels * num_bins
    rows = max(1, _CHUNK // max(1, per_roi)) if student.device.type == "cpu" else max(1, num_rois)
    for ours, theirs in zip(student.split(rows), teacher.split(rows)):
        total = total + _compare(ours, theirs, quantizer)
    return total


def write_comparison(
    storage: EventStorage, comparison: FeatureComparison, quantizer: CodeQuantizer, suffix: str = ""
) -> None:
    """
    Writes the figures of a comparison as ``qmimic/<figure><suffix>``, and the codes of both sides as the
    histograms ``qmimic/student_codes<suffix>`` and ``qmimic/teacher_codes<suffix>``.

    Args:
        storage: of the training.
        comparison: with one region or more.
        quantizer: the dictionary of the comparison.
        suffix: "_" and the level's name where there are several.
    """
    for name, value in comparison.figures().items():
        storage.put_scalar(f"qmimic/{name}{suffix}", value, smoothing_hint=False)
    if comparison.is_finite:
        indices = histogram_indices(quantizer)
        for side in ("student", "teacher"):
            counts = getattr(comparison, f"{side}_histogram")
            _put_histogram(storage, f"qmimic/{side}_codes{suffix}", indices, counts)


def _compare(student: Tensor, teacher: Tensor, quantizer: CodeQuantizer) -> FeatureComparison:
    """:func:`compare_features` of features that fit into a core's cache, shape (M, C, bins)."""
    difference = student - teacher
    energies = [_dot(*pair) for pair in ((student, teacher), (student, student), (teacher, teacher))]
    energies.append(_dot(difference, difference))
    num_bins = len(histogram_indices(quantizer))
    if not all(math.sqrt(energy) < _MOST_STRIDES * quantizer.stride for energy in energies[1:3]):
        return _diverged(len(student), student.shape[1], num_bins)
    codes, others = (quantizer.codes(each).to(torch.int32) for each in (student, teacher))
    steps = (codes - others).abs_()
    num_entries = codes.numel()
    return FeatureComparison(
        len(student),
        num_entries,
        num_entries - int(steps.count_nonzero()),
        int((steps <= 1).count_nonzero()),
        num_entries - int((codes | others).count_nonzero()),
        *_around_threshold(student, quantizer),
        _num_saturated(codes, quantizer),
        _num_saturated(others, quantizer),
        *energies,
        *(each.count_nonzero(dim=(0, 2)).cpu() for each in (codes, others)),
        *(_histogram(each, quantizer, num_bins) for each in (codes, others)),
    )


def _diverged(num_rois: int, num_channels: int, num_bins: int) -> FeatureComparison:
    numbers = [math.nan] * 12
    lengths = (num_channels, num_channels, num_bins, num_bins)
    return FeatureComparison(num_rois, *numbers, *(torch.full((length,), math.nan) for length in lengths))


def _around_threshold(features: Tensor, quantizer: CodeQuantizer) -> Tuple[int, int]:
    """Entries between 0 and the first code, and those near the threshold, which is s / 2 in every dictionary."""
    distance = (features.abs() if quantizer.signed else features) - 0.5 * quantizer.stride
    distance.abs_()
    return tuple(int((distance < share * quantizer.stride).count_nonzero()) for share in (0.5, 0.1))


def _num_saturated(codes: Tensor, quantizer: CodeQuantizer) -> int:
    return 0 if quantizer.max_code is None else int((codes.abs() >= quantizer.max_code).count_nonzero())


def _histogram(codes: Tensor, quantizer: CodeQuantizer, num_bins: int) -> Tensor:
    last = _last_bin(quantizer)
    bins = codes.clamp(min=-last, max=last).flatten()
    return torch.bincount(bins + last if quantizer.signed else bins, minlength=num_bins).cpu()


def _put_histogram(storage: EventStorage, tag: str, indices: Sequence[int], counts: Tensor) -> None:
    """
    ``EventStorage.put_histogram`` for entries that are counted already, one bin per code.

    That method would search all entries for their range and sort them into 1000 bins, which costs more than the whole
    comparison. TensorBoard's writer reads and empties the storage's list. Without that writer the list would grow for
    ever, so only the last histogram of a name stays in it.
    """
    numbers: List[int] = counts.tolist()
    occupied = [index for index, number in zip(indices, numbers) if number]
    histogram = {
        "tag": tag,
        "min": occupied[0],
        "max": occupied[-1],
        "num": sum(numbers),
        "sum": sum(index * number for index, number in zip(indices, numbers)),
        "sum_squares": sum(index * index * number for index, number in zip(indices, numbers)),
        "bucket_limits": [index + 0.5 for index in indices],
        "bucket_counts": numbers,
        "global_step": storage.iter,
    }
    waiting = [each for each in storage._histograms if each["tag"] != tag]
    storage._histograms = [*waiting, histogram]


def _last_bin(quantizer: CodeQuantizer) -> int:
    return LAST_BIN if quantizer.max_code is None else min(quantizer.max_code, LAST_BIN)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
