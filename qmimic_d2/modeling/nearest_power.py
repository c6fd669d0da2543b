"""
The nearest power of two, a value half-way between two of them going down.

Shape letters:
    *: any shape.

Between 2^k and 2^(k+1) the midpoint is 1.5 * 2^k.
"""

import math

import torch
from torch import Tensor

__all__ = ["index_of_power", "nearest_power_of_two_"]

# Per dtype: the integer of the same width, the mask of the exponent bits, and the largest addend that
# does not carry a mantissa of exactly one half (1.5 * 2^k) into the exponent.
_FLOAT_BITS = {
    torch.float32: (torch.int32, 0x7F800000, 0x003FFFFF),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x0007FFFFFFFFFFFF),
}

# Per dtype: the integer of the same width, the number of mantissa bits, and the exponent bits of 1/2.
_EXPONENT = {torch.float32: (torch.int32, 23, 126), torch.float64: (torch.int64, 52, 1022)}


def nearest_power_of_two_(x: Tensor) -> Tensor:
    """
    Replaces every entry by the nearest of 0, 1, 2, 4, 8, ...; entries up to 1/2 become 0.

    Args:
        x: float32 or float64, shape (*). Worked on in place, except under ``torch.jit.trace``.

    Returns:
        shape (*). NaN stays NaN, infinity stays infinity.
    """
    return _by_logarithm(x) if torch.jit.is_tracing() else _by_bits_(x)


def index_of_power(x: Tensor) -> Tensor:
    """
    k + 1 for every 2^k >= 1, 0 for 0: the inverse of the codes 0, 1, 2, 4, ... by their index.

    Args:
        x: float32 or float64, shape (*), finite powers of two from 1 on, and zeros.

    Returns:
        shape (*), the integer of the same width as ``x``.
    """
    integer, num_mantissa_bits, exponent_of_half = _EXPONENT[x.dtype]
    return x.view(integer).bitwise_right_shift(num_mantissa_bits).sub_(exponent_of_half).clamp_(min=0)


def _by_bits_(x: Tensor) -> Tensor:
    integer, exponent_bits, round_down_half = _FLOAT_BITS[x.dtype]
    is_zero, is_nan = x <= 0.5, torch.isnan(x)
    # Adding almost half a mantissa carries every value above 1.5 * 2^k into the next exponent;
    # dropping the mantissa then leaves a power of two.
    x.clamp_(min=1.0)
    x.view(integer).add_(round_down_half).bitwise_and_(exponent_bits)
    return x.masked_fill_(is_zero, 0.0).masked_fill_(is_nan, math.nan)


def _by_logarithm(x: Tensor) -> Tensor:
    """A tracer, and the formats that its graph is exported to, have no view of a float's bits."""
    largest_exponent = math.frexp(torch.finfo(x.dtype).max)[1] - 1
    # Next to a power of two the logarithm may be rounded to either side of it: both give that power.
    power = x.log2().floor().clamp(min=0, max=largest_exponent).exp2()
    nearest = torch.where(x > 1.5 * power, 2.0 * power, power)
    return torch.where(x <= 0.5, torch.zeros_like(x), nearest)
