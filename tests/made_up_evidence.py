"""Records of runs that never took place, for tests of what is made of them."""

import random
from typing import Any, Dict, Iterable, Mapping, Optional

from evidence_lib.matrix import Run
from evidence_lib.records import DONE, FAILED
from evidence_lib.runs import Runs


def made_up_record(
    runs: Runs, run: Run, ap: Optional[float], measures: Mapping[str, float] = {}, **more: Any
) -> Dict[str, Any]:
    """A record that counts as that of the run; with ``ap`` None, of a failure."""
    record = runs._head(run, FAILED if ap is None else DONE)
    if ap is None:
        return {**record, "reason": "stopped with status 1: FloatingPointError: Loss became infinite or NaN"}
    return {
        **record,
        **{"AP": ap, "AP50": ap + 25.0, "AP75": ap - 10.0},
        "measures": {name: dict.fromkeys(("early", "late", "last", "mean"), value) for name, value in measures.items()},
        "parameters": 254101,
        "flops": 28686848,
        "iterations": 800,
        "seconds": 90.0,
        "weights": f"weights of {run.name}",
        **more,
    }


def write_made_up(runs: Runs, wanted: Iterable[Run]) -> None:
    """Random but plausible results: an effect of the seed that all variants share, one of the variant, and noise."""
    for run in wanted:
        effects = [random.Random(f"{part}") for part in (run.seed, run.variant.name, run.name)]
        ap = 52.0 + effects[0].gauss(0.0, 1.5) + effects[1].gauss(0.0, 2.5) + effects[2].gauss(0.0, 1.0)
        measures = {}
        if run.variant.teacher:
            measures = {
                "match_ratio": 0.77 + effects[2].gauss(0.0, 0.01),
                "match_ratio_nonzero": 0.3 + effects[2].gauss(0.0, 0.01),
                "grad_share_map": effects[1].uniform(0.1, 0.9) + effects[2].gauss(0.0, 0.02),
                "grad_share_backbone": effects[1].uniform(0.1, 0.9) + effects[2].gauss(0.0, 0.02),
            }
        runs.records.write(made_up_record(runs, run, ap, measures))
