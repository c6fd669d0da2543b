#!/usr/bin/env python
"""
Trains the variants of benchmarks/evidence/matrix.yaml over many seeds and compares them: tables, plots, JSON.

    python benchmarks/evidence.py --list            what is done and what is open, with the expected time
    python benchmarks/evidence.py [--jobs 2]        everything that is open, except what is run on request
    python benchmarks/evidence.py --group main      some groups;  --variant and --seeds narrow it further
    python benchmarks/evidence.py --report-only     tables and plots of what there is
    python benchmarks/evidence.py --quick           four variants, two seeds, records of its own

Interrupted, it continues where it stopped. docs/evidence.md explains what is compared and how.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from typing import List, Optional, Sequence

# PyTorch's own warnings, of torch.jit when it is imported and of torch.fx when FLOPs are counted
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("torch.fx").setLevel(logging.ERROR)
# Progress goes to a pipe or a file as well as to a screen; there it should appear line by line.
sys.stdout.reconfigure(line_buffering=True)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools"), os.path.join(ROOT, "benchmarks")]

from tabulate import tabulate  # noqa: E402

from evidence_lib.matrix import Run, load_matrix  # noqa: E402
from evidence_lib.records import Records  # noqa: E402
from evidence_lib.report import write_report  # noqa: E402
from evidence_lib.runs import DONE, FAILED, OPEN, Runs  # noqa: E402
from evidence_lib.tables import comparison_table  # noqa: E402
from qmimic_d2.cli.task_runner import run_tasks  # noqa: E402
from qmimic_d2.engine import describe_error  # noqa: E402

RECORDS = "benchmarks/evidence"
DOCUMENT = "docs/evidence.md"


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.chdir(ROOT)
    try:
        matrix = load_matrix(args.matrix)
        runs = Runs(matrix, Records(args.records), args.output, args.opts, args.retry_failed)
        if args.quick:
            selected = matrix.quick_runs()
        else:
            selected = matrix.runs(args.group, args.variant, args.seeds)
        if args.list:
            show(runs, selected, args.jobs)
            return
        if not args.report_only:
            run(runs, selected, args)
        for path in write_report(runs, args.records, DOCUMENT if args.records == RECORDS else ""):
            print(f"written: {path}")
        if args.quick:
            compare(runs, selected)
    except (KeyError, ValueError, OSError) as error:
        sys.exit(describe_error(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of it, run anew, beside what is recorded")
    parser.add_argument("--group", nargs="+", default=[], metavar="NAME", help="default: all but those on request")
    parser.add_argument("--variant", nargs="+", default=[], metavar="NAME", help="default: all of the groups")
    parser.add_argument("--seeds", nargs="+", default=[], type=int, metavar="N", help="default: the groups'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="what is done and open; runs nothing")
    parser.add_argument("--report-only", action="store_true", help="runs nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed ones again")
    parser.add_argument("--output", default="", help="folder for checkpoints and logs (default: output/evidence)")
    parser.add_argument(
        "--records", default="", help=f"folder for results (default: {RECORDS}; with --quick below --output)"
    )
    parser.add_argument("--matrix", default=f"{RECORDS}/matrix.yaml", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs for every run, for example SOLVER.MAX_ITER 20 for a try; needs --records",
    )
    args = parser.parse_args(arguments)
    if args.quick and (args.group or args.variant or args.seeds):
        parser.error("--quick has its own variants and seeds; leave out --group, --variant and --seeds")
    if args.opts and not (args.records or args.quick):
        parser.error("--opts changes every run; give a folder of your own with --records FOLDER")
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    args.output = (args.output or ("output/evidence_quick" if args.quick else "output/evidence")).rstrip("/")
    args.records = (args.records or (f"{args.output}/records" if args.quick else RECORDS)).rstrip("/")
    return args


def run(runs: Runs, selected: List[Run], args: argparse.Namespace) -> None:
    """Whatever of the selection is not settled."""
    tasks = runs.tasks(selected)
    expected = sum(task.expected_seconds for task in tasks) / args.jobs
    print(f"{len(selected)} runs selected, {len(tasks)} to run (with teachers), {_minutes(expected)}")
    # One thread each: two single-thread processes use two cores better than two threads of one.
    run_tasks(tasks, args.output, args.jobs, {"OMP_NUM_THREADS": "1"}, keeps_going=True)
    failed = [each.name for each in selected if runs.state(each) == FAILED]
    if failed:
        print(f"failed: {', '.join(failed)}. Their logs are in {args.output}/logs; --retry-failed runs them again")


def show(runs: Runs, selected: List[Run], jobs: int) -> None:
    """The selection, by variant."""
    rows = []
    total = 0.0
    for name in dict.fromkeys(each.variant.name for each in selected):
        mine = [each for each in selected if each.variant.name == name]
        states = {each.seed: runs.state(each) for each in mine}
        counts = [sum(state == wanted for state in states.values()) for wanted in (DONE, FAILED, OPEN)]
        seconds = sum(runs.expected_seconds(each) for each in mine if not runs.is_settled(each))
        total += seconds
        note = mine[0].variant.not_yet or ", ".join(str(seed) for seed, state in states.items() if state == OPEN)
        rows.append([name, mine[0].variant.label, *counts, f"{seconds / 60:.0f}", note])
    headers = ["variant", "label", "done", "failed", "open", "minutes", "open seeds"]
    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))
    print(f"\n{len(selected)} runs; what is open takes {_minutes(total / jobs)} with --jobs {jobs}")


def compare(runs: Runs, selected: List[Run]) -> None:
    """The runs of --quick beside the records that come with the repository."""
    recorded = Runs(runs.matrix, Records(RECORDS), "")
    rows = []
    for each in selected:
        here, there = runs.record(each), recorded.record(each)
        aps = [record["AP"] if record and record["status"] == DONE else None for record in (here, there)]
        rows.append((each.variant.label, each.seed, *aps))
    print("\n" + comparison_table(rows))


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds < 7200 else f"about {seconds / 3600:.1f} hours"


if __name__ == "__main__":
    main()
