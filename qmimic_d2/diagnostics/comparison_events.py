"""A comparison of student and teacher as Detectron2's writers take it: scalars, and histograms for TensorBoard."""

from typing import List, Sequence

from detectron2.utils.events import EventStorage
from torch import Tensor

from qmimic_d2.diagnostics.feature_comparison import FeatureComparison, histogram_indices
from qmimic_d2.modeling.quantizer import CodeQuantizer

__all__ = ["write_comparison"]


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


def _put_histogram(storage: EventStorage, tag: str, indices: Sequence[int], counts: Tensor) -> None:
    """
    ``EventStorage.put_histogram`` of entries that have been counted already, one bin per code.

    That method itself would search all entries for their range and sort them into 1000 bins, which costs
    more than the whole comparison. Its own list is what TensorBoard's writer reads and empties; a trainer
    without that writer would fill it for ever, so that only the last histogram of a name waits there.
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
