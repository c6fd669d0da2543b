"""
Draws a detector's boxes on images and writes them as one COCO-format JSON.

Writes DIR/<image's name>.jpg for every image, and DIR/predictions.json. Exit status: 0 when every image
was read, 1 when some could not be and were skipped (each is named on stderr), 2 for a mistake in the
arguments or the config, and where nothing can be written.
"""

import argparse
import os
import sys
from typing import List

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from qmimic_d2.cli.model_arguments import add_model_arguments, load_model_config, usage_errors, weights_key
from qmimic_d2.engine.prediction import (
    CocoPredictions,
    Predictor,
    UnusableImageError,
    dataset_categories,
    draw_detections,
    find_images,
    read_bgr_image,
    unique_names,
)
from qmimic_d2.json_file import write_json
from qmimic_d2.modeling.head_features import head_node

PREDICTIONS = "predictions.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="images, and folders that are searched for images with their subfolders",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the results; made if need be")
    parser.add_argument(
        "--score-threshold",
        type=_score,
        default=0.5,
        metavar="SCORE",
        help="leave out detections below it, in the drawings and in the JSON (default: %(default)s)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        images = find_images(args.input, excluded_folder=args.output)
        _check_output(args.output, images)
        cfg = load_model_config(args)
        cfg = _with_score_threshold(cfg, args.score_threshold)
        categories = dataset_categories(cfg)
        predictor = Predictor(cfg, weights_key(args))
        os.makedirs(args.output, exist_ok=True)
    predictions = CocoPredictions(
        categories,
        {
            "description": "detections of python -m qmimic_d2 predict",
            "config_file": args.config_file,
            "weights": cfg.MODEL.WEIGHTS,
            "score_threshold": args.score_threshold,
        },
    )
    num_skipped = 0
    for path, name in zip(images, unique_names(images, ".jpg")):
        try:
            image = read_bgr_image(path)
            detections = predictor(image)
        except UnusableImageError as error:
            num_skipped += 1
            print(f"skipped {path}: {error}", file=sys.stderr)
            predictions.skip(path, str(error))
            continue
        detections = detections[detections.scores >= args.score_threshold]
        drawn_file = os.path.join(args.output, name)
        with usage_errors():
            _save(draw_detections(image, detections, categories), drawn_file)
        predictions.add(path, image.shape[:2], detections, name)
        print(f"{path} -> {drawn_file}, detections: {len(detections)}")
    target = os.path.join(args.output, PREDICTIONS)
    with usage_errors():
        write_json(target, predictions.to_dict())
    num_read = len(images) - num_skipped
    print(f"{target}: images: {num_read}, skipped: {num_skipped}, detections: {predictions.num_detections}")
    return 1 if num_skipped else 0


def _check_output(output: str, images: List[str]) -> None:
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output is {output!r}, which is a file; give a folder")
    beside = [path for path in images if os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(output)]
    if beside:
        raise ValueError(
            f"--output is {output!r}, where {beside[0]!r} of --input stands and might be overwritten; give "
            "another folder"
        )


def _with_score_threshold(cfg: CfgNode, threshold: float) -> CfgNode:
    """The model itself drops what scores lower, so that a threshold below the config's takes effect."""
    cfg = cfg.clone()
    cfg.defrost()
    head_node(cfg).SCORE_THRESH_TEST = threshold
    cfg.freeze()
    return cfg


def _save(image: np.ndarray, path: str) -> None:
    partial = path + ".part"
    Image.fromarray(image).save(partial, format="JPEG", quality=95)
    os.replace(partial, path)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no score; give a number from 0 to 1")
    return value
