#!/usr/bin/env python
"""
A seeded storm: kills trainings and resumes them, and gives damaged and hostile files to every command.

    OMP_NUM_THREADS=1 python benchmarks/storm.py [--seed 1] [--kills 24] [--mutations 500] [--only kills mutations]
    OMP_NUM_THREADS=1 python benchmarks/storm.py --seed 1 --case ID

A training that was killed is resumed to its end; losses, metrics and weights must be those of an uninterrupted one. A
mutated file must be refused with a message that names it, or handled: no traceback, no hang, no crash, no code run.
Exit status: 0 when all went well, 1 when something failed (with the command that repeats it), 130 after Ctrl-C.
It needs Linux, and the extras "export" and "report".
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Optional, Sequence

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(sys.path[0]))

from qmimic_d2.files import write_json  # noqa: E402
from storm_lib.baseline import write_baseline, write_run  # noqa: E402
from storm_lib.cases import find_cases, plan_cases  # noqa: E402
from storm_lib.kills import plan_jobs, run_kills  # noqa: E402
from storm_lib.mutations import run_mutations  # noqa: E402
from storm_lib.results import Result, figures_text, kinds_table, to_json, write_block  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
PARTS = ("kills", "mutations")
_KILLS, _MUTATIONS = 24, 500


def main(arguments: Optional[Sequence[str]] = None) -> int:
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(args.output or tempfile.mkdtemp(prefix="storm_")).resolve()
    if args.output and folder.exists() and any(folder.iterdir()):
        sys.exit(f"--output is {args.output!r}, which is not empty; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: List[Result] = []
    stopped = False
    try:
        _run(args, folder, results)
    except KeyboardInterrupt:
        stopped = True
    seconds = time.monotonic() - began
    print("\n" + kinds_table(results))
    if args.json:
        write_json(args.json, to_json(results, args.seed, seconds, _versions()))
    failed = [each for each in results if each.outcome == "FAILED"]
    if args.write_docs and not stopped:
        write_block(DOCS, figures_text(results, _command(args), seconds, _versions()))
    for each in failed:
        print(f"\n{each.id}: {each.reason}\n  {_command(args)} --case {each.id}")
    kills = sum(each.kills for each in results)
    print(f"\n{kills} kills, {len(results)} cases, {len(failed)} failed, {seconds:.0f} s")
    if failed:
        print(f"what the failed cases left stands in {folder}")
    elif not args.output:
        shutil.rmtree(folder, ignore_errors=True)
    if stopped:
        print("stopped before its end", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=_KILLS, metavar="N", help="default: %(default)s")
    parser.add_argument("--mutations", type=int, default=_MUTATIONS, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="leave out the other part")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="TEXT", help="mutations whose kind begins so, alone")
    parser.add_argument("--case", default="", metavar="ID", help="repeat this case alone, and keep its files")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="cases at a time (default: %(default)s)")
    parser.add_argument("--output", default="", metavar="DIR", help="a new folder to work in (default: temporary)")
    parser.add_argument("--json", default="", metavar="FILE", help="write every result to this file as well")
    parser.add_argument("--write-docs", action="store_true", help=f"put the figures into {DOCS.name}")
    return parser


def _run(args: argparse.Namespace, folder: Path, results: List[Result]) -> None:
    jobs = plan_jobs(args.seed, args.kills) if "kills" in args.only else []
    cases = plan_cases(args.mutations, args.seed) if "mutations" in args.only else []
    cases = [each for each in cases if not args.kinds or each.kind.startswith(tuple(args.kinds))]
    if args.case:
        jobs = [each for each in plan_jobs(args.seed, args.kills) if each.id == args.case]
        cases = find_cases(args.case)
        if not jobs and not cases:
            sys.exit(f"--case is {args.case!r}; the storm of --seed {args.seed} has no such case")
    baseline = write_baseline(folder / "baseline")
    if cases:
        _say("a training and an export, which the mutated files begin with")
        write_run(baseline)
        run_mutations(baseline, folder / "mutations", args.seed, cases, args.at_once, _say, results)
    if jobs:
        run_kills(baseline, folder / "kills", args.seed, jobs, args.at_once, _say, results)


def _command(args: argparse.Namespace) -> str:
    kills = f" --kills {args.kills}" if args.kills != _KILLS else ""
    return f"OMP_NUM_THREADS=1 python benchmarks/storm.py --seed {args.seed}{kills}"


def _versions():
    import detectron2
    import onnxruntime
    import torch

    return {
        "Python": sys.version.split()[0],
        "PyTorch": torch.__version__,
        "Detectron2": detectron2.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
