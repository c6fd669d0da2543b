"""The warning of a mimic loss that is of another order than the detector's losses."""

import logging
from typing import Dict

from torch import Tensor

from qmimic_d2.diagnostics.gradient_share import summed

__all__ = ["ScaleWarning"]

# From so many times the detection losses on, the mimic loss drowns them, or the training diverges.
_MOST_TIMES = 100.0


class ScaleWarning:
    """Looks at the first step that has a mimic loss, and at no other."""

    def __init__(self):
        self._has_looked = False

    def look(self, detection: Dict[str, Tensor], mimic: Dict[str, Tensor], full: float, normalize_by: str) -> None:
        """
        Warns where the mimic loss times its full weight is too large, and names the settings that are not in force.

        Args:
            detection: the detector's losses of a step.
            mimic: those of the mimic, without lambda.
            full: lambda after a warm-up.
            normalize_by: of the mimic loss.
        """
        if self._has_looked:
            return
        self._has_looked = True
        theirs, ours = summed(detection).item(), summed(mimic).item() * full
        if ours <= _MOST_TIMES * theirs:
            return
        relative = "" if normalize_by == "target" else "NORMALIZE_BY 'target', a relative error, and "
        logging.getLogger(__name__).warning(
            "with the full weight of %.3g the mimic loss is %.3g, and the detection losses together are %.3g: "
            "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT does not fit NORMALIZE_BY %r, and the training will neglect the detector "
            "or diverge. Below MODEL.QMIMIC.MIMIC set %sSCHEDULE 'balanced', which needs no weight",
            *(full, ours, theirs, normalize_by, relative),
        )
