"""
Writes one HTML page about runs of train_net.py, which needs no other file and no network.

RUN is an output folder of train_net.py, finished or still running, or NAME=FOLDER. What a folder lacks, and what is
broken in it, is left out and named on the page. The folder may be somebody else's: its files are read as data, without
running code, and nothing that they name is opened or fetched without --sources. Exit status: 0 when the page was
written, 2 for a mistake in the arguments, or a folder that is no run.
"""

import argparse
import os

from qmimic_d2 import __version__
from qmimic_d2.cli.argument_types import count, positive, score
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.files import check_writable
from qmimic_d2.report import collect_runs
from qmimic_d2.report.measure import register_run_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folder of train_net.py, or NAME=FOLDER")
    add("-o", "--output", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    add("--title", default="Quantization Mimic", help="its heading (default: %(default)s)")
    images = "sample images with ground truth and detections; 0 = none (default: %(default)s)"
    add("--images", type=count, default=6, metavar="N", help=images)
    least = "draw no detections below it (default: %(default)s)"
    add("--score-threshold", type=score, default=0.5, metavar="SCORE", help=least)
    threads = "CPU threads for the time of an image (default: %(default)s)"
    add("--threads", type=positive, default=1, metavar="N", help=threads)
    sources = "open the data that a config names in DATASETS.SOURCES, for pictures and times; for runs of your own"
    add("--sources", action="store_true", help=sources)
    add("--no-latency", action="store_true", help="do not measure the time of an image")


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        from qmimic_d2.report.page import write_report  # needs the extra "report"

        check_writable(args.output, "--output")
        runs = collect_runs(args.runs)
        if args.sources:
            register_run_sources(runs)
        write_report(
            runs,
            args.output,
            title=args.title,
            made_by=f"qmimic_d2 {__version__}",
            num_images=args.images,
            threads=0 if args.no_latency else args.threads,
            score_threshold=args.score_threshold,
        )
    for each in runs:
        for note in each.notes:
            say(f"{printable(each.name)}: {printable(note)}")
    say(f"{printable(args.output)}: runs: {len(runs)}, {os.path.getsize(args.output) / 1e6:.1f} MB")
    return 0
