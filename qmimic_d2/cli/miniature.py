"""
Makes a small Pascal VOC or WIDER FACE from handwritten digits, in the official format.

Writes DIR/VOC2007 and DIR/VOC2012, or DIR/widerface. With DETECTRON2_DATASETS=DIR, configs of the real data run on
them. Exit status: 0, also where they are there already; 2 for a mistake in the arguments, and where nothing can be
written.
"""

import argparse

from qmimic_d2.cli.model_arguments import usage_errors
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.data.miniature import LEAST_IMAGES
from qmimic_d2.data.miniature_voc import make_miniature_voc
from qmimic_d2.data.miniature_wider_face import make_miniature_wider_face


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, choices=["voc", "widerface"])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the data sets; made if need be")
    parser.add_argument(
        "--images", type=_images, default=40, metavar="N", help="images of each split (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all randomness (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        if args.dataset == "voc":
            folders = make_miniature_voc(args.out, args.images, args.seed)
        else:
            folders = [make_miniature_wider_face(args.out, args.images, args.seed)]
    for folder in folders:
        say(printable(folder))
    say(f"Use them with DETECTRON2_DATASETS={printable(args.out)}")
    return 0


def _images(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < LEAST_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images; give {LEAST_IMAGES} or more")
    return value
