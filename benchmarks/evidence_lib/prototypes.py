"""
What was tried in the search for a setting in which rounding helps, and is no part of the product.

Quantizers and meta-architectures under names of their own, so that a variant of the matrix is a config here as well;
``benchmarks/train_variant.py`` trains with them. docs/evidence.md ("The search") says what they did.

Shape letters:
    M: regions; T: channels of the teacher's map; N: images.
    *: any shape.
"""

import functools
import math
from typing import Dict, List, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qmimic_d2.modeling import (
    QUANTIZER_REGISTRY,
    ClampQuantizer,
    Pair,
    QuantMimicRCNN,
    QuantRCNN,
    RoIMimicLoss,
    UniformQuantizer,
)
from qmimic_d2.modeling.attach import attached_mimic
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

# All runs of the matrix on the easy digits are this long.
_ITERATIONS = 800


def _progress() -> float:
    """Done share of the training, 0.0 to 1.0; 1.0 outside of one."""
    return min(get_event_storage().iter / _ITERATIONS, 1.0) if has_event_storage() else 1.0


def _clamped(x: Tensor, quantizer: UniformQuantizer) -> Tensor:
    """What a quantizer does besides rounding. Shape (*)."""
    return x.clamp(min=0.0, max=quantizer.max_value)


@QUANTIZER_REGISTRY.register()
class LateUniformQuantizer(UniformQuantizer):
    """Full precision in the first half of the training, the dictionary from then on."""

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(x) if _progress() >= 0.5 else _clamped(x, self)


@QUANTIZER_REGISTRY.register()
class SoftUniformQuantizer(UniformQuantizer):
    """Soft to hard: a share of the rounding that grows from none to all over the first half of the training."""

    def quantize(self, x: Tensor) -> Tensor:
        return torch.lerp(_clamped(x, self), super().quantize(x), min(2.0 * _progress(), 1.0))


@QUANTIZER_REGISTRY.register()
class GrowingUniformQuantizer(UniformQuantizer):
    """A stride that grows from a 16th of the config's to all of it over the first three quarters of the training."""

    def quantize(self, x: Tensor) -> Tensor:
        stride = self.stride * max(1.0 / 16.0, min(_progress() / 0.75, 1.0))
        codes = round(self.max_value / stride) + 1 if self.num_codes else 0
        return _uniform(stride, codes).quantize(x)


@functools.lru_cache(maxsize=2048)
def _uniform(stride: float, num_codes: int) -> UniformQuantizer:
    return UniformQuantizer(stride, num_codes)


@QUANTIZER_REGISTRY.register()
class ChannelUniformQuantizer(UniformQuantizer):
    """
    A stride per channel, proportional to the channel's root mean square in the teacher.

    STRIDE times sqrt(T) times the channel's share of the energy, so that it is STRIDE where all channels are alike.
    For maps and pooled regions of T channels, (N or M, T, *, *); what comes without a gradient is the teacher's, so
    it needs ON_BACKBONE False.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._energy: Tensor = torch.empty(0)
        self._is_student = False

    def forward(self, x: Tensor) -> Tensor:
        self._is_student = torch.is_grad_enabled()
        try:
            return super().forward(x)
        finally:
            self._is_student = False

    def quantize(self, x: Tensor) -> Tensor:
        if not self._is_student:
            energy = x.detach().square().mean(dim=(0, 2, 3))
            self._energy = energy if self._energy.numel() == 0 else self._energy.lerp(energy, 0.05)
        rms = self._energy.sqrt()
        relative = (rms / self._energy.mean().sqrt()).clamp(min=0.05)[:, None, None]
        return super().quantize(x / relative) * relative


@QUANTIZER_REGISTRY.register()
class UnmaskedUniformQuantizer(UniformQuantizer):
    """The codes of the dictionary, with the identity as gradient."""

    has_gradient_mask = False


@QUANTIZER_REGISTRY.register()
class UnmaskedClampQuantizer(ClampQuantizer):
    """The clamp at 0, with the identity as gradient."""

    has_gradient_mask = False


@QUANTIZER_REGISTRY.register()
class LeakyUniformQuantizer(UniformQuantizer):
    """The codes of the dictionary; of the gradient a tenth passes where the ReLU lets nothing pass."""

    def mask_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(super().mask_gradient(grad, x), grad, 0.1)


class _OtherMimicRCNN(QuantMimicRCNN):
    """Changes its mimic, if there is one; parameters and settings stay."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        mimic = attached_mimic(self)
        if mimic is not None:
            self.change(mimic)

    @staticmethod
    def change(mimic: RoIMimicLoss) -> None:
        raise NotImplementedError


@META_ARCH_REGISTRY.register()
class BeforeAdapterRCNN(_OtherMimicRCNN):
    """r(Q(f_s)) in place of Q(r(f_s))."""

    @staticmethod
    def change(mimic: RoIMimicLoss) -> None:
        quantizer, mimic.student_quantizer = mimic.student_quantizer, None
        for adapter in mimic.adapters.values():
            adapter.register_forward_pre_hook(lambda module, inputs: (quantizer(inputs[0]),))


@META_ARCH_REGISTRY.register()
class BeforePoolingRCNN(_OtherMimicRCNN):
    """Both sides are quantized as maps, and pooled regions are means of codes."""

    @staticmethod
    def change(mimic: RoIMimicLoss) -> None:
        mimic.pairs = functools.partial(_pairs_of_codes, mimic)
        mimic.distance = lambda pair: mimic.normalized(pair.student, pair.teacher, pair.num_regions)


@META_ARCH_REGISTRY.register()
class CodesDifferRCNN(_OtherMimicRCNN):
    """
    The full-precision difference, of those entries whose codes differ.

    Where codes differ by one the straight-through gradient is a whole stride; here it is what really lies between.
    """

    @staticmethod
    def change(mimic: RoIMimicLoss) -> None:
        mimic.distance = functools.partial(_where_codes_differ, mimic)


@META_ARCH_REGISTRY.register()
class UndershootRCNN(_OtherMimicRCNN):
    """Three times the loss of active entries (r > 0) whose code is below the teacher's."""

    @staticmethod
    def change(mimic: RoIMimicLoss) -> None:
        mimic.distance = functools.partial(_undershoot_weighted, mimic)


def _pairs_of_codes(
    mimic: RoIMimicLoss, student_maps: Dict[str, Tensor], teacher_maps: Dict[str, Tensor], boxes: List[Boxes]
) -> List[Pair]:
    pairs, total = [], sum(len(each) for each in boxes)
    for level, rois in enumerate(mimic.pooler.assign(boxes)):
        name, other = mimic.student_features[level], mimic.teacher_features[level]
        codes = mimic.student_quantizer(mimic.adapters[name](student_maps[name]))
        sides = [mimic.pooler.pool(level, each, rois) for each in (codes, teacher_maps[other])]
        pairs.append(Pair(name, *sides, total))
    return pairs


def _where_codes_differ(mimic: RoIMimicLoss, pair: Pair) -> Tensor:
    quantize = mimic.student_quantizer.quantize
    differs = quantize(pair.student) != quantize(pair.teacher)
    return mimic.normalized(torch.where(differs, pair.student, pair.teacher), pair.teacher, pair.num_regions)


def _undershoot_weighted(mimic: RoIMimicLoss, pair: Pair, weight: float = 3.0) -> Tensor:
    target = mimic.teacher_quantizer.quantize(pair.teacher)
    adapted = mimic.student_quantizer(pair.student)
    stretched = target + math.sqrt(weight) * (adapted - target)  # whose square is the weighted one
    is_below = (pair.student > 0.0) & (adapted < target)
    return mimic.normalized(torch.where(is_below, stretched, adapted), target, pair.num_regions)


@META_ARCH_REGISTRY.register()
class LearnedStrideRCNN(QuantMimicRCNN):
    """
    The stride of the student's own features is learned from the detection losses; the teacher's stays the config's.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020 (https://arxiv.org/abs/1902.08153), equation 3.
    """

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        hook = attached_quantizer(self.backbone)
        self.learned_stride = _LearnedStride(hook.quantizer.stride, hook.quantizer.max_code)
        hook.quantizer = self.learned_stride


class _LearnedStride(nn.Module):
    signed = False

    def __init__(self, stride: float, max_code: int):
        super().__init__()
        self.log_stride = nn.Parameter(torch.tensor(stride).log())
        self.max_code = max_code

    def forward(self, x: Tensor) -> Tensor:
        stride = self.log_stride.exp()
        multiples = (x / stride).clamp(0.0, self.max_code)
        return (multiples + (multiples.round() - multiples).detach()) * stride


class _LowBitWeight(nn.Module):
    """Symmetric codes of ``bits`` bits per output channel, straight through. Shape (*)."""

    def __init__(self, bits: int):
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp(min=1e-8)
        codes = (weight.detach() / scale * self.levels).round() / self.levels * scale
        return weight + (codes - weight).detach()


class _LowBitInput:
    """Forward pre-hook: codes from 0 to the running 99.9th percentile of a layer's input, straight through."""

    def __init__(self, bits: int):
        self.levels = 2**bits - 1
        self.top = 0.0

    def __call__(self, layer: nn.Module, inputs: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        x = inputs[0]
        if layer.training and x.numel():
            sample = x.detach().flatten()[:: max(x.numel() // 20000, 1)]
            top = float(sample.quantile(0.999))
            self.top = top if self.top == 0.0 else 0.95 * self.top + 0.05 * top
        step = max(self.top, 1e-8) / self.levels
        clamped = x.clamp(0.0, step * self.levels)
        codes = (clamped.detach() / step).round() * step
        return (clamped + (codes - clamped).detach(), *inputs[1:])


def _to_low_bit(model: nn.Module, bits: int) -> None:
    """
    Every convolution and linear layer reads and holds codes, except the first one, which reads the image, and those
    whose outputs are scores and offsets; as is the custom with low-bit networks.
    """
    layers: List[Tuple[str, nn.Module]] = [
        (name, layer)
        for part in ("backbone", "proposal_generator", "roi_heads")
        for name, layer in getattr(model, part).named_modules(prefix=part)
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    last = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred")
    for name, layer in layers[1:]:
        if not name.endswith(last):
            parametrize.register_parametrization(layer, "weight", _LowBitWeight(bits))
            layer.register_forward_pre_hook(_LowBitInput(bits))


@META_ARCH_REGISTRY.register()
class ThreeBitRCNN(QuantRCNN):
    """Weights and activations in 3 bits."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        _to_low_bit(self, 3)


@META_ARCH_REGISTRY.register()
class ThreeBitMimicRCNN(QuantMimicRCNN):
    """Weights and activations in 3 bits, with a teacher in full precision or on codes."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        _to_low_bit(self, 3)
