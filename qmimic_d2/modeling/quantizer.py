"""
Code dictionaries and the straight-through quantizers built on them.

Shape letters:
    *: any shape; quantizers work entry by entry.

A quantizer replaces every entry of a feature map by the nearest code of its dictionary D::

    Q(f) = b   if  (a + b) / 2 < f <= (b + c) / 2,     a < b < c adjacent in D

so a value half-way between two codes goes down. With D = {0, s, 2s, ...} it follows a ReLU and is
called a quantized ReLU: everything up to s / 2, negatives included, becomes 0. The gradient is the
full-precision one: Q counts as the identity and only the (clipped) ReLU's own mask remains.

Source: Wei et al., "Quantization Mimic: Towards Very Tiny CNN for Object Detection", ECCV 2018,
section 3 (https://arxiv.org/abs/1805.02152v3). The signed dictionary, the bounded one and the clamp
without rounding are this project's.
"""

import abc
import math
from typing import Optional

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

__all__ = [
    "QUANTIZER_REGISTRY",
    "ClampQuantizer",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "UniformQuantizer",
    "build_code_quantizer",
    "build_quantizer",
]

QUANTIZER_REGISTRY = Registry("QUANTIZER")
QUANTIZER_REGISTRY.__doc__ = """
Registry of quantizers. ``MODEL.QMIMIC.QUANTIZER.NAME`` is the class name without its ending
``Quantizer``: "Uniform" builds :class:`UniformQuantizer`. A class registered here is built as
``cls(stride=..., num_codes=..., signed=...)``.
"""

# Entries worked on at a time. A chunk and its scratch stay in a core's cache, and the scratch never
# grows with the map, so that a forward pass allocates its output and nothing else of that size.
_CHUNK = 1 << 16

# Per computing dtype: the integer of the same width, the mask of the exponent bits, and the largest
# addend that does not carry a mantissa of exactly one half (1.5 * 2^k) into the exponent.
_FLOAT_BITS = {
    torch.float32: (torch.int32, 0x7F800000, 0x003FFFFF),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x0007FFFFFFFFFFFF),
}


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit maps are coded in float32, so that they get the codes of their exact values."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_captured() -> bool:
    """True while a tracer or compiler records the operations (it fuses them itself)."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantizer's codes. Backward: the full-precision gradient of its (clipped) ReLU."""

    @staticmethod
    def forward(ctx, x: Tensor, quantizer: "Quantizer") -> Tensor:
        ctx.quantizer = quantizer
        if quantizer.has_gradient_mask:
            # The map itself, by reference: the ReLU before it or the layer after it keeps it anyway.
            ctx.save_for_backward(x)
        return quantizer.quantize(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        quantizer = ctx.quantizer
        if not quantizer.has_gradient_mask:
            return grad, None
        return quantizer.mask_gradient(grad, ctx.saved_tensors[0]), None


class Quantizer(nn.Module, abc.ABC):
    """
    Base of the quantizers: everything but the choice of the nearest code.

    Args:
        stride: s > 0, in units of the feature: the first nonzero code.
        num_codes: size L >= 2 of the dictionary, zero included; 0 = unbounded. A signed dictionary
            mirrors these L codes and so has 2L - 1.
        signed: mirror the dictionary, for maps that no ReLU ends. Halves then go towards zero and
            the gradient is the identity (zero beyond the outermost codes when bounded).

    Raises:
        ValueError: the stride is not a positive finite number, or ``num_codes`` is 1 or negative.
    """

    def __init__(self, stride: float = 1.0, num_codes: int = 0, *, signed: bool = False):
        super().__init__()
        name = type(self).__name__
        if isinstance(stride, bool) or not (math.isfinite(stride) and stride > 0.0):
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.STRIDE is {stride!r}; the distance between codes "
                "must be a positive finite number, for example 0.5 "
                "(python -m qmimic_d2 calibrate recommends one)"
            )
        if isinstance(num_codes, bool) or num_codes != int(num_codes) or num_codes < 0:
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.NUM_CODES is {num_codes!r}; give the size of the "
                "dictionary with zero included (2 or more), or 0 for an unbounded one"
            )
        if num_codes == 1:
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.NUM_CODES is 1, a dictionary of zero alone that "
                "erases the map; give 2 or more, or 0 for an unbounded one"
            )
        self.stride = float(stride)
        self.num_codes = int(num_codes)
        self.signed = bool(signed)

    @property
    def max_code(self) -> Optional[int]:
        """Index of the outermost code; None when the dictionary is unbounded."""
        return self.num_codes - 1 if self.num_codes else None

    @property
    def max_value(self) -> Optional[float]:
        """Value of the outermost code, in units of the feature; None when unbounded."""
        return None if self.max_code is None else self.stride * self._multiple(self.max_code)

    @property
    def has_gradient_mask(self) -> bool:
        """False where the gradient is the identity: an unbounded signed dictionary."""
        return not self.signed or self.num_codes > 0

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: feature map, shape (*), any floating-point dtype and memory format.

        Returns:
            Codes as values: shape, dtype and (dense) memory format of ``x``. NaN stays NaN.
        """
        if torch.jit.is_tracing():  # a tracer records no autograd.Function
            return self.quantize(x)
        return _StraightThrough.apply(x, self)

    def quantize(self, x: Tensor) -> Tensor:
        """The forward pass without autograd: one allocation of the size of ``x``. Shape (*)."""
        self._check_floating(x)
        dtype = _computing_dtype(x.dtype)
        if _is_captured():
            return self._nearest_(x.to(dtype) / self.stride).mul(self.stride).to(x.dtype)
        out = torch.empty_like(x)  # keeps the strides of a dense map, contiguous otherwise
        if x.stride() != out.stride():
            out.copy_(x)
            x = out
        flat_in, flat_out = _flat(x), _flat(out)
        for start in range(0, flat_in.numel(), _CHUNK):
            source, target = flat_in[start : start + _CHUNK], flat_out[start : start + _CHUNK]
            if x.dtype == dtype:
                torch.div(source, self.stride, out=target)
                self._nearest_(target).mul_(self.stride)
            else:
                scratch = source.to(dtype).div_(self.stride)
                target.copy_(self._nearest_(scratch).mul_(self.stride))
        return out

    def mask_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """
        The full-precision gradient: ``grad`` where the (clipped) ReLU passes it, 0 elsewhere.

        Args:
            grad: gradient at the output, shape (*).
            x: input of the quantizer, shape (*): f > 0 passes (and f <= the outermost code).

        Returns:
            gradient at the input, shape (*), one fused pass.
        """
        if self.max_value is None:
            return torch.ops.aten.threshold_backward(grad, x, 0)
        # hardtanh's mask is open at both ends; the next float above the outermost code closes it.
        top = _first_float_above(self.max_value, x.dtype)
        return torch.ops.aten.hardtanh_backward(grad, x, -top if self.signed else 0.0, top)

    def codes(self, x: Tensor) -> Tensor:
        """
        Index of every entry's code: 0 for the code 0, k for the k-th code above it (negative
        indices in a signed dictionary).

        Args:
            x: feature map, shape (*).

        Returns:
            int64 tensor, shape (*).

        Raises:
            ValueError: an entry is NaN, or infinite where the dictionary is unbounded.
        """
        self._check_floating(x)
        multiples = self._nearest_(x.detach().to(_computing_dtype(x.dtype)) / self.stride)
        if not torch.isfinite(multiples).all():
            raise ValueError(
                f"{type(self).__name__}.codes: {int((~torch.isfinite(multiples)).sum())} of "
                f"{multiples.numel()} entries are NaN or infinite and have no code"
            )
        return self._index(multiples)

    def dequantize(self, codes: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
        """
        The inverse of :meth:`codes`: ``q.dequantize(q.codes(x), x.dtype)`` equals ``q(x)``.

        Args:
            codes: integer code indices, shape (*).
            dtype: floating dtype of the result; the default dtype when left out.

        Returns:
            values of the codes, in units of the feature, shape (*).

        Raises:
            ValueError: an index lies outside the dictionary.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"dequantize takes integer code indices, not {codes.dtype}")
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if (low < 0 and not self.signed) or (
                self.max_code is not None and max(-low, high) > self.max_code
            ):
                raise ValueError(f"code indices {low} to {high} are not all in the dictionary of {self}")
        dtype = dtype or torch.get_default_dtype()
        computing = _computing_dtype(dtype)
        return self._multiple_of_index(codes, computing).mul_(self.stride).to(dtype)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, num_codes={self.num_codes}, signed={self.signed}"

    def _check_floating(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes a floating-point map, not {x.dtype}")

    @abc.abstractmethod
    def _nearest_(self, r: Tensor) -> Tensor:
        """Replaces ``r`` by its nearest code, both in units of the stride. In place, shape (*)."""

    @abc.abstractmethod
    def _multiple(self, index: int) -> float:
        """Code ``index`` >= 0, in units of the stride."""

    @abc.abstractmethod
    def _index(self, multiples: Tensor) -> Tensor:
        """Indices of codes given in units of the stride. Shape (*)."""

    @abc.abstractmethod
    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes in units of the stride of their indices: the inverse of :meth:`_index`."""


@QUANTIZER_REGISTRY.register()
class UniformQuantizer(Quantizer):
    """
    D = {0, s, 2s, 3s, ...}; bounded: {0, ..., (L-1)s}; signed: mirrored.

    The quantized ReLU of the paper (section 3.2), which uses s = 1.
    """

    def _nearest_(self, r: Tensor) -> Tensor:
        if self.signed:
            # |r| - 1/2 rounded up is the nearest code with halves towards zero.
            nearest = r.abs().sub_(0.5).ceil_().clamp_(min=0.0, max=self.max_code)
            return r.copy_(nearest.copysign_(r))
        return r.sub_(0.5).ceil_().clamp_(min=0.0, max=self.max_code)

    def _multiple(self, index: int) -> float:
        return float(index)

    def _index(self, multiples: Tensor) -> Tensor:
        return multiples.to(torch.int64)

    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


@QUANTIZER_REGISTRY.register()
class PowerOfTwoQuantizer(Quantizer):
    """
    D = {0, s, 2s, 4s, 8s, ...}; bounded: the first L of these; signed: mirrored.

    The dictionary that the paper compares the uniform one with (section 3.2). Code k > 0 is
    2^(k-1) s, so the midpoint between neighbours is 1.5 * 2^(k-1) s.
    """

    def _nearest_(self, r: Tensor) -> Tensor:
        sign = r.sign() if self.signed else None
        if self.signed:
            r.abs_()
        integer, exponent_bits, round_down_half = _FLOAT_BITS[r.dtype]
        is_zero, is_nan = r <= 0.5, torch.isnan(r)
        # Adding almost half a mantissa carries every value above 1.5 * 2^k into the next exponent;
        # dropping the mantissa then leaves a power of two.
        r.clamp_(min=1.0)
        r.view(integer).add_(round_down_half).bitwise_and_(exponent_bits)
        r.masked_fill_(is_zero, 0.0).masked_fill_(is_nan, math.nan)
        if self.max_code is not None:
            r.clamp_(max=self._multiple(self.max_code))
        return r.mul_(sign) if self.signed else r

    def _multiple(self, index: int) -> float:
        return math.ldexp(1.0, index - 1) if index else 0.0

    def _index(self, multiples: Tensor) -> Tensor:
        # frexp(2^k) = (1/2, k + 1), which is the index of that code.
        exponent = torch.frexp(multiples).exponent.to(torch.int64)
        return exponent.masked_fill_(multiples == 0, 0).mul_(multiples.sign().to(torch.int64))

    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        magnitude = torch.ldexp(torch.ones_like(codes, dtype=dtype), codes.abs() - 1)
        return magnitude.mul_(codes.sign().to(dtype))


@QUANTIZER_REGISTRY.register()
class ClampQuantizer(UniformQuantizer):
    """
    The control: the (clipped) ReLU of a uniform dictionary without its rounding.

    What a comparison of quantized with full-precision mimic would otherwise credit to rounding is
    often the ReLU's doing. The stride matters only for the bound (L-1)s of a bounded dictionary.
    """

    def quantize(self, x: Tensor) -> Tensor:
        self._check_floating(x)
        return x.clamp(min=self._min_value, max=self.max_value) if self.has_gradient_mask else x.clone()

    @property
    def _min_value(self) -> float:
        return -self.max_value if self.signed else 0.0

    def codes(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: always; a clamp has no code dictionary.
        """
        raise ValueError(
            "MODEL.QMIMIC.QUANTIZER.NAME is Clamp, which rounds to no codes; measure its maps with "
            "a UniformQuantizer of the same stride"
        )

    def dequantize(self, codes: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
        """
        Raises:
            ValueError: always; a clamp has no code dictionary.
        """
        return self.codes(codes)


def build_quantizer(cfg: CfgNode) -> Optional[Quantizer]:
    """
    Builds the quantizer that the config names, or None where ``MODEL.QMIMIC.QUANTIZER.NAME`` is "".

    Raises:
        KeyError: the name is not registered.
        ValueError: stride or number of codes is out of range.
    """
    node = cfg.MODEL.QMIMIC.QUANTIZER
    return _build(node.NAME, node) if node.NAME else None


def build_code_quantizer(cfg: CfgNode) -> Quantizer:
    """
    Builds the quantizer that match ratios are measured with.

    The same for every variant of a comparison: where the config rounds nothing ("" or "Clamp"), it
    is the uniform dictionary of the config's stride.
    """
    node = cfg.MODEL.QMIMIC.QUANTIZER
    return _build("Uniform" if node.NAME in ("", "Clamp") else node.NAME, node)


def _build(name: str, node: CfgNode) -> Quantizer:
    class_name = f"{name}Quantizer"
    if class_name not in QUANTIZER_REGISTRY:
        known = sorted(key[: -len("Quantizer")] for key, _ in QUANTIZER_REGISTRY)
        raise KeyError(
            f"MODEL.QMIMIC.QUANTIZER.NAME is {name!r}; registered quantizers are {known}, and \"\" "
            "stands for none"
        )
    return QUANTIZER_REGISTRY.get(class_name)(
        stride=node.STRIDE, num_codes=node.NUM_CODES, signed=node.SIGNED
    )


def _flat(x: Tensor) -> Tensor:
    """The memory of a dense tensor as one row, whatever the order of its axes. Shape (numel,)."""
    return x.detach().as_strided((x.numel(),), (1,))


def _first_float_above(value: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is greater than ``value``."""
    rounded = torch.tensor(value, dtype=dtype)
    if float(rounded) > value:
        return float(rounded)
    return float(torch.nextafter(rounded, torch.tensor(math.inf, dtype=dtype)))
