#!/usr/bin/env python
"""
What the diagnostics cost on a CPU, as a share of the training time.

    python benchmarks/diagnostics_cost.py [--repeats 20] [--calls 5] [--json FILE] [--opts KEY VALUE ...]

Training steps of the demo's quantization mimic: without any measurement, and with one kind of measurement in every
step. The difference, divided by the default period, is what that kind costs. All are measured alternately in one run.
"""

import argparse
import os
import sys
import tempfile
from typing import Any, Dict, List, Optional, Sequence

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import cv2  # noqa: E402
import torch  # noqa: E402

import step_cost  # noqa: E402
from qmimic_d2.engine import load_config  # noqa: E402
from qmimic_d2.files import check_writable, write_json  # noqa: E402

STUDENT = step_cost.STUDENTS["c"]
PERIOD, GRADIENT_PERIOD = "MODEL.QMIMIC.DIAGNOSTICS.PERIOD", "MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD"
_BALANCED = ["MODEL.QMIMIC.MIMIC.SCHEDULE", "balanced", "MODEL.QMIMIC.MIMIC.BALANCE_PERIOD"]

# By kind: KEY VALUE pairs that measure in every step.
KINDS: Dict[str, List[str]] = {
    "none": [PERIOD, "0", GRADIENT_PERIOD, "0"],
    "features": [PERIOD, "1", GRADIENT_PERIOD, "0"],
    "gradients": [PERIOD, "0", GRADIENT_PERIOD, "1"],
    "balance": [PERIOD, "0", GRADIENT_PERIOD, "0", *_BALANCED, "1"],
}
LABELS = {
    "features": "comparison of student and teacher (DIAGNOSTICS.PERIOD)",
    "gradients": "gradients at map and backbone (DIAGNOSTICS.GRADIENT_PERIOD)",
    "balance": 'gradients at the map, for SCHEDULE "balanced" (MIMIC.BALANCE_PERIOD)',
}


def measure(repeats: int, calls: int, opts: Sequence[str] = ()) -> List[Dict[str, Any]]:
    """
    Args:
        repeats: values behind every median.
        calls: steps of each kind in a repeat.
        opts: KEY VALUE pairs over the config.

    Returns:
        One row per kind: how much longer a measuring step takes, the default period, and the share of the training
        time in percent; the last row sums what is on by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        actions, _ = step_cost.build_steps(folder, opts)  # writes the teacher, too
        batches = actions["c"].batches
        weights = ["MODEL.QMIMIC.TEACHER.WEIGHTS", os.path.join(folder, "teacher.pth")]
        steps = {
            kind: step_cost.TrainingStep(load_config(STUDENT, [*weights, *opts, *pairs], device="cpu"), batches)
            for kind, pairs in KINDS.items()
        }
        for _ in range(3):
            step_cost.run_all(steps)
        times = step_cost.time_alternately(steps, repeats, calls)
        periods = _default_periods(load_config(STUDENT, opts, device="cpu"))
    rows = []
    for kind, label in LABELS.items():
        longer = [step / plain for step, plain in zip(times[kind], times["none"])]
        row = {"measurement": label, **step_cost.spread(longer, "step / plain step"), "period": periods[kind]}
        rows.append({**row, "% of training": 100.0 * (row["step / plain step"] - 1.0) / periods[kind]})
    total = sum(row["% of training"] for row in rows[:2])
    rows.append({**dict.fromkeys(rows[0], "-"), "measurement": "both that are on by default", "% of training": total})
    return rows


def _default_periods(cfg) -> Dict[str, int]:
    diagnostics = cfg.MODEL.QMIMIC.DIAGNOSTICS
    return {
        "features": diagnostics.PERIOD,
        "gradients": diagnostics.GRADIENT_PERIOD,
        "balance": cfg.MODEL.QMIMIC.MIMIC.BALANCE_PERIOD,
    }


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="values behind every median and percentile")
    parser.add_argument("--calls", type=int, default=5, help="steps of each kind in a repeat")
    parser.add_argument("--json", metavar="FILE", default="", help="write the table to this file as well")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config")
    args = parser.parse_args(arguments)
    if args.json:
        check_writable(args.json, "--json")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = measure(args.repeats, args.calls, args.opts)
    print(step_cost.table(rows))
    if args.json:
        write_json(args.json, {"machine": step_cost.machine(), "rows": rows})


if __name__ == "__main__":
    main()
