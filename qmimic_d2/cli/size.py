"""
Parameters, FLOPs, peak activation memory and file size of detectors side by side, by their parts.

What is counted, and how, is told in docs/export.md. Exported files (--exported) are listed with their size.
"""

import argparse
import os
from typing import Any, Dict, List, Tuple

from tabulate import tabulate

from qmimic_d2.analysis import measure_activation_memory, measure_cost
from qmimic_d2.analysis.activation_memory import TOTAL
from qmimic_d2.analysis.model_cost import build_for_measurement
from qmimic_d2.cli.argument_types import image_size
from qmimic_d2.cli.export_text import human_bytes
from qmimic_d2.cli.model_arguments import key_value_pairs
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.engine.setup import load_config
from qmimic_d2.export import build_student
from qmimic_d2.files import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", required=True, nargs="+", metavar="FILE", help="one or several, such as student and teacher"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FILE",
        help="their checkpoints, in the same order: seen to fit, and the size of the file is told",
    )
    parser.add_argument(
        "--input",
        type=image_size,
        metavar="HxW",
        help="image as it enters the network (default: a square of INPUT.MIN_SIZE_TEST)",
    )
    parser.add_argument("--exported", nargs="+", default=[], metavar="FILE", help="files to list with their size")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="at the end: pairs that override every config"
    )


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        if args.weights and len(args.weights) != len(args.config_file):
            raise ValueError(
                f"--weights names {len(args.weights)} files for {len(args.config_file)} configs; give one for each"
            )
        if args.json:
            check_writable(args.json, "--json")
        weights = args.weights or [""] * len(args.config_file)
        models = [_measured(args, *pair) for pair in zip(args.config_file, weights)]
        files = [{"file": path, "bytes": os.path.getsize(path)} for path in args.exported]
        if args.json:
            write_json(args.json, {"models": models, "exported": files})
    for each in models:
        say(_text(each))
    if files:
        rows = [{"exported file": printable(each["file"]), "size": human_bytes(each["bytes"])} for each in files]
        say(tabulate(rows, headers="keys", disable_numparse=True, stralign="right"))
    return 0


def _measured(args: argparse.Namespace, config_file: str, weights: str) -> Dict[str, Any]:
    opts = [*key_value_pairs(args), *(["MODEL.WEIGHTS", weights] if weights else [])]
    cfg = load_config(config_file, opts, eval_only=True, device="cpu")
    side = int(cfg.INPUT.MIN_SIZE_TEST)
    if not args.input and not side:
        raise ValueError(f"INPUT.MIN_SIZE_TEST of {config_file!r} is 0; give the image's size with --input")
    size: Tuple[int, int] = args.input or (side, side)
    model = build_student(cfg, weights_key="--weights", device="cpu") if weights else build_for_measurement(cfg)
    cost = measure_cost(model, *size)
    return {
        "config_file": config_file,
        **cost.to_dict(),
        "peak_activation_bytes": measure_activation_memory(model, *size),
        "weight_bytes": sum(each.numel() * each.element_size() for each in model.state_dict().values()),
        "checkpoint_bytes": os.path.getsize(weights) if weights else None,
    }


def _text(measured: Dict[str, Any]) -> str:
    proposals = measured["num_proposals"]
    fixed = "" if proposals is None else f", {proposals} proposals"
    peaks = measured["peak_activation_bytes"]
    rows: List[Dict[str, str]] = []
    for part, cost in measured["parts"].items():
        if cost["parameters"] or cost["flops"]:
            rows.append(_row(part, cost, peaks.get(part)))
    rows.append(_row("all", measured, peaks[TOTAL]))
    weights = human_bytes(measured["weight_bytes"])
    checkpoint = measured["checkpoint_bytes"]
    in_training = "" if checkpoint is None else f"; the training's checkpoint {human_bytes(checkpoint)}"
    return "\n".join(
        [
            f"{printable(measured['config_file'])}: image {measured['height']} x {measured['width']}{fixed}",
            tabulate(rows, headers="keys", disable_numparse=True, stralign="right"),
            f"Weights as shipped {weights}{in_training}",
            "",
        ]
    )


def _row(part: str, cost: Dict[str, Any], peak: Any) -> Dict[str, str]:
    return {
        "part": part,
        "parameters": f"{cost['parameters']:,}",
        "MFLOPs": f"{cost['flops'] / 1e6:.2f}",
        "peak activations": "" if peak is None else human_bytes(peak),
    }
