"""The warning of a mimic loss that is of another order than the detector's losses."""

import logging
from typing import Dict

from torch import Tensor

from qmimic_d2.modeling.gradient_share import summed
from qmimic_d2.modeling.mimic import RoIMimicLoss
from qmimic_d2.modeling.weighting import BalancedWeight

__all__ = ["ScaleWarning"]

# From so many times the detection losses on, the mimic loss drowns them, or the training diverges.
_MOST_TIMES = 100.0


class ScaleWarning:
    """Looks at the first step that has a mimic loss, and at no other."""

    def __init__(self):
        self._has_looked = False

    def look(self, detection: Dict[str, Tensor], mimic: Dict[str, Tensor], loss: RoIMimicLoss, weight: float) -> None:
        """
        Warns where the mimic loss times its full weight is too large, and names the settings that are not in force.

        Args:
            detection: the detector's losses of a step.
            mimic: those of the mimic, without lambda.
            loss: what computed them.
            weight: lambda of the step. A balanced one counts; the others count as what they are after the warm-up.
        """
        if self._has_looked:
            return
        self._has_looked = True
        is_balanced = isinstance(loss.weight, BalancedWeight)
        full = weight if is_balanced else loss.weight.weight
        theirs, ours = summed(detection).item(), summed(mimic).item() * full
        if ours <= _MOST_TIMES * theirs:
            return
        advice = []
        if loss.normalize_by != "target":
            advice.append("NORMALIZE_BY 'target', a relative error")
        if not is_balanced:
            advice += ["SCHEDULE 'balanced', which needs no weight", "a smaller LOSS_WEIGHT"]
        elif not advice:
            advice.append("a smaller BALANCE_SHARE or upper bound in BALANCE_BOUNDS")
        logging.getLogger(__name__).warning(
            "with its full weight of %.3g the mimic loss is %.3g, and the detection losses together are %.3g: "
            "MODEL.QMIMIC.MIMIC.%s does not fit NORMALIZE_BY %r, and the training will neglect the detector or diverge. "
            "Below MODEL.QMIMIC.MIMIC set %s",
            *(full, ours, theirs, "BALANCE_SHARE" if is_balanced else "LOSS_WEIGHT"),
            *(loss.normalize_by, " or ".join(advice)),
        )
