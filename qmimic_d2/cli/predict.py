"""
Draws a detector's boxes on images and videos and writes them as one COCO-format JSON.

The detector is a training's (--config-file and --weights) or an exported file (--model), float or int8.
Writes DIR/<image's name>.jpg for every image, DIR/<video's name>.mp4 for every video, and
DIR/predictions.json. Exit status: 0 when every input was read, 1 when some could not be and were skipped
(each is named on stderr), 2 for a mistake in the arguments or the config, and where nothing can be written.
"""

import argparse
import os
import sys
from typing import Iterator, List

import numpy as np
from PIL import Image

from qmimic_d2.cli.argument_types import score
from qmimic_d2.cli.model_arguments import (
    add_model_arguments,
    key_value_pairs,
    load_model_config,
    usage_errors,
    weights_key,
)
from qmimic_d2.engine.detectors import OpenDetector, open_config, open_detector
from qmimic_d2.engine.prediction import (
    CocoPredictions,
    UnusableImageError,
    as_instances,
    draw_detections,
    find_images,
    read_bgr_image,
    unique_names,
)
from qmimic_d2.engine.video import is_video, read_frames, write_video
from qmimic_d2.json_file import write_json
from qmimic_d2.whole_file import whole_file

PREDICTIONS = "predictions.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="images, videos, and folders that are searched for images with their subfolders",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the results; made if need be")
    parser.add_argument(
        "--score-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="leave out detections below it, in the drawings and in the JSON (default: %(default)s)",
    )
    parser.add_argument(
        "--model", default="", metavar="FILE", help="an exported .onnx, .ts or .yaml file, instead of a config"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads of an ONNX model (default: onnxruntime's choice)"
    )
    add_model_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        inputs = find_images(args.input, excluded_folder=args.output)
        _check_output(args.output, inputs)
        detector = _open(args)
        os.makedirs(args.output, exist_ok=True)
    job = _Job(args, detector)
    names = unique_names(inputs, ".jpg")
    for path, name in zip(inputs, names):
        try:
            if is_video(path):
                job.do_video(path, os.path.splitext(name)[0] + ".mp4")
            else:
                job.do_image(path, name)
        except UnusableImageError as error:
            job.skip(path, error)
    return job.finish(len(inputs))


class _Job:
    """What one run of the command works through."""

    def __init__(self, args: argparse.Namespace, detector: OpenDetector):
        self._args, self._detector = args, detector
        self._num_skipped = 0
        self._predictions = CocoPredictions(
            detector.categories,
            {
                "description": "detections of python -m qmimic_d2 predict",
                "config_file": detector.config_file,
                "weights": detector.weights,
                "score_threshold": args.score_threshold,
            },
        )

    def do_image(self, path: str, name: str) -> None:
        drawn, count = self._do_frame(read_bgr_image(path), path, name)
        drawn_file = os.path.join(self._args.output, name)
        with usage_errors():
            _save(drawn, drawn_file)
        print(f"{path} -> {drawn_file}, detections: {count}")

    def do_video(self, path: str, name: str) -> None:
        frames, rate = read_frames(path)
        before = self._predictions.num_detections

        def drawn() -> Iterator[np.ndarray]:
            for index, frame in enumerate(frames):
                yield self._do_frame(frame, f"{path}#{index}", f"{name}#{index}")[0]

        drawn_file = os.path.join(self._args.output, name)
        with usage_errors():
            count = write_video(drawn_file, drawn(), rate)
        found = self._predictions.num_detections - before
        print(f"{path} -> {drawn_file}, frames: {count}, detections: {found}")

    def _do_frame(self, image: np.ndarray, path: str, name: str):
        found = self._detector.detect(image).above(self._args.score_threshold)
        instances = as_instances(found, image.shape[:2])
        self._predictions.add(path, image.shape[:2], instances, name)
        return draw_detections(image, instances, self._detector.categories), len(found)

    def skip(self, path: str, error: Exception) -> None:
        self._num_skipped += 1
        print(f"skipped {path}: {error}", file=sys.stderr)
        self._predictions.skip(path, str(error))

    def finish(self, num_inputs: int) -> int:
        target = os.path.join(self._args.output, PREDICTIONS)
        with usage_errors():
            write_json(target, self._predictions.to_dict())
        num_read = num_inputs - self._num_skipped
        found = self._predictions.num_detections
        print(f"{target}: images: {num_read}, skipped: {self._num_skipped}, detections: {found}")
        return 1 if self._num_skipped else 0


def _open(args: argparse.Namespace) -> OpenDetector:
    if bool(args.model) == bool(args.config_file):
        raise ValueError("give the detector: either --model FILE, or --config-file FILE with --weights FILE")
    if not args.model:
        return open_config(load_model_config(args), weights_key(args), args.config_file, args.score_threshold)
    if args.weights:
        raise ValueError("--weights goes with --config-file; a --model has its weights")
    return open_detector(
        args.model,
        score_threshold=args.score_threshold,
        opts=key_value_pairs(args),
        device=args.device,
        threads=args.threads,
    )


def _check_output(output: str, images: List[str]) -> None:
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output is {output!r}, which is a file; give a folder")
    beside = [path for path in images if os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(output)]
    if beside:
        raise ValueError(
            f"--output is {output!r}, where {beside[0]!r} of --input stands and might be overwritten; give "
            "another folder"
        )


def _save(image: np.ndarray, path: str) -> None:
    with whole_file(path) as partial:
        Image.fromarray(image).save(partial, format="JPEG", quality=95)
