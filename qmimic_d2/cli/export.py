"""
Writes the student alone as a file that ships: Detectron2, TorchScript, ONNX or int8 ONNX, or the network alone.

With --verify, each file itself is evaluated on a data set and compared, image by image, with the training's
model as its evaluation runs it. Exit status: 0 when all were written (and, with --verify, AP is within the
tolerance), 1 when it is not or when the training's model itself finds nothing, 2 for a mistake in the arguments,
the config or the checkpoint, and where nothing can be written.

A TorchScript file is a program, which runs when it is opened: pass on the ONNX form where files are not trusted.
"""

import argparse
import os
import sys
from typing import Dict, List, Optional

from detectron2.config import CfgNode

from qmimic_d2.cli.argument_types import count, image_size, non_negative, positive, side, threads
from qmimic_d2.cli.export_text import export_text, verdict_text, verification_text
from qmimic_d2.cli.model_arguments import add_model_arguments, key_value_pairs, load_model_config, weights_key
from qmimic_d2.cli.printable import say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.config_files import changed
from qmimic_d2.engine.exporting import FORMATS, Exported, Exporter, Int8Settings, check_packages
from qmimic_d2.engine.setup import load_config
from qmimic_d2.engine.verification import VERIFICATION_NAME, Verification, VerifiedModel
from qmimic_d2.error_text import describe_error
from qmimic_d2.files import check_output_folder, write_json
from qmimic_d2.inference.detectors import open_detector

# Points of AP that a form may differ from the eager student by.
_TOLERANCES = {"onnx-int8": 1.0, "onnx-raw-int8": 1.0}
_FLOAT_TOLERANCE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", required=True, nargs="+", metavar="FORM", help=f"{', '.join(FORMATS)}; several in one go"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the files; made if need be")
    parser.add_argument(
        "--quantizer",
        choices=("keep", "drop"),
        default="keep",
        help="what becomes of the student's own quantizer; --verify shows the AP of both (default: %(default)s)",
    )
    sizes = parser.add_argument_group("size of the input (default: any, resized as INPUT.MIN_SIZE_TEST says)")
    sizes.add_argument("--min-size", type=side, metavar="N", help="in place of INPUT.MIN_SIZE_TEST")
    sizes.add_argument("--max-size", type=side, metavar="N", help="in place of INPUT.MAX_SIZE_TEST")
    sizes.add_argument("--fixed-size", type=image_size, metavar="HxW", help="one size, into which images are fitted")
    verify = parser.add_argument_group("verification")
    verify.add_argument("--verify", default="", metavar="DATASET", help="a registered data set to evaluate the file on")
    verify.add_argument("--verify-images", type=count, default=0, metavar="N", help="only so many of it (default: all)")
    verify.add_argument(
        "--tolerance",
        type=non_negative,
        default=None,
        metavar="AP",
        help="points that AP may differ by (default: 0.1; 1.0 for int8, and there only a loss counts)",
    )
    verify.add_argument(
        "--threads", type=threads, default=1, metavar="N", help="for the times (default: %(default)s)"
    )
    verify.add_argument(
        "--runs", type=positive, default=50, metavar="N", help="times taken of every model (default: %(default)s)"
    )
    int8, defaults = parser.add_argument_group("int8"), Int8Settings()
    int8.add_argument("--calibration-images", type=positive, default=defaults.calibration_images, metavar="N")
    int8.add_argument(
        "--search-images",
        type=count,
        default=defaults.search_images,
        metavar="N",
        help="training images on which AP is measured; 0 = no search for layers to keep in float",
    )
    int8.add_argument(
        "--max-ap-loss",
        type=non_negative,
        default=defaults.max_ap_loss,
        metavar="AP",
        help="loss on these from which layers are kept in float (default: %(default)s)",
    )
    int8.add_argument("--search-seconds", type=non_negative, default=defaults.search_seconds, metavar="S")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        for form in args.format:
            check_packages(form)
        check_output_folder(args.output)
        cfg = _config(args)
        verification = _verification(args, cfg) if args.verify else None
        exporter = _exporter(args, cfg, keep_quantizer=args.quantizer == "keep")
        if exporter.note:
            say(f"Note: {exporter.note}", sys.stderr)
        int8 = Int8Settings(
            args.calibration_images, args.search_images, args.max_ap_loss, args.search_seconds, args.threads
        )
        exported, descriptions = {}, {form: exporter.describe(form) for form in args.format}
        for form, description in descriptions.items():
            exported[form] = exporter.write(form, args.output, int8, report=say)
            say(export_text(exported[form], description))
        if verification is None:
            return 0
        rows = _verified(args, cfg, exporter, exported, verification)
        write_json(os.path.join(args.output, VERIFICATION_NAME), [each.to_dict() for each in rows])
    say(verification_text(rows, verification))
    verdicts = [_verdict(args, form, rows[0], row) for form, row in zip(exported, rows[1:])]
    return 0 if all(verdicts) else 1


def _verdict(args: argparse.Namespace, form: str, reference: VerifiedModel, row: VerifiedModel) -> bool:
    """Says whether a form is within its tolerance."""
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = _TOLERANCES.get(form, _FLOAT_TOLERANCE)
    text, is_within = verdict_text(reference, row, tolerance, is_gain_allowed=form in _TOLERANCES)
    say(f"{form}: {text}")
    return is_within


def _config(args: argparse.Namespace) -> CfgNode:
    if args.fixed_size and (args.min_size or args.max_size):
        raise ValueError("--fixed-size goes without --min-size and --max-size: it is the size")
    cfg = load_model_config(args)
    return changed(
        cfg,
        *("INPUT.MIN_SIZE_TEST", args.min_size or cfg.INPUT.MIN_SIZE_TEST),
        *("INPUT.MAX_SIZE_TEST", args.max_size or cfg.INPUT.MAX_SIZE_TEST),
    )


def _verification(args: argparse.Namespace, cfg: CfgNode) -> Verification:
    return Verification(cfg, args.verify, max_images=args.verify_images, threads=args.threads, runs=args.runs)


def _exporter(args: argparse.Namespace, cfg: CfgNode, keep_quantizer: bool) -> Exporter:
    return Exporter(
        cfg,
        keep_quantizer=keep_quantizer,
        fixed_size=args.fixed_size or (0, 0),
        config_file=args.config_file,
        weights_key=weights_key(args),
    )


def _verified(
    args: argparse.Namespace,
    cfg: CfgNode,
    exporter: Exporter,
    exported: Dict[str, Exported],
    verification: Verification,
) -> List[VerifiedModel]:
    """The reference first, then the files, then what they may be compared with."""
    keeps = args.quantizer == "keep"
    treated = ("quantizer kept" if keeps else "quantizer dropped") if exporter.was_quantized else "no quantizer"
    # A fixed size has no counterpart in Detectron2's loader, so the model sees what the file sees.
    is_as_trained = not args.fixed_size
    rows = [_eager(verification, f"eager student, {treated}", exporter, is_as_trained=is_as_trained)]
    for form, each in exported.items():
        opened = open_detector(each.path, threads=args.threads, device="cpu")
        rows.append(verification(f"{form}, {treated}", opened.detect, each.file_bytes))
    if exporter.was_quantized:
        other = _exporter(args, cfg, keep_quantizer=not keeps)
        treated = "quantizer dropped" if keeps else "quantizer kept"
        rows.append(_eager(verification, f"eager student, {treated}", other, is_as_trained=is_as_trained))
    if args.min_size or args.max_size or args.fixed_size:
        own = Exporter(load_model_config(args), keep_quantizer=keeps, weights_key=weights_key(args))
        rows.append(_eager(verification, "eager student, sizes of its config", own))
    teacher = _teacher(args)
    if teacher is not None:
        rows.append(_eager(verification, "teacher", teacher, is_compared=False))
    return verification.timed(rows)


def _eager(
    verification: Verification,
    name: str,
    exporter: Exporter,
    is_compared: bool = True,
    is_as_trained: bool = False,
) -> VerifiedModel:
    """
    Args:
        is_as_trained: with the images of the evaluation's own loader, resized as the config of the verification says;
            else with those that the exported files read, in the exporter's size.
    """
    size = sum(each.numel() * each.element_size() for each in exporter.model.state_dict().values())
    model = exporter.model if is_as_trained else None
    return verification(name, exporter.predictor.detect, size, is_compared, model)


def _teacher(args: argparse.Namespace) -> Optional[Exporter]:
    """The whole detector whose backbone taught the student; None where it is not at hand."""
    try:
        opts = key_value_pairs(args)
        node = load_config(args.config_file, opts, device="cpu").MODEL.QMIMIC.TEACHER
        if not node.CONFIG_FILE:
            return None
        weights = ["MODEL.WEIGHTS", node.WEIGHTS] if node.WEIGHTS else []
        cfg = load_config(node.CONFIG_FILE, [*node.OPTS, *weights], eval_only=True, device="cpu")
        return Exporter(cfg)
    except (KeyError, ValueError, OSError) as error:
        say(f"The teacher is not compared: {describe_error(error)}", sys.stderr)
        return None
