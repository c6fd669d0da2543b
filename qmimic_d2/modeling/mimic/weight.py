"""
lambda, the weight of the mimic loss, over time.

Source: Wei et al., ECCV 2018, section 4, https://arxiv.org/abs/1805.02152v3. The paper finds lambda = 1 (on its 1/(2N)
sum) best. A smaller one has no effect. A larger one is harmful early in training, which the paper names gradient
focusing. The schedules and the balanced weight are this project's answer to it.
"""

import logging
import math
from typing import Dict, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from qmimic_d2.diagnostics.gradient_share import summed

__all__ = ["SCHEDULES", "BalancedWeight", "MimicWeight", "build_mimic_weight"]

# Values of MODEL.QMIMIC.MIMIC.SCHEDULE.
SCHEDULES = ("constant", "warmup", "cosine", "step", "balanced")

_PREFIX = "MODEL.QMIMIC.MIMIC."

# A balanced weight warns after so many measurements without a gradient, if there was none with one.
_MOST_SKIPPED = 10

# exp of more is not representable.
_MOST_LOG = 700.0

# A mimic loss of so many times the detection losses drowns them, or the training diverges.
_MOST_TIMES = 100.0


class MimicWeight(nn.Module):
    """
    lambda as a function of the iteration alone. It has no state.

    With w the weight and t the iteration::

        constant  w
        warmup    w * t / warmup_iters until t = warmup_iters, then w: the detection losses shape the first features
        cosine    w * (1 + cos(pi * t / max_iter)) / 2: falls to 0 at the end of the training
        step      w * gamma^(number of steps <= t)
    """

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        schedule: str = "constant",
        warmup_iters: int = 0,
        max_iter: int = 1,
        steps: Sequence[int] = (),
        gamma: float = 0.1,
        stop_iter: int = 0,
    ):
        """
        Args:
            weight: lambda >= 0.
            schedule: one of :data:`SCHEDULES`; "balanced" takes a :class:`BalancedWeight`.
            warmup_iters: length of "warmup", in iterations.
            max_iter: length of the training, in iterations. Read by "cosine".
            steps: iterations from which "step" multiplies by another ``gamma``.
            gamma: that factor, in (0, 1].
            stop_iter: with any schedule, lambda is 0 from this iteration on; 0 = never.

        Raises:
            ValueError: a value out of its range, or an unknown schedule; names the key.
        """
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(
                f"{_PREFIX}LOSS_WEIGHT is {weight!r}; lambda is a finite number >= 0 "
                "(0.0 measures the match and trains without the mimic)"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"{_PREFIX}SCHEDULE is {schedule!r}; choose one of {list(SCHEDULES)}")
        if warmup_iters < 0:
            raise ValueError(f"{_PREFIX}WARMUP_ITERS is {warmup_iters!r}; give a number of iterations >= 0")
        if stop_iter < 0:
            raise ValueError(f"{_PREFIX}STOP_ITER is {stop_iter!r}; give an iteration >= 0 (0 = never stop)")
        if schedule == "step" and (not steps or list(steps) != sorted(steps) or min(steps) < 0):
            raise ValueError(f"{_PREFIX}STEPS is {list(steps)}; give rising iterations >= 0 for SCHEDULE 'step'")
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"{_PREFIX}GAMMA is {gamma!r}; give a factor above 0.0 and up to 1.0")
        self.weight = float(weight)
        self.schedule = schedule
        self.warmup_iters = warmup_iters
        self.max_iter = max(max_iter, 1)
        self.steps = tuple(steps)
        self.gamma = float(gamma)
        self.stop_iter = stop_iter
        self._has_judged = False

    @classmethod
    def from_config(cls, cfg: CfgNode):
        node = cfg.MODEL.QMIMIC.MIMIC
        return {
            "weight": node.LOSS_WEIGHT,
            "schedule": node.SCHEDULE,
            "warmup_iters": node.WARMUP_ITERS,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "steps": tuple(node.STEPS),
            "gamma": node.GAMMA,
            "stop_iter": node.STOP_ITER,
        }

    def at(self, iteration: int) -> float:
        """lambda at an iteration, counted from 0 (the first one of the whole training)."""
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        return self.weight * self._factor(iteration)

    def wants_balance(self, iteration: int) -> bool:
        """Whether :meth:`balance` needs the gradients of this iteration."""
        return False

    def warn_of_scale(self, detection: Dict[str, Tensor], mimic: Dict[str, Tensor], normalize_by: str) -> None:
        """
        Warns if the mimic loss times the full weight is too large. It judges the first step that has a mimic loss.

        Args:
            detection: the detector's losses of a step.
            mimic: those of the mimic, without lambda.
            normalize_by: of the mimic loss.
        """
        if self._has_judged:
            return
        self._has_judged = True
        theirs, ours = summed(detection).item(), summed(mimic).item() * self.weight
        if ours <= _MOST_TIMES * theirs:
            return
        relative = "" if normalize_by == "target" else "NORMALIZE_BY 'target', a relative error, and "
        logging.getLogger(__name__).warning(
            "with the full weight of %.3g the mimic loss is %.3g, and the detection losses together are %.3g: "
            "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT does not fit NORMALIZE_BY %r, and the training will neglect the detector "
            "or diverge. Below MODEL.QMIMIC.MIMIC set %sSCHEDULE 'balanced', which needs no weight",
            *(self.weight, ours, theirs, normalize_by, relative),
        )

    def extra_repr(self) -> str:
        return f"weight={self.weight}, schedule={self.schedule}"

    def _factor(self, iteration: int) -> float:
        if self.schedule == "warmup" and iteration < self.warmup_iters:
            return iteration / self.warmup_iters
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(iteration / self.max_iter, 1.0)))
        if self.schedule == "step":
            return self.gamma ** sum(iteration >= step for step in self.steps)
        return 1.0


class BalancedWeight(MimicWeight):
    """
    lambda that keeps the mimic's share of the gradient at the student's feature map at a given value.

    With g_det the norm of the detection losses' gradient at the map, g_mim that of the unweighted mimic
    loss, and p the wanted share::

        lambda = p / (1 - p) * R,      R = exp(mean of log(g_det / g_mim))

    so that lambda * g_mim / (lambda * g_mim + g_det) is p if g_det / g_mim is at its mean. The mean is exponential,
    over the measured iterations. Its bias towards the start is corrected: the first measurement, in iteration 0,
    counts in full. LOSS_WEIGHT then only switches the mimic on or off.

    The mean is in the module's ``state_dict``, so that a resumed training goes on with it. It is no buffer: it needs no
    GPU, and DDP has nothing to broadcast.
    """

    @configurable
    def __init__(
        self,
        *,
        share: float = 0.8,
        period: int = 10,
        momentum: float = 0.9,
        bounds: Tuple[float, float] = (1e-4, 1e4),
        **kwargs,
    ):
        """
        Args:
            share: p, in (0, 1).
            period: iterations between two measurements, >= 1. lambda is constant between them.
            momentum: of the mean of log(g_det / g_mim), in [0, 1): 0.9 remembers about ten measurements.
            bounds: smallest and largest lambda.
            kwargs: of :class:`MimicWeight`; its ``weight`` is in force until the first measurement, and 0.0
                turns the mimic off.

        Raises:
            ValueError: a value out of its range; names the key.
        """
        super().__init__(**kwargs)
        if not 0.0 < share < 1.0:
            raise ValueError(f"{_PREFIX}BALANCE_SHARE is {share!r}; give a share between 0.0 and 1.0, both excluded")
        if period < 1:
            raise ValueError(f"{_PREFIX}BALANCE_PERIOD is {period!r}; give a number of iterations >= 1")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"{_PREFIX}BALANCE_MOMENTUM is {momentum!r}; give a number from 0.0 to below 1.0")
        if len(bounds) != 2 or not 0.0 < bounds[0] <= bounds[1] < math.inf:
            raise ValueError(
                f"{_PREFIX}BALANCE_BOUNDS is {list(bounds)}; give the smallest and the largest lambda, both > 0.0"
            )
        self.share = float(share)
        self.period = period
        self.momentum = float(momentum)
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self._log_ratio = 0.0
        self._num_measured = 0
        self._num_skipped = 0
        self._has_warned = False

    @classmethod
    def from_config(cls, cfg: CfgNode):
        node = cfg.MODEL.QMIMIC.MIMIC
        return {
            **super().from_config(cfg),
            "share": node.BALANCE_SHARE,
            "period": node.BALANCE_PERIOD,
            "momentum": node.BALANCE_MOMENTUM,
            "bounds": tuple(node.BALANCE_BOUNDS),
        }

    def at(self, iteration: int) -> float:
        weight = super().at(iteration)
        if weight == 0.0 or not self._num_measured:
            return weight
        low, high = (math.log(bound) for bound in self.bounds)
        return math.exp(min(max(self._log_wanted(), low), high))

    def wants_balance(self, iteration: int) -> bool:
        return iteration % self.period == 0 and super().at(iteration) > 0.0

    def balance(self, detection_norm: float, mimic_norm: float) -> None:
        """
        Adds a measurement to the mean. It is skipped if a norm is zero or not finite (no region, an overflow).

        Args:
            detection_norm: norm of the detection losses' gradient at the student's compared maps.
            mimic_norm: the same of the unweighted mimic loss.
        """
        if not (0.0 < detection_norm < math.inf and 0.0 < mimic_norm < math.inf):
            self._num_skipped += 1
            self._warn_of_nothing_measured(detection_norm, mimic_norm)
            return
        logarithm = math.log(detection_norm) - math.log(mimic_norm)
        self._log_ratio = self.momentum * self._log_ratio + (1.0 - self.momentum) * logarithm
        self._num_measured += 1
        self._warn_of_bounds()

    def warn_of_scale(self, detection: Dict[str, Tensor], mimic: Dict[str, Tensor], normalize_by: str) -> None:
        """Nothing: it keeps a share of the gradient, whatever the losses are."""

    def _log_wanted(self) -> float:
        """log(lambda) of the wanted share, without the bounds."""
        mean = self._log_ratio / (1.0 - self.momentum**self._num_measured)
        return math.log(self.share / (1.0 - self.share)) + mean

    def _warn_of_bounds(self) -> None:
        wanted, (low, high) = self._log_wanted(), self.bounds
        bound = min(max(wanted, math.log(low)), math.log(high))
        if bound == wanted or self._has_warned:
            return
        self._has_warned = True
        # lambda * g_mim / g_det, which is p / (1 - p) at the wanted lambda
        ratio = self.share / (1.0 - self.share) * math.exp(min(bound - wanted, _MOST_LOG))
        logging.getLogger(__name__).warning(
            "the balanced weight rests at %.3g, a bound of %sBALANCE_BOUNDS %s, where the mimic has %.3g of the "
            "gradient: BALANCE_SHARE %g takes a weight of %.3g. Set wider bounds, or NORMALIZE_BY 'target', "
            "whose loss needs no extreme weight",
            *(math.exp(bound), _PREFIX, list(self.bounds), ratio / (1.0 + ratio)),
            *(self.share, math.exp(min(wanted, _MOST_LOG))),
        )

    def _warn_of_nothing_measured(self, detection_norm: float, mimic_norm: float) -> None:
        if self._num_measured or self._num_skipped != _MOST_SKIPPED:
            return
        logging.getLogger(__name__).warning(
            "%sSCHEDULE is 'balanced', and %d measurements in a row gave nothing to balance by: at the student's "
            "compared maps the gradient of the detection losses has norm %.3g, that of the mimic %.3g. LOSS_WEIGHT "
            "%g is in force. Look at the regions (ROI_SOURCE), and at QUANTIZER.STRIDE, which may erase the features",
            *(_PREFIX, self._num_skipped, detection_norm, mimic_norm, self.weight),
        )

    def get_extra_state(self) -> Tensor:
        # float64 holds Python's numbers exactly
        return torch.tensor([self._log_ratio, self._num_measured], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._log_ratio, self._num_measured = float(state[0]), int(state[1])

    def extra_repr(self) -> str:
        return f"share={self.share}, period={self.period}, momentum={self.momentum}, bounds={self.bounds}"


def build_mimic_weight(cfg: CfgNode) -> MimicWeight:
    """The weight that ``MODEL.QMIMIC.MIMIC`` describes."""
    return BalancedWeight(cfg) if cfg.MODEL.QMIMIC.MIMIC.SCHEDULE == "balanced" else MimicWeight(cfg)
