"""
Draws a detector's boxes on images and videos and writes them as one COCO-format JSON.

The detector is a training's (--config-file and --weights) or an exported file (--model), float or int8. A .ts
file is a program that runs when it is opened; a .py that --import names, too. Open only those that you trust.

Writes DIR/<image's name>.jpg for every image, DIR/<video's name>.mp4 for every video, and DIR/predictions.json,
which holds what was found even where a drawing fails or the command is stopped. Exit status: 0 when every input
was read and drawn, 1 when something is missing (each is named on stderr and in the JSON), 2 for a mistake in the
arguments or the config, and where nothing can be written.
"""

import argparse
import os
import sys
import tempfile
from typing import Iterator, List

import numpy as np
from PIL import Image

from qmimic_d2.cli.argument_types import score, threads_or_default
from qmimic_d2.cli.interruption import Interruption, noted_interruption
from qmimic_d2.cli.model_arguments import add_model_arguments, key_value_pairs, load_model_config, weights_key
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.error_text import describe_error
from qmimic_d2.export import Detections
from qmimic_d2.files import check_output_folder, whole_file
from qmimic_d2.image_file import UnusableImageError, read_bgr_image
from qmimic_d2.inference.coco_predictions import CocoPredictions
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.drawing import draw_detections, label_names, missing_characters_note
from qmimic_d2.inference.input_files import check_regular_file, find_images, is_video, unique_names
from qmimic_d2.inference.open_detector import OpenDetector
from qmimic_d2.inference.zoo import ZOO, zoo_models
from qmimic_d2.progress import track

PREDICTIONS = "predictions.json"

# Of a JPEG's side, in pixels.
_LONGEST_SIDE = 65500
_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        default=[],
        nargs="+",
        metavar="PATH",
        help="images, videos, and folders that are searched for images with their subfolders",
    )
    parser.add_argument(
        "--output", default="output/predict", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--score-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="leave out detections below it, in the drawings and in the JSON (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="FILE",
        help="an exported .onnx, .ts or .yaml file, or zoo:NAME, instead of a config; zoo: lists the zoo",
    )
    parser.add_argument(
        "--threads",
        type=threads_or_default,
        default=0,
        metavar="N",
        help="threads of an ONNX model (default: onnxruntime's choice)",
    )
    add_model_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    if args.model == ZOO:
        for name, title in zoo_models().items():
            say(f"{ZOO}{name}  {title}")
        say("Behind a name, -int8 gives the model in 8 bits.")
        return 0
    with usage_errors():
        if not args.input:
            raise ValueError("--input is missing; give images, videos or folders")
        inputs = find_images(args.input, excluded_folder=args.output)
        _check_output(args.output, inputs)
        detector = _open(args)
        check_output_folder(args.output)
    for note in (detector.note, missing_characters_note(detector.categories)):
        if note:
            say(f"Note: {note}", sys.stderr)
    with noted_interruption() as interruption:
        job = _Job(args, detector, interruption)
        try:
            named = list(zip(inputs, unique_names(inputs, ".jpg")))
            for path, name in track(named, "detecting"):
                if interruption.reason:
                    break
                job.do(path, name)
        except BaseException as error:  # whatever ends the job, what was found is written
            interruption.reason = interruption.reason or f"stopped by {describe_error(error)}"
        return job.finish(inputs)


class _Job:
    """What one run of the command works through; an input that fails does not end it."""

    def __init__(self, args: argparse.Namespace, detector: OpenDetector, interruption: Interruption):
        self._args, self._detector, self._interruption = args, detector, interruption
        self._names = label_names(detector.categories)
        self._num_done = self._num_skipped = self._num_incomplete = 0
        self._predictions = CocoPredictions(
            detector.categories,
            {
                "description": "detections of python -m qmimic_d2 predict",
                "config_file": detector.config_file,
                "weights": detector.weights,
                "score_threshold": args.score_threshold,
                "class_names_known": all(each.is_named for each in detector.categories),
            },
        )

    def do(self, path: str, name: str) -> None:
        """
        Args:
            path: of an image or a video.
            name: of the drawn image.
        """
        try:
            check_regular_file(path)
            if is_video(path):
                self._do_video(path, os.path.splitext(name)[0] + ".mp4")
            else:
                self._do_image(path, name)
        except Exception as error:  # a decoder or a detector raises whatever a file leads it to
            self._skip(path, _reason(error))
        self._num_done += 1

    def _do_image(self, path: str, name: str) -> None:
        image = read_bgr_image(path)
        found = self._detect(image)
        record = self._predictions.add(path, image.shape[:2], found)
        drawn_file = os.path.join(self._args.output, name)
        try:
            _save(self._draw(image, found), drawn_file)
        except Exception as error:  # no room on the disk, a size that no JPEG has, ...
            self._note_incomplete(path, f"not drawn: {_reason(error)}")
            return
        record.drawn_file = name
        say(f"{printable(path)} -> {printable(drawn_file)}, detections: {len(found)}")

    def _do_video(self, path: str, name: str) -> None:
        from qmimic_d2.inference.video import VideoFrames  # which needs OpenCV

        frames, records, num_found = VideoFrames(path), [], 0
        failure = bare = ""

        def drawn() -> Iterator[np.ndarray]:
            nonlocal num_found, bare
            for index, frame in enumerate(frames):
                try:
                    found = self._detect(frame)
                except Exception as error:
                    self._skip(f"{path}#{index}", _reason(error))
                    found = _NOTHING
                else:
                    records.append((index, self._predictions.add(f"{path}#{index}", frame.shape[:2], found)))
                    num_found += len(found)
                try:
                    picture = frame[:, :, ::-1] if failure else self._draw(frame, found)
                except Exception as error:
                    picture, bare = frame[:, :, ::-1], bare or f"frame {index} and maybe more: {_reason(error)}"
                yield picture
                if self._interruption.reason:
                    return

        drawn_file, pictures = os.path.join(self._args.output, name), drawn()
        try:
            _save_video(pictures, drawn_file, frames.rate)
        except Exception as error:
            failure = _reason(error)
            for _ in pictures:  # the others are detected on
                pass
        for index, record in records:
            record.drawn_file = "" if failure else f"{name}#{index}"
        if failure or bare:
            self._note_incomplete(path, f"not drawn: {failure or bare}")
        if self._interruption.reason:
            announced = f" of {frames.num_announced}" if frames.num_announced else ""
            self._note_incomplete(path, f"{frames.num_read}{announced} frames: {self._interruption.reason}")
        elif frames.missing:
            self._note_incomplete(path, frames.missing)
        where = "not drawn" if failure else printable(drawn_file)
        say(f"{printable(path)} -> {where}, frames: {frames.num_read}, detections: {num_found}")

    def _detect(self, image: np.ndarray) -> Detections:
        return self._detector.detect(image).above(self._args.score_threshold)

    def _draw(self, image: np.ndarray, found: Detections) -> np.ndarray:
        return draw_detections(image, found.boxes, found.scores.tolist(), found.classes.tolist(), self._names)

    def _skip(self, path: str, reason: str) -> None:
        self._num_skipped += 1
        say(f"skipped {printable(path)}: {reason}", sys.stderr)
        self._predictions.skip(path, reason)

    def _note_incomplete(self, path: str, reason: str) -> None:
        self._num_incomplete += 1
        say(f"incomplete {printable(path)}: {reason}", sys.stderr)
        self._predictions.note_incomplete(path, reason)

    def finish(self, inputs: List[str]) -> int:
        """Writes the JSON; returns the exit status."""
        stopped = self._interruption.reason
        if stopped:
            say(f"{stopped}: {self._num_done} of {len(inputs)} inputs are done", sys.stderr)
            for path in inputs[self._num_done :]:
                self._predictions.skip(path, f"not done: {stopped}")
        target = self._write()
        num_images, num_found = self._predictions.num_images, self._predictions.num_detections
        counts = f"images: {num_images}, skipped: {self._num_skipped}, incomplete: {self._num_incomplete}"
        say(f"{printable(target)}: {counts}, detections: {num_found}")
        if num_images and not num_found:
            least = f"{self._args.score_threshold:g}"
            say(f"Note: no detection scores {least} or more; --score-threshold shows weaker ones", sys.stderr)
        return 1 if self._num_skipped or self._num_incomplete or stopped else 0

    def _write(self) -> str:
        target = os.path.join(self._args.output, PREDICTIONS)
        try:
            self._predictions.write(target)
            return target
        except OSError as error:  # a full disk must not cost the whole job
            elsewhere = os.path.join(tempfile.mkdtemp(prefix="qmimic_d2_predict_"), PREDICTIONS)
            with usage_errors():
                self._predictions.write(elsewhere)
            say(f"{printable(target)} cannot be written ({_reason(error)}), so {elsewhere} holds it", sys.stderr)
            self._num_incomplete += 1
            return elsewhere


def _reason(error: Exception) -> str:
    """One line; what the reader of images says needs no type."""
    text = str(error) if isinstance(error, UnusableImageError) else describe_error(error)
    return printable(" ".join(text.split()))


def _open(args: argparse.Namespace) -> OpenDetector:
    if bool(args.model) == bool(args.config_file):
        raise ValueError("give the detector: either --model FILE, or --config-file FILE with --weights FILE")
    if not args.model:
        from qmimic_d2.inference.config_detector import open_config  # which needs torch

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
    if os.path.isdir(os.path.join(output, PREDICTIONS)):
        raise ValueError(f"{os.path.join(output, PREDICTIONS)!r} is a folder, so the results cannot be written there")
    beside = [path for path in images if os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(output)]
    if beside:
        raise ValueError(
            f"--output is {output!r}, where {beside[0]!r} of --input stands and might be overwritten; give "
            "another folder"
        )


def _save(image: np.ndarray, path: str) -> None:
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST_SIDE:
        raise ValueError(f"a JPEG has sides of at most {_LONGEST_SIDE} pixels, and this image has {width} x {height}")
    with whole_file(path) as partial:
        Image.fromarray(image).save(partial, format="JPEG", quality=95)


def _save_video(frames: Iterator[np.ndarray], path: str, rate: float) -> None:
    from qmimic_d2.inference.video import VideoWriter

    with whole_file(path) as partial:
        writer = VideoWriter(partial, rate)
        try:
            for frame in frames:
                writer.write(frame)
            writer.close()
        finally:
            writer.release()
