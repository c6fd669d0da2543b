"""lambda, the weight of the mimic loss, over time."""

import math

__all__ = ["SCHEDULES", "MimicWeight"]

# Values of MODEL.QMIMIC.MIMIC.SCHEDULE.
SCHEDULES = ("constant", "warmup")


class MimicWeight:
    """
    lambda as a function of the iteration.

    Args:
        weight: final lambda, >= 0.
        schedule: "constant"; or "warmup": rising linearly from 0 at iteration 0 to ``weight`` at
            iteration ``warmup_iters``, so that the detection losses shape the first features.
        warmup_iters: length of the warm-up, in iterations.

    Raises:
        ValueError: a negative or non-finite weight, an unknown schedule, a negative length.
    """

    def __init__(self, weight: float, schedule: str = "constant", warmup_iters: int = 0):
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.LOSS_WEIGHT is {weight!r}; lambda is a finite number >= 0 "
                "(0.0 measures the match and trains without the mimic)"
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.SCHEDULE is {schedule!r}; choose one of {list(SCHEDULES)}"
            )
        if warmup_iters < 0:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.WARMUP_ITERS is {warmup_iters!r}; give a number of iterations >= 0"
            )
        self.weight = float(weight)
        self.warmup_iters = warmup_iters if schedule == "warmup" else 0

    def at(self, iteration: int) -> float:
        """lambda at an iteration, counted from 0 (the first one of the whole training)."""
        if iteration >= self.warmup_iters:
            return self.weight
        return self.weight * iteration / self.warmup_iters
