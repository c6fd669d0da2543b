"""
The summary after training: the mimic's share of the gradient, and whether rounding made the student oscillate.

It says what to change, if necessary.
"""

import logging
import math
import statistics
from typing import List, Optional

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = [
    "AT_THRESHOLD",
    "DOMINANT",
    "NEGLIGIBLE",
    "SMALL_STRIDE",
    "MimicSummary",
    "summary_of_shares",
    "warning_of_threshold",
]

# A share of the gradient at the student's map outside of these is a likely mistake in the weight. Between them, the
# constant weights of docs/evidence.md differ little in AP.
NEGLIGIBLE = 0.05
DOMINANT = 0.95

# The summary warns if a larger share of r(f_s) is at the threshold; 20 % would be there if r were spread evenly.
# docs/evidence.md ("The search") compares shares with AP.
AT_THRESHOLD = 0.5
# In units of the root mean square of the teacher's features in the regions. With a smaller stride an oscillation by one
# code is small. With 0.7 and 0.9 students learned as well as without rounding or better, though three quarters of their
# features were at the threshold; with 1.4 they lost 6 AP, with 2 they collapsed.
SMALL_STRIDE = 1.0
# So many measurements at the end of the training count.
_LAST = 10

_SHARE = "qmimic/grad_share_map"
_THRESHOLD = "qmimic/student_at_threshold"
_RMS = "qmimic/teacher_rms"


class MimicSummary(HookBase):
    """
    Logs the line, and the warning where there is one, when training ends.

    For a trainer of another project as well: it reads the event storage alone.

    Args:
        cfg: of the training; without a teacher the hook says nothing.
    """

    def __init__(self, cfg: CfgNode):
        self._is_on = bool(cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE)
        self._schedule = cfg.MODEL.QMIMIC.MIMIC.SCHEDULE
        self._weight = cfg.MODEL.QMIMIC.MIMIC.LOSS_WEIGHT
        self._period = cfg.MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD
        quantizer = cfg.MODEL.QMIMIC.QUANTIZER
        self._rounds_student = quantizer.NAME not in ("", "Clamp") and cfg.MODEL.QMIMIC.MIMIC.QUANTIZE_STUDENT
        self._stride = quantizer.STRIDE

    def after_train(self) -> None:
        if not self._is_on or not comm.is_main_process() or self.trainer.iter < self.trainer.max_iter:
            return
        history = self.trainer.storage.histories().get(_SHARE)
        shares = [share for share, _ in history.values()] if history is not None else []
        line = summary_of_shares(shares, self._weight, self._schedule)
        if line is not None:
            logging.getLogger(__name__).info(line)
        elif self._weight > 0.0 and not self._period and self._schedule != "balanced":
            logging.getLogger(__name__).info(
                "The mimic's share of the gradient was not measured: MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD is 0"
            )
        if self._rounds_student:
            self._warn_of_threshold()

    def _warn_of_threshold(self) -> None:
        histories = self.trainer.storage.histories()
        for name, history in histories.items():
            if name.startswith(_THRESHOLD):  # with the level's name after it if there are several
                level = name[len(_THRESHOLD) :]
                last = [share for share, _ in history.values()[-_LAST:]]
                warning = warning_of_threshold(last, self._stride, histories[_RMS + level].latest(), level[1:])
                if warning is not None:
                    logging.getLogger(__name__).warning(warning)


def warning_of_threshold(shares: List[float], stride: float, rms: float, level: str = "") -> Optional[str]:
    """
    Args:
        shares: of the entries of r(f_s) between 0 and s that were at the threshold between the two, 0..1, last
            measurements of a student whose side of the mimic is rounded.
        stride: ``MODEL.QMIMIC.QUANTIZER.STRIDE``.
        rms: root mean square of the teacher's features in the regions, in units of the feature.
        level: name of the student's map where there are several.

    Returns:
        The warning; None where their mean is at most :data:`AT_THRESHOLD`, none is finite, or the stride is below
        :data:`SMALL_STRIDE` times ``rms``.
    """
    finite = [share for share in shares if math.isfinite(share)]
    mean = statistics.fmean(finite) if finite else 0.0
    if mean <= AT_THRESHOLD or stride < SMALL_STRIDE * rms:
        return None
    place = f" at {level}" if level else ""
    return (
        f"{mean:.0%} of the student's features between 0 and the first code{place} ended at the "
        "threshold between the two, where rounding makes them oscillate; evenly spread it would be 20%. Set "
        f"MODEL.QMIMIC.QUANTIZER.STRIDE smaller (it is {stride:g}, the teacher's features there have a root mean "
        f"square of {rms:.2g}), or keep the codes and round the student's side of "
        'the mimic no more: MIMIC.QUANTIZE_STUDENT False with MIMIC.ADAPTER "conv1x1_relu"'
    )


def summary_of_shares(shares: List[float], weight: float, schedule: str) -> Optional[str]:
    """
    Args:
        shares: of the gradient at the student's map that were the mimic's, 0..1, in the order of measurement.
        weight, schedule: ``MODEL.QMIMIC.MIMIC.LOSS_WEIGHT`` and ``SCHEDULE`` of the training.

    Returns:
        The line; None where nothing finite was measured.
    """
    finite = [share for share in shares if math.isfinite(share)]
    if not finite:
        return None
    median = statistics.median(finite)
    of = f"median of {len(finite)} measurements, {min(finite):.0%} to {max(finite):.0%}"
    of = of if len(finite) > 1 else "one measurement"
    line = f"The mimic's share of the gradient at the student's map was {median:.0%} ({of})"
    if NEGLIGIBLE <= median <= DOMINANT:
        return f"{line}: neither negligible nor dominant"
    word, change = ("negligible", "larger") if median < NEGLIGIBLE else ("dominant", "smaller")
    if schedule == "balanced":
        advice = f"set MODEL.QMIMIC.MIMIC.BALANCE_SHARE {change}, or widen BALANCE_BOUNDS if lambda rests at one"
    else:
        # share = w g / (w g + d): the weight that would have made it one half
        factor = (1.0 - median) / median if 0.0 < median < 1.0 else (10.0 if median < 0.5 else 0.1)
        advice = (
            f"set MODEL.QMIMIC.MIMIC.LOSS_WEIGHT {change} (it is {weight:g}; {weight * factor:.2g} would have made the "
            'share one half), or SCHEDULE to "balanced"'
        )
    return f"{line}: {word}. To change it, {advice}"
