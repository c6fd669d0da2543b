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
from typing import Any, Dict, List, Sequence

from torch import nn

from qmimic_d2 import analysis
from qmimic_d2.cli.argument_types import non_negative, num_codes, positive, positive_number
from qmimic_d2.cli.calibration_text import measurement_text, recommendation_text
from qmimic_d2.cli.model_arguments import add_model_arguments, load_model_config, weights_key
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.export import build_student
from qmimic_d2.files import check_writable, write_json
from qmimic_d2.modeling import QUANTIZER_REGISTRY
from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.quantizer import CodeQuantizer
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.near_names import check_registered

# Every registered dictionary by its name in the config. A clamp has no codes to calibrate.
QUANTIZERS = {
    name[: -len("Quantizer")]: kind for name, kind in QUANTIZER_REGISTRY if issubclass(kind, CodeQuantizer)
}
_ADVICE = "Or name the module that registers it: python -m qmimic_d2 --import MODULE calibrate ..."


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
    parser.add_argument("--quantizer", choices=list(QUANTIZERS), default="Uniform", help="default: %(default)s")
    parser.add_argument(
        "--num-codes",
        type=num_codes,
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
        datasets = [args.dataset] if args.dataset else list(cfg.DATASETS.TRAIN)
        if not datasets:
            raise ValueError("DATASETS.TRAIN is empty; name a registered data set with --dataset")
        check_registered("--dataset" if args.dataset else "DATASETS.TRAIN", datasets, _ADVICE)
        features = args.features or head_features(cfg)
        model = build_student(cfg, weights_key=weights_key(args))
        check_features(features, model.backbone.output_shape(), "--features")
        evaluation = None
        if args.eval:
            if not cfg.DATASETS.TEST:
                raise ValueError("--eval is given, and DATASETS.TEST is empty; name a registered data set there")
            check_registered("DATASETS.TEST", cfg.DATASETS.TEST[:1], _ADVICE)
            evaluation = APEvaluation(cfg, cfg.DATASETS.TEST[0], args.eval_images)
        loader, num_available = analysis.build_calibration_loader(cfg, datasets, args.num_images)
        say(f"measuring {', '.join(features)} on {len(loader)} images", sys.stderr)
        statistics = analysis.measure_features(model, loader, features)
        strides = sorted(set(args.strides)) or analysis.default_strides(statistics)
        dictionary = {"num_codes": args.num_codes, "signed": args.signed}
        quantizers = [QUANTIZERS[args.quantizer](stride=stride, **dictionary) for stride in strides]
        codes = analysis.measure_codes(model, loader, features, quantizers)
        report = {
            "config_file": args.config_file,
            "weights": cfg.MODEL.WEIGHTS,
            "datasets": datasets,
            "num_images": len(loader),
            "num_images_available": num_available,
            "quantizer": {"name": args.quantizer, **dictionary},
            "warnings": [
                f"{name}: features are signed: {each.negative_share:.1%} of the values are below 0, and an unsigned "
                "dictionary turns them to 0: use --signed"
                for name, each in statistics.items()
                if analysis.is_signed(each) and not args.signed
            ],
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


def _feature_report(statistics: analysis.FeatureStatistics) -> Dict[str, Any]:
    percentiles = {f"{percent:g}": value for percent, value in statistics.percentiles.items()}
    return {**asdict(statistics), "percentiles": percentiles}


def _evaluate(
    args: argparse.Namespace,
    evaluation: APEvaluation,
    model: nn.Module,
    features: Sequence[str],
    quantizers: List[CodeQuantizer],
    report: Dict[str, Any],
) -> None:
    """Adds the AP in full precision and with each of the quantizers to the report, and the stride that follows."""
    numbers = itertools.count(1)

    def evaluate(current: nn.Module) -> float:
        progress = f"evaluating {next(numbers)} of {len(quantizers) + 1}"
        say(f"{progress} on {evaluation.num_images} images of {evaluation.dataset_name}", sys.stderr)
        return evaluation(current)

    full_precision, *aps = analysis.measure_ap(model, features, [None, *quantizers], evaluate)
    for each, ap in zip(report["strides"], aps):
        each.update({"AP": ap, "AP_loss": full_precision - ap})
    report["evaluation"] = {
        "dataset": evaluation.dataset_name,
        "num_images": evaluation.num_images,
        "num_images_in_dataset": evaluation.num_images_in_dataset,
        "is_subset": evaluation.is_subset,
        "full_precision_AP": full_precision,
        "max_AP_loss": args.max_ap_loss,
        "max_relative_stride": args.max_relative_stride,
    }
    if not report["warnings"]:  # with one, half of what the teacher knows is lost, whatever the AP
        largest = args.max_relative_stride * min(feature["rms"] for feature in report["features"].values())
        strides = [quantizer.stride for quantizer in quantizers]
        report["recommended_stride"] = analysis.recommend_stride(
            strides, aps, full_precision, args.max_ap_loss, largest
        )
