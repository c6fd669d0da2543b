#!/usr/bin/env python
"""
How long WIDER FACE's official protocol takes on a set of the validation set's size, and that it gives the same
figures there as the slow reference of the tests.

    python benchmarks/wider_face_evaluation.py [--images 3226] [--faces 39708] [--detections 200] [--json FILE]

Ground truth and detections are random. --reference compares with tests/wider_face_reference.py, which takes
minutes. benchmarks/README.md holds the last results.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from wider_face_reference import (  # noqa: E402
    random_ground_truth,
    random_predictions,
    reference_evaluation,
    save_ground_truth,
)

from qmimic_d2.evaluation import (  # noqa: E402
    evaluate_predictions,
    load_ground_truth,
    read_predictions,
    write_predictions,
)
from qmimic_d2.files import check_writable, write_json  # noqa: E402

NUM_EVENTS = 61


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measures and prints; writes the same to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3226)
    parser.add_argument("--faces", type=int, default=39708)
    parser.add_argument("--detections", type=int, default=200, help="per image")
    parser.add_argument("--reference", action="store_true", help="compare with the slow reference")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json, "--json")
    report = measure(args)
    print(tabulate(report["seconds"].items(), headers=["step", "CPU seconds"], floatfmt=".2f"))
    print(f"\nAP {report['AP']}")
    if args.reference:
        print(f"largest difference from the reference: {report['difference']:.1e}")
    if args.json:
        write_json(args.json, report)


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    """Times of every step in CPU seconds, the figures, and how far the reference's are from them."""
    seconds: Dict[str, float] = {}

    def timed(step, function, *arguments):
        start = time.process_time()
        result = function(*arguments)
        seconds[step] = time.process_time() - start
        return result

    ground_truth = random_ground_truth(args.images, args.faces, NUM_EVENTS)
    predictions = random_predictions(ground_truth, args.detections)
    with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
        mats = save_ground_truth(Path(folder) / "ground_truth", ground_truth)
        texts = os.path.join(folder, "predictions")
        timed("write the text files", write_predictions, texts, predictions)
        ground_truth = timed("read the .mat files", load_ground_truth, mats)
        read = timed("read the text files", read_predictions, texts, ground_truth)
    figures = timed("evaluate", evaluate_predictions, ground_truth, read)
    report = {**vars(args), "seconds": seconds, "AP": figures}
    if args.reference:
        expected = timed("the slow reference", reference_evaluation, ground_truth, read)
        report["difference"] = max(abs(figures[subset] - expected[subset]) for subset in expected)
    return report


if __name__ == "__main__":
    main()
