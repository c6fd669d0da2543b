"""
Statistics of a feature over many images, collected image by image in bounded memory.

Shape letters:
    N: values of one feature of one image, that is channels x height x width.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Optional, Set

import numpy as np
import torch
from torch import Tensor

from qmimic_d2.modeling.quantizer import CodeQuantizer

__all__ = ["CodeStatistics", "CodeUse", "FeatureDistribution", "FeatureStatistics"]

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

# Percentiles are taken from at most this many values per feature; everything else is exact.
SAMPLE_SIZE = 1 << 20
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class FeatureStatistics:
    """
    The distribution of one feature over all images, before any quantization.

    Attributes:
        num_values: how many values were seen.
        zero_share: sparsity, the share of values that are exactly 0.
        negative_share: share of values below 0; 0.0 after a ReLU.
        mean, rms, min, max: of all values, zeros included.
        percentiles: value by percentile, for each of 50, 90, 99 and 99.9.
        percentile_sample: number of values for the percentiles. If it is ``num_values``, they are exact; otherwise they
            come from a random sample with a fixed seed.
    """

    num_values: int
    zero_share: float
    negative_share: float
    mean: float
    rms: float
    min: float
    max: float
    percentiles: Dict[float, float]
    percentile_sample: int


@dataclass(frozen=True)
class CodeStatistics:
    """
    The effect of one dictionary on one feature f, over all images.

    Attributes:
        codes_used: number of different codes that occur, with the code 0.
        largest_code: the largest absolute index of a code that occurs.
        zero_share: share of values whose code is 0.
        relative_error: ||Q(f) - f|| / ||f||; 0.0 for a feature that is 0 everywhere.
        cosine: between Q(f) and f; 0.0 if one of them is 0 everywhere.
        saturation: share of values beyond the last code; 0.0 for an unbounded dictionary.
    """

    codes_used: int
    largest_code: int
    zero_share: float
    relative_error: float
    cosine: float
    saturation: float


class FeatureDistribution:
    """Collects the values of one feature, unquantized, for its :class:`FeatureStatistics`."""

    def __init__(self):
        self._num_values = self._num_zeros = self._num_negatives = 0
        self._sum = self._squares = 0.0
        self._min, self._max = math.inf, -math.inf
        self._sample = _Sample()

    def add(self, values: Tensor) -> None:
        """Values of one more image, shape (N,)."""
        if not values.numel():
            return
        self._num_values += values.numel()
        self._num_zeros += int((values == 0).sum())
        self._num_negatives += int((values < 0).sum())
        self._sum += float(values.sum(dtype=torch.float64))
        self._squares += _dot(values, values)
        self._min = min(self._min, float(values.min()))
        self._max = max(self._max, float(values.max()))
        self._sample.add(values)

    def result(self) -> FeatureStatistics:
        """
        Raises:
            ValueError: no value was added.
        """
        _check_any(self._num_values)
        sample = self._sample.values()
        return FeatureStatistics(
            num_values=self._num_values,
            zero_share=self._num_zeros / self._num_values,
            negative_share=self._num_negatives / self._num_values,
            mean=self._sum / self._num_values,
            rms=math.sqrt(self._squares / self._num_values),
            min=self._min,
            max=self._max,
            percentiles=dict(zip(PERCENTILES, np.percentile(sample, PERCENTILES).tolist())),
            percentile_sample=len(sample),
        )


class _Sample:
    """
    At most ``SAMPLE_SIZE`` of the added values; every value has the same probability.

    It keeps all values up to that size. Then it halves the rate as often as necessary.
    """

    def __init__(self):
        self._generator = torch.Generator().manual_seed(_SAMPLE_SEED)
        self._parts: List[Tensor] = []
        self._size = 0
        self._rate = 1.0

    def add(self, values: Tensor) -> None:
        self._keep(values)
        while self._size > SAMPLE_SIZE:
            parts, self._parts, self._size = self._parts, [], 0
            for part in parts:
                self._keep(part, 0.5)
            self._rate *= 0.5

    def _keep(self, values: Tensor, rate: Optional[float] = None) -> None:
        rate = self._rate if rate is None else rate
        if rate < 1.0:
            values = values[torch.rand(values.shape, generator=self._generator) < rate]
        self._parts.append(values.clone())
        self._size += values.numel()

    def values(self) -> np.ndarray:
        return torch.cat(self._parts).numpy()


class CodeUse:
    """Collects the codes that a quantizer gives one feature, for its :class:`CodeStatistics`."""

    def __init__(self, quantizer: CodeQuantizer):
        self._quantizer = quantizer
        self._used: Set[int] = set()
        self._num_values = self._num_zeros = self._num_saturated = 0
        self._error = self._squares = self._code_squares = self._product = 0.0

    def add(self, values: Tensor) -> None:
        """Values of one more image, shape (N,)."""
        if not values.numel():
            return
        codes = self._quantizer.codes(values)
        quantized = self._quantizer.dequantize(codes, values.dtype)
        difference = quantized - values
        self._used.update(_distinct(codes))
        self._num_values += values.numel()
        self._num_zeros += int((codes == 0).sum())
        if self._quantizer.max_value is not None:
            beyond = values.abs() if self._quantizer.signed else values
            self._num_saturated += int((beyond > self._quantizer.max_value).sum())
        self._error += _dot(difference, difference)
        self._squares += _dot(values, values)
        self._code_squares += _dot(quantized, quantized)
        self._product += _dot(quantized, values)

    def result(self) -> CodeStatistics:
        """
        Raises:
            ValueError: no value was added.
        """
        _check_any(self._num_values)
        norms = math.sqrt(self._squares) * math.sqrt(self._code_squares)
        return CodeStatistics(
            codes_used=len(self._used),
            largest_code=max(abs(code) for code in self._used),
            zero_share=self._num_zeros / self._num_values,
            relative_error=math.sqrt(self._error / self._squares) if self._squares else 0.0,
            cosine=self._product / norms if norms else 0.0,
            saturation=self._num_saturated / self._num_values,
        )


def _check_any(num_values: int) -> None:
    if not num_values:
        raise ValueError("there is no value to take statistics of; give one image or more")


def _distinct(codes: Tensor) -> List[int]:
    low, high = int(codes.min()), int(codes.max())
    if high - low < codes.numel():  # counting is linear, sorting is not
        return (torch.bincount(codes - low).nonzero().flatten() + low).tolist()
    return codes.unique().tolist()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))
