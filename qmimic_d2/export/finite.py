"""
A detector that diverged says so, instead of finding nothing: Detectron2 drops what is not finite without a word.

Shape letters:
    N: number of detections.
"""

import contextlib
from typing import Any, Iterator, List

import torch
from torch import Tensor, nn

from qmimic_d2.modeling.family import output_layers

__all__ = ["OutputWatch", "watch_outputs"]


class OutputWatch:
    """The sum of what the heads of a detector gave, which is finite where all of it is."""

    def __init__(self):
        self._sums: List[Tensor] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook."""
        self._sums += [each.detach().sum(dtype=torch.float32) for each in _floats(output)]

    @property
    def is_finite(self) -> bool:
        """Whether every number was finite."""
        return not self._sums or bool(torch.stack(self._sums).sum().isfinite())

    def mark(self, outputs: List[Tensor]) -> List[Tensor]:
        """
        Adds a detection of NaN where a number was not finite, and none otherwise, so that a traced graph can say it.

        Args:
            outputs: boxes (N, 4), scores (N,) and classes (N,).
        """
        if not self._sums:
            return outputs
        boxes, scores, classes = outputs
        nan_or_zero = (torch.stack(self._sums).sum() * 0.0).reshape(1)
        row = torch.isnan(nan_or_zero).nonzero()  # (1, 1) or (0, 1)
        value = row.to(scores.dtype) + nan_or_zero.to(scores.dtype)
        return [
            torch.cat([boxes, value.expand(-1, 4).to(boxes.dtype)]),
            torch.cat([scores, value[:, 0]]),
            torch.cat([classes, row[:, 0].to(classes.dtype)]),
        ]


@contextlib.contextmanager
def watch_outputs(model: nn.Module) -> Iterator[OutputWatch]:
    """Watches the layers that give logits and box offsets while the block runs, in any of Detectron2's detectors."""
    watch = OutputWatch()
    handles = [module.register_forward_hook(watch) for module in output_layers(model)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _floats(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _floats(each)
