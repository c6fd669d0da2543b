"""
Measures a teacher's features and what quantization costs; with --eval, recommends a stride.

Runs the teacher over some training images and prints, for every feature, its sparsity and percentiles, and
for every stride how many codes are used and how far the codes are from the features. With --eval it prints
the AP of the quantized teacher, too, and the largest stride that costs little enough. Exit status: 0, or 2
for a mistake in the arguments or the config.
"""

import argparse
import itertools
import sys
from dataclasses import asdict
from typing import Any, Dict, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from qmimic_d2 import analysis
from qmimic_d2.analysis import FeatureStatistics
from qmimic_d2.cli.argument_types import non_negative, positive, positive_number
from qmimic_d2.cli.calibration_text import measurement_text, recommendation_text
from qmimic_d2.cli.model_arguments import add_model_arguments, load_model_config, usage_errors, weights_key
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.engine import build_checkpointer
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.files import check_writable, write_json
from qmimic_d2.modeling import QUANTIZER_REGISTRY, build_quantizer
from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.quantizer import CodeQuantizer
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.near_names import near_names

# Every registered dictionary. A clamp has no codes to calibrate.
QUANTIZERS = [name[: -len("Quantizer")] for name, kind in QUANTIZER_REGISTRY if issubclass(kind, CodeQuantizer)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-images", type=positive, default=100, metavar="K", help="images to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset", default="", metavar="NAME", help="registered set they come from (default: DATASETS.TRAIN)"
    )
    parser.add_argument(
        "--strides",
        type=positive_number,
        nargs="+",
        default=[],
        metavar="S",
        help="strides to try (default: 1/32, 1/16, ... 1, 2 times the features' rms, to two digits)",
    )
    parser.add_argument("--quantizer", choices=QUANTIZERS, default="Uniform", help="default: %(default)s")
    parser.add_argument(
        "--num-codes",
        type=_num_codes,
        default=0,
        metavar="L",
        help="size of the dictionary, zero included; 0 = unbounded (default)",
    )
    parser.add_argument(
        "--signed", action="store_true", help="mirror the dictionary, for features that no ReLU ends"
    )
    parser.add_argument(
        "--features", nargs="+", default=[], metavar="NAME", help="default: those that the detector's heads read"
    )
    parser.add_argument(
        "--eval", action="store_true", help="AP of the quantized teacher on the first set of DATASETS.TEST"
    )
    parser.add_argument(
        "--max-ap-loss",
        type=non_negative,
        default=0.5,
        metavar="AP",
        help="recommend the largest stride that costs at most so many points of AP (default: %(default)s)",
    )
    parser.add_argument(
        "--max-relative-stride",
        type=positive_number,
        default=analysis.MAX_RELATIVE_STRIDE,
        metavar="S",
        help="recommend none above so many times the features' rms, since a student that is rounded too would learn "
        "worse (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-images",
        type=positive,
        default=0,
        metavar="N",
        help="evaluate on so many of the test images only (default: all)",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write everything to this file as well")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        if args.eval_images and not args.eval:
            raise ValueError(f"--eval-images is {args.eval_images}, and --eval is not given; add it")
        if args.json:
            check_writable(args.json, "--json")
        cfg = load_model_config(args)
        datasets = _calibration_sets(args, cfg)
        features = args.features or head_features(cfg)
        model = build_model(cfg)
        check_features(features, model.backbone.output_shape(), "--features")
        build_checkpointer(model, "").load_for_evaluation(cfg.MODEL.WEIGHTS, weights_key(args))
        evaluation = _build_evaluation(args, cfg)
        loader, num_available = analysis.build_calibration_loader(cfg, datasets, args.num_images)
        _progress(f"measuring {', '.join(features)} on {len(loader)} images")
        statistics = analysis.measure_features(model, loader, features)
        strides = sorted(set(args.strides)) or analysis.default_strides(statistics)
        quantizers = [_quantizer(args, cfg, stride) for stride in strides]
        codes = analysis.measure_codes(model, loader, features, quantizers)
        report = {
            "config_file": args.config_file,
            "weights": cfg.MODEL.WEIGHTS,
            "datasets": datasets,
            "num_images": len(loader),
            "num_images_available": num_available,
            "quantizer": {"name": args.quantizer, "num_codes": args.num_codes, "signed": args.signed},
            "warnings": _warnings(args, statistics),
            "features": {name: _feature_report(statistics[name]) for name in features},
            "strides": [
                {"stride": stride, "features": {name: asdict(codes[name][index]) for name in features}}
                for index, stride in enumerate(strides)
            ],
            "evaluation": None,
            "recommended_stride": None,
        }
        say(measurement_text(report))
        if evaluation is not None:
            _evaluate(args, evaluation, model, features, quantizers, report)
        say(f"\n{recommendation_text(report)}")
        if args.json:
            write_json(args.json, report)
            say(f"Written to {printable(args.json)}")
    return 0


def _calibration_sets(args: argparse.Namespace, cfg: CfgNode) -> List[str]:
    flag = "--dataset" if args.dataset else "DATASETS.TRAIN"
    names = [args.dataset] if args.dataset else list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty; name a registered data set with --dataset")
    _check_registered(names, flag)
    return names


def _build_evaluation(args: argparse.Namespace, cfg: CfgNode) -> Optional[APEvaluation]:
    if not args.eval:
        return None
    if not cfg.DATASETS.TEST:
        raise ValueError("--eval is given, and DATASETS.TEST is empty; name a registered data set there")
    _check_registered(cfg.DATASETS.TEST[:1], "DATASETS.TEST")
    return APEvaluation(cfg, cfg.DATASETS.TEST[0], args.eval_images)


def _check_registered(names: Sequence[str], flag: str) -> None:
    for name in names:
        if name not in DatasetCatalog.list():
            near = near_names(name, DatasetCatalog.list(), count=5, cutoff=0.4)
            hint = f"near names are {near}" if near else "give the name of one that is"
            raise KeyError(
                f"{flag} names {name!r}, which is not registered; {hint}, or the module that registers it: "
                "python -m qmimic_d2 --import MODULE calibrate ..."
            )


def _quantizer(args: argparse.Namespace, cfg: CfgNode, stride: float) -> CodeQuantizer:
    cfg = cfg.clone()
    cfg.defrost()
    node = cfg.MODEL.QMIMIC.QUANTIZER
    node.NAME, node.STRIDE, node.NUM_CODES, node.SIGNED = args.quantizer, stride, args.num_codes, args.signed
    return build_quantizer(cfg)


def _warnings(args: argparse.Namespace, statistics: Dict[str, FeatureStatistics]) -> List[str]:
    return [
        f"{name}: features are signed: {each.negative_share:.1%} of the values are below 0, and an unsigned "
        "dictionary turns them to 0: use --signed"
        for name, each in statistics.items()
        if analysis.is_signed(each) and not args.signed
    ]


def _feature_report(statistics: FeatureStatistics) -> Dict[str, Any]:
    report = asdict(statistics)
    report["percentiles"] = {f"{percent:g}": value for percent, value in statistics.percentiles.items()}
    return report


def _evaluate(
    args: argparse.Namespace,
    evaluation: APEvaluation,
    model: nn.Module,
    features: Sequence[str],
    quantizers: Sequence[CodeQuantizer],
    report: Dict[str, Any],
) -> None:
    """Completes the report by the AP in full precision and with each of the quantizers."""
    numbers = itertools.count(1)

    def evaluate(current: nn.Module) -> float:
        progress = f"evaluating {next(numbers)} of {len(quantizers) + 1}"
        _progress(f"{progress} on {evaluation.num_images} images of {evaluation.dataset_name}")
        return evaluation(current)

    full_precision, *aps = analysis.measure_ap(model, features, [None, *quantizers], evaluate)
    for each, ap in zip(report["strides"], aps):
        each["AP"] = ap
        each["AP_loss"] = full_precision - ap
    report["evaluation"] = {
        "dataset": evaluation.dataset_name,
        "num_images": evaluation.num_images,
        "num_images_in_dataset": evaluation.num_images_in_dataset,
        "is_subset": evaluation.is_subset,
        "full_precision_AP": full_precision,
        "max_AP_loss": args.max_ap_loss,
        "max_relative_stride": args.max_relative_stride,
    }
    if report["warnings"]:  # whatever the AP, half of what the teacher knows is lost
        return
    smallest_rms = min(feature["rms"] for feature in report["features"].values())
    report["recommended_stride"] = analysis.recommend_stride(
        [quantizer.stride for quantizer in quantizers],
        aps,
        full_precision,
        args.max_ap_loss,
        args.max_relative_stride * smallest_rms,
    )


def _progress(text: str) -> None:
    say(text, sys.stderr)


def _num_codes(text: str) -> int:
    value = int(text) if text.isdigit() else 1
    if value == 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of a dictionary; give 2 or more, zero included, or 0 for an unbounded one"
        )
    return value
