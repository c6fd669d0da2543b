"""
Scores detections on WIDER FACE's validation set by the official protocol, without a model.

DIR of --predictions holds the official text format: <event>/<image>.txt with the image's name, the number of
detections, and a line "x y w h score" for each. Prints AP of the subsets easy, medium and hard; --json writes them
as numbers from 0 to 1. Exit status: 0, or 2 for a mistake in the arguments or the files.
"""

import argparse

from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.evaluation import evaluate_predictions, load_ground_truth, read_predictions
from qmimic_d2.files import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predictions", required=True, metavar="DIR", help="folder of the events' folders")
    parser.add_argument(
        "--ground-truth",
        required=True,
        metavar="DIR",
        help="folder of wider_face_val.mat and wider_{easy,medium,hard}_val.mat: ground_truth/ of eval_tools.zip",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures to this file as well")


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        if args.json:
            check_writable(args.json, "--json")
        ground_truth = load_ground_truth(args.ground_truth)
        predictions = read_predictions(args.predictions, ground_truth)
        results = evaluate_predictions(ground_truth, predictions)
        num_detections = sum(map(len, predictions.values()))
        say(f"{len(predictions)} of {len(ground_truth.boxes)} images predicted, {num_detections} detections")
        for subset, value in results.items():
            say(f"{subset:<8}{value:.4f}")
        if args.json:
            write_json(args.json, results)
            say(f"Written to {printable(args.json)}")
    return 0
