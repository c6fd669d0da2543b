#!/usr/bin/env python
"""
Makes a small Pascal VOC or WIDER FACE from handwritten digits, in the official format.

    python benchmarks/miniature.py --dataset voc --out datasets_small
    python benchmarks/miniature.py --dataset widerface --out datasets_small --images 100 --seed 3

Writes DIR/VOC2007 and DIR/VOC2012, or DIR/widerface. With DETECTRON2_DATASETS=DIR, configs of the real data run on
them. Exit status: 0, also if the data sets exist already; 2 for a mistake in the arguments, or if nothing can be
written. docs/miniature.md describes the data sets.
"""

import argparse
import os
import sys
from typing import Optional, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

from miniature_lib.painting import LEAST_IMAGES  # noqa: E402
from miniature_lib.pascal_voc import make_miniature_voc  # noqa: E402
from miniature_lib.wider_face import make_miniature_wider_face  # noqa: E402
from qmimic_d2.cli.printable import printable, say  # noqa: E402
from qmimic_d2.cli.usage import usage_errors  # noqa: E402


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse(arguments)
    with usage_errors():
        if args.dataset == "voc":
            folders = make_miniature_voc(args.out, args.images, args.seed)
        else:
            folders = [make_miniature_wider_face(args.out, args.images, args.seed)]
    for folder in folders:
        say(printable(folder))
    say(f"Use them with DETECTRON2_DATASETS={printable(args.out)}")


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=["voc", "widerface"])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the data sets; made if it is missing")
    parser.add_argument(
        "--images", type=images, default=40, metavar="N", help="images of each split (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all randomness (default: %(default)s)")
    return parser.parse_args(arguments)


def images(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < LEAST_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images; give {LEAST_IMAGES} or more")
    return value


if __name__ == "__main__":
    main()
