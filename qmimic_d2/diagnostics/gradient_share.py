"""
Gradient focusing, measured: how much of the student's gradient is the mimic's.

If lambda is too large early in training, the gradient follows the mimic loss and neglects the others. The paper names
this gradient focusing (Wei et al., ECCV 2018, https://arxiv.org/abs/1805.02152v3).
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Sequence

import torch
from detectron2.utils import comm
from torch import Tensor

__all__ = ["GradientShare", "averaged", "gradient_share", "summed"]


@dataclass
class GradientShare:
    """
    Two gradients at one place, by their norms and their inner product.

    Attributes:
        detection, mimic: Euclidean norms.
        product: inner product.
    """

    detection: float
    mimic: float
    product: float

    @property
    def ratio(self) -> float:
        """mimic / detection; NaN if the detection losses have no gradient."""
        return self.mimic / self.detection if self.detection else math.nan

    @property
    def share(self) -> float:
        """mimic / (mimic + detection), 0..1; NaN if neither has a gradient."""
        total = self.mimic + self.detection
        return self.mimic / total if total else math.nan

    @property
    def cosine(self) -> float:
        """-1..1; NaN if one of the two is zero."""
        lengths = self.mimic * self.detection
        return self.product / lengths if lengths else math.nan

    def scaled(self, weight: float) -> "GradientShare":
        """The same with the mimic's gradient multiplied by lambda."""
        return GradientShare(self.detection, self.mimic * weight, self.product * weight)

    def scalars(self, place: str) -> Dict[str, float]:
        """By their names in the event storage, which end in ``place``."""
        return {
            f"qmimic/grad_norm_mimic_{place}": self.mimic,
            f"qmimic/grad_norm_detection_{place}": self.detection,
            f"qmimic/grad_ratio_{place}": self.ratio,
            f"qmimic/grad_cosine_{place}": self.cosine,
            f"qmimic/grad_share_{place}": self.share,
        }


def gradient_share(
    detection: Tensor, mimic: Tensor, places: Sequence[Sequence[Tensor]]
) -> List[GradientShare]:
    """
    The gradients of two losses at several places of the graph that made them.

    The graph stays and no ``.grad`` changes, so that the training's own backward pass is the same bit for bit. Hooks of
    DistributedDataParallel do not run.

    Args:
        detection, mimic: scalar losses of one step.
        places: sets of tensors; each set counts as one long vector. The gradient is zero for a loss without a graph,
            and for a tensor that the loss does not depend on.

    Returns:
        One for each set.
    """
    tensors = [tensor for place in places for tensor in place]
    of_detection = _gradients(detection, tensors)
    of_mimic = _gradients(mimic, tensors)
    shares, start = [], 0
    for place in places:
        stop = start + len(place)
        shares.append(_share(of_detection[start:stop], of_mimic[start:stop]))
        start = stop
    return shares


def averaged(shares: Sequence[GradientShare]) -> List[GradientShare]:
    """
    The mean of the shares of all processes of a distributed training, the same in each. All processes call it in the
    same step.

    It averages squares and not gradients, because every process only knows the gradient of its own images.
    """
    squares = torch.tensor([(each.detection**2, each.mimic**2, each.product) for each in shares], dtype=torch.float64)
    gathered = comm.all_gather(squares)
    means = torch.stack(list(gathered)).mean(dim=0).tolist()
    return [GradientShare(math.sqrt(ours), math.sqrt(theirs), product) for ours, theirs, product in means]


def summed(losses: Dict[str, Tensor]) -> Tensor:
    """The sum of a loss dict, as the trainer sums it."""
    return sum(losses.values()) if losses else torch.zeros(())


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> List[Tensor]:
    if not loss.requires_grad or not tensors:
        return [torch.zeros(()) for _ in tensors]
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def _share(of_detection: Sequence[Tensor], of_mimic: Sequence[Tensor]) -> GradientShare:
    detection = mimic = product = 0.0
    for ours, theirs in zip(of_detection, of_mimic):
        ours, theirs = ours.double().flatten(), theirs.double().flatten()
        detection += float(ours.dot(ours))
        mimic += float(theirs.dot(theirs))
        if ours.numel() == theirs.numel():
            product += float(ours.dot(theirs))
    return GradientShare(math.sqrt(detection), math.sqrt(mimic), product)
