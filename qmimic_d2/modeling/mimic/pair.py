"""
What the mimic loss compares at one level.

Shape letters:
    N: number of images.
    M: number of regions of the level.
    C, T: channels of the student's and of the teacher's map.  H, W: cells of a map.
    P: pooler resolution, in bins.
"""

import functools
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qmimic_d2.modeling.quantizer import Quantizer
from qmimic_d2.modeling.roi_pooling import LevelPooler

__all__ = ["MapPair", "Pair", "sum_of_squares"]

# Entries of a side that are compared at a time; those of one image may be more.
_PART = 2**18

# Q of the student's and of the teacher's side; None for none.
Quantizers = Tuple[Optional[Quantizer], Optional[Quantizer]]


@dataclass
class Pair:
    """
    What a loss compares at one level: both sides before any quantizer of the loss.

    Attributes:
        name: of the student's map.
        student: r(f_s), shape (M, T, P, P). Without a region it is empty, and its sum still reaches every parameter.
        teacher: f_t, same shape; no gradient flows back.
        num_regions: of all levels.
    """

    name: str
    student: Tensor
    teacher: Tensor
    num_regions: int

    @property
    def is_empty(self) -> bool:
        """Whether the level has no region."""
        return not len(self.student)


class MapPair(Pair):
    """
    A pair that pools its sides when they are read. :meth:`squares` compares them without holding them as a whole.

    Args:
        name, num_regions: of the :class:`Pair`.
        maps: of student and teacher, shapes (N, C, H, W) and (N, T, H', W').
        adapter: r.
        pooler, level, rois: one or more regions of this level, as :meth:`LevelPooler.assign` gives them.
    """

    is_empty = False

    def __init__(
        self,
        name: str,
        num_regions: int,
        maps: Tuple[Tensor, Tensor],
        adapter: nn.Module,
        pooler: LevelPooler,
        level: int,
        rois: Tensor,
    ):
        self.name, self.num_regions = name, num_regions
        self._maps, self._adapter = maps, adapter
        self._pooler, self._level, self._rois = pooler, level, rois
        self._takes_gradients = torch.is_grad_enabled()
        self.num_entries = maps[1].shape[1] * pooler.resolution**2  # of a region, T * P * P

    @staticmethod
    def fits(maps: Tuple[Tensor, Tensor], adapter: nn.Module, pooler: LevelPooler, rois: Tensor) -> bool:
        """
        Whether :meth:`squares` can be taken, and is cheaper: sparse pooling, an adapter that is linear and on which
        nothing hangs, and at least as many bins as the map has cells, since the adapter is applied to the cells.
        """
        student, teacher = maps
        return (
            all(pooler.is_sparse(each) for each in maps)
            and student.dtype == teacher.dtype
            and not torch.is_autocast_enabled("cpu")
            and type(adapter) in (nn.Conv2d, nn.Identity)
            and not (adapter._forward_hooks or adapter._forward_pre_hooks)
            and len(rois) * pooler.resolution**2 >= student[:, 0].numel() > 0
        )

    @functools.cached_property
    def student(self) -> Tensor:
        with torch.set_grad_enabled(self._takes_gradients):
            return self._adapter(self._pooler.pool(self._level, self._maps[0], self._rois))

    @functools.cached_property
    def teacher(self) -> Tensor:
        with torch.no_grad():
            return self._pooler.pool(self._level, self._maps[1], self._rois)

    def squares(self, quantizers: Quantizers) -> Tuple[Tensor, Tensor]:
        """
        Returns:
            sum_i || Q(f_t^i) - Q(r(f_s^i)) ||^2, and sum_i || Q(f_t^i) ||^2 without a gradient.
        """
        matrices = [self._pooler.sparse(self._level, self._maps[0], self._rois)]
        is_same = self._maps[0].shape[2:] == self._maps[1].shape[2:]
        matrices.append(matrices[0] if is_same else self._pooler.sparse(self._level, self._maps[1], self._rois))
        student, teacher = (each.permute(0, 2, 3, 1) for each in self._maps)
        bias = None
        if isinstance(self._adapter, nn.Conv2d):  # r(f) = A f + b, and the mean of A f is A times the mean of f
            student, bias = F.linear(student, self._adapter.weight.flatten(1)), self._adapter.bias
        return _Squares.apply(student.contiguous(), bias, teacher.contiguous(), matrices, quantizers)


def sum_of_squares(x: Tensor) -> Tensor:
    """
    sum_i || x^i ||^2 of M regions, shape (M, ...).

    In float32, one dot product of a million entries is wrong by 3e-4; region by region the error is below 1e-6.
    """
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square_().sum()


class _Squares(torch.autograd.Function):
    """
    The squared difference of :meth:`MapPair.squares`, and its gradient in the same pass over a few images at a time::

        d = Q(pool(A f_s) + b) - Q(pool(f_t))                squares = sum d^2
        gradient at pool(A f_s) + b: 2 d, where Q passes it
    """

    @staticmethod
    def forward(ctx, student: Tensor, bias: Optional[Tensor], teacher: Tensor, matrices, quantizers: Quantizers):
        (of_student, of_teacher), (quantizer, teacher_quantizer) = matrices, quantizers
        squares, energy = student.new_zeros(()), student.new_zeros(())
        grad = torch.empty_like(student) if any(ctx.needs_input_grad) else None
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for images in of_student.parts(_PART // student.shape[-1]):
            target = of_teacher.pool(teacher, *images)
            if teacher_quantizer is not None:
                target = teacher_quantizer.quantize(target)
            energy += sum_of_squares(target)
            adapted = of_student.pool(student, *images)
            if bias is not None:
                adapted += bias
            codes = adapted if quantizer is None else quantizer.quantize(adapted)
            difference = torch.sub(codes, target, out=target)
            squares += sum_of_squares(difference)
            if grad is None:
                continue
            if quantizer is not None and quantizer.has_gradient_mask:
                difference = quantizer.mask_gradient(difference, adapted)
            grad[slice(*images)] = of_student.spread(difference, *images)
            if bias is not None:
                grad_bias += difference.sum(dim=(0, 1, 2))
        ctx.save_for_backward(grad, grad_bias)
        ctx.mark_non_differentiable(energy)
        return squares, energy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_squares: Tensor, _):
        grads = (None if each is None else each * (2.0 * grad_squares) for each in ctx.saved_tensors)
        return (*grads, None, None, None)
