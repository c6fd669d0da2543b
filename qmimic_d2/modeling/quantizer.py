"""
Code dictionaries and the straight-through quantizers built on them.

Shape letters:
    *: any shape; quantizers work entry by entry.

A quantizer replaces every entry of a feature map by the nearest code of its dictionary D::

    Q(f) = b   if  (a + b) / 2 < f <= (b + c) / 2,     a < b < c adjacent in D

so a value half-way between two codes goes down. With D = {0, s, 2s, ...} it follows a ReLU and is called a quantized
ReLU: everything up to s / 2, also negative values, becomes 0. The gradient is that of full precision: Q counts as the
identity, and only the mask of the (clipped) ReLU remains.

Source: Wei et al., "Quantization Mimic: Towards Very Tiny CNN for Object Detection", ECCV 2018, section 3
(https://arxiv.org/abs/1805.02152v3). The signed dictionary, the bounded one and the clamp without rounding
are this project's.
"""

import abc
import math
from typing import Optional

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

__all__ = [
    "CONSTANT_QUANTIZERS",
    "QUANTIZER_REGISTRY",
    "ClampQuantizer",
    "CodeQuantizer",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "UniformQuantizer",
    "build_code_quantizer",
    "build_quantizer",
]

QUANTIZER_REGISTRY = Registry("QUANTIZER")
QUANTIZER_REGISTRY.__doc__ = """
Registry of quantizers. ``MODEL.QMIMIC.QUANTIZER.NAME`` is the class name without its ending ``Quantizer``:
"Uniform" builds :class:`UniformQuantizer`. A class registered here is built as
``cls(stride=..., num_codes=..., signed=...)``.
"""

_FLOAT32 = torch.finfo(torch.float32)


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit maps are coded in float32, so that they get the codes of their exact values."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantizer's codes. Backward: the full-precision gradient of its (clipped) ReLU."""

    @staticmethod
    def forward(ctx, x: Tensor, quantizer: "Quantizer") -> Tensor:
        ctx.quantizer = quantizer
        if quantizer.has_gradient_mask:
            # This costs no memory: the ReLU before it or the layer after it keeps the map anyway.
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
    Base class: a function of each entry of a feature map, with the gradient of a (clipped) ReLU.

    Args:
        stride: s > 0, in units of the feature: the first nonzero code.
        num_codes: size L >= 2 of the dictionary, zero included; 0 = unbounded. A signed dictionary mirrors
            these L codes and so has 2L - 1.
        signed: mirror the dictionary, for maps without a ReLU at their end. Halves then go towards zero, and the
            gradient is the identity (zero beyond the outermost codes of a bounded dictionary).

    Raises:
        ValueError: the stride is not positive or not finite in float32, ``num_codes`` is 1 or negative,
            or the outermost code is not finite in float32.
    """

    def __init__(self, stride: float = 1.0, num_codes: int = 0, *, signed: bool = False):
        super().__init__()
        name = type(self).__name__
        if isinstance(stride, bool) or not (_FLOAT32.tiny <= stride <= _FLOAT32.max):
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.STRIDE is {stride!r}; the distance between codes must be a "
                "positive finite number, for example 0.5 (python -m qmimic_d2 calibrate recommends one)"
            )
        is_integer = not isinstance(num_codes, bool) and float(num_codes).is_integer()
        if not is_integer or num_codes < 0 or num_codes == 1:  # zero alone would erase the map
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.NUM_CODES is {num_codes!r}; give the size of the "
                "dictionary with zero included (2 or more), or 0 for an unbounded one"
            )
        self.stride = float(stride)
        self.num_codes = int(num_codes)
        self.signed = bool(signed)
        if num_codes and max(stride, 1.0) * self._multiple(self.max_code) > _FLOAT32.max:
            raise ValueError(
                f"{name}: MODEL.QMIMIC.QUANTIZER.NUM_CODES is {num_codes}, and with STRIDE {stride} the last "
                "code is too large for float32; give fewer codes, or 0 for an unbounded dictionary"
            )

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

    @abc.abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """The forward pass without autograd. Shape (*), as ``x``."""

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
        # hardtanh's mask excludes both ends; the next float above the outermost code includes it.
        top = _next_float(self.max_value, x.dtype)
        return torch.ops.aten.hardtanh_backward(grad, x, -top if self.signed else 0.0, top)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, num_codes={self.num_codes}, signed={self.signed}"

    def _check_floating(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes a floating-point map, not {x.dtype}")

    def _multiple(self, index: int) -> float:
        """Code ``index`` >= 0, in units of the stride."""
        return float(index)


class CodeQuantizer(Quantizer):
    """Base class of quantizers with a dictionary; a subclass chooses the nearest code."""

    def quantize(self, x: Tensor) -> Tensor:
        self._check_floating(x)
        r = x.detach().to(_computing_dtype(x.dtype)) / self.stride
        return self._nearest_(r).mul_(self.stride).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """
        Index of every entry's code: 0 for the code 0, k for the k-th code above it, -k for its mirror image.

        Args:
            x: feature map, shape (*).

        Returns:
            int64 tensor, shape (*).

        Raises:
            ValueError: an entry is NaN, or infinite or beyond an int64 index where the dictionary is unbounded.
        """
        self._check_floating(x)
        multiples = self._nearest_(x.detach().to(_computing_dtype(x.dtype)) / self.stride)
        has_code = multiples.abs() < self._index_limit
        if not has_code.all():
            raise ValueError(
                f"{type(self).__name__}.codes: {int((~has_code).sum())} of {has_code.numel()} entries are NaN, "
                "infinite or too large and have no code; look for the layer that diverged"
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
            is_beyond = self.max_code is not None and max(-low, high) > self.max_code
            if is_beyond or (low < 0 and not self.signed):
                raise ValueError(f"code indices {low} to {high} are not all in the dictionary of {self}")
        dtype = dtype or torch.get_default_dtype()
        return self._multiple_of_index(codes, _computing_dtype(dtype)).mul_(self.stride).to(dtype)

    _index_limit = math.inf  # codes from here on, in units of the stride, have no int64 index

    @abc.abstractmethod
    def _nearest_(self, r: Tensor) -> Tensor:
        """
        The nearest code of ``r``, both in units of the stride. Shape (*); the memory of ``r`` may be used.
        """

    @abc.abstractmethod
    def _index(self, multiples: Tensor) -> Tensor:
        """Indices of codes given in units of the stride. Shape (*)."""

    @abc.abstractmethod
    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes in units of the stride of their indices: the inverse of :meth:`_index`."""


@QUANTIZER_REGISTRY.register()
class UniformQuantizer(CodeQuantizer):
    """
    D = {0, s, 2s, 3s, ...}; bounded: {0, ..., (L-1)s}; signed: mirrored.

    The quantized ReLU of the paper (section 3.2), which uses s = 1.
    """

    _index_limit = 2.0**63

    def _nearest_(self, r: Tensor) -> Tensor:
        magnitude = r.abs() if self.signed else r
        # r - 1/2 rounded up is the nearest code, halves down. From 2^23 (float32) on, subtracting 1/2 would round odd
        # integers to an even neighbour; subtracting 1/4 twice leaves every float there as it is.
        magnitude.sub_(0.25).sub_(0.25).ceil_().clamp_(min=0.0, max=self.max_code)
        return magnitude.copysign_(r) if self.signed else r

    def _index(self, multiples: Tensor) -> Tensor:
        return multiples.to(torch.int64)

    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


@QUANTIZER_REGISTRY.register()
class PowerOfTwoQuantizer(CodeQuantizer):
    """
    D = {0, s, 2s, 4s, 8s, ...}; bounded: the first L of these; signed: mirrored.

    The paper compares it with the uniform dictionary (section 3.2). Code k > 0 is 2^(k-1) s, so the midpoint to the
    next code is 1.5 * 2^(k-1) s.
    """

    def _nearest_(self, r: Tensor) -> Tensor:
        magnitude = r.abs() if self.signed else r
        # Next to a power of two the logarithm may be rounded to either side of it: both give that power.
        largest_exponent = math.frexp(torch.finfo(r.dtype).max)[1] - 1
        power = magnitude.log2().floor_().clamp_(min=0, max=largest_exponent).exp2_()
        nearest = torch.where(magnitude > 1.5 * power, 2.0 * power, power).masked_fill_(magnitude <= 0.5, 0.0)
        if self.max_code is not None:
            nearest.clamp_(max=self._multiple(self.max_code))
        return nearest.mul_(r.sign()) if self.signed else nearest

    def _multiple(self, index: int) -> float:
        return 2.0 ** min(index - 1, 1023) if index else 0.0  # 2^1024 is no Python float

    def _index(self, multiples: Tensor) -> Tensor:
        index = multiples.abs().clamp(min=0.5).log2().round().to(torch.int64).add_(1)
        return index.mul_(multiples.sign().to(torch.int64)) if self.signed else index

    def _multiple_of_index(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes.to(torch.int64)  # one below the uint8 code 0 is 255
        magnitude = torch.ldexp(torch.ones_like(codes, dtype=dtype), codes.abs() - 1)
        return magnitude.mul_(codes.sign().to(dtype))


@QUANTIZER_REGISTRY.register()
class ClampQuantizer(Quantizer):
    """
    The control: the (clipped) ReLU of a uniform dictionary, without rounding.

    It separates the effect of the ReLU from that of rounding when quantized and full-precision mimic are compared. The
    stride only sets the bound (L-1)s of a bounded dictionary.
    """

    def quantize(self, x: Tensor) -> Tensor:
        self._check_floating(x)
        if not self.has_gradient_mask:
            return x.clone()
        return x.clamp(min=-self.max_value if self.signed else 0.0, max=self.max_value)


# Functions of each entry alone, and the same all through a training. A project's own quantizer may be neither.
CONSTANT_QUANTIZERS = (ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer)


def build_quantizer(cfg: CfgNode) -> Optional[Quantizer]:
    """
    Builds the quantizer that the config names, or None if ``MODEL.QMIMIC.QUANTIZER.NAME`` is "".

    Raises:
        KeyError: the name is not registered.
        ValueError: stride or number of codes is out of range, or RELATIVE_STRIDE has not become a number yet.
    """
    node = cfg.MODEL.QMIMIC.QUANTIZER
    return _build(node.NAME, node) if node.NAME else None


def build_code_quantizer(cfg: CfgNode) -> CodeQuantizer:
    """
    Builds the quantizer for match ratios. If the config rounds nothing ("" or "Clamp"), it is the uniform dictionary of
    the config's stride, so that all variants are measured alike.
    """
    node = cfg.MODEL.QMIMIC.QUANTIZER
    return _build("Uniform" if node.NAME in ("", "Clamp") else node.NAME, node)


def _build(name: str, node: CfgNode) -> Quantizer:
    if node.RELATIVE_STRIDE:
        raise ValueError(
            f"MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE is {node.RELATIVE_STRIDE}, and nobody has measured the teacher. "
            "Take the config in the training's OUTPUT_DIR, which has the number, or call "
            "qmimic_d2.engine.with_measured_stride before you build anything; or set STRIDE, and RELATIVE_STRIDE 0.0"
        )
    class_name = f"{name}Quantizer"
    if class_name not in QUANTIZER_REGISTRY:
        known = sorted(key[: -len("Quantizer")] for key, _ in QUANTIZER_REGISTRY)
        raise KeyError(
            f'MODEL.QMIMIC.QUANTIZER.NAME is {name!r}; registered quantizers are {known}, and "" stands for none'
        )
    build = QUANTIZER_REGISTRY.get(class_name)
    return build(stride=node.STRIDE, num_codes=node.NUM_CODES, signed=node.SIGNED)


def _next_float(value: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is greater than the one nearest to ``value``."""
    return float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype)))
