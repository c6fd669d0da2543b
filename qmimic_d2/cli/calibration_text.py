"""The report of ``python -m qmimic_d2 calibrate``, a dict as its JSON has it, as tables for a person."""

import math
from typing import Any, Dict, List

from tabulate import tabulate

from qmimic_d2.analysis import LEAST_AP

__all__ = ["measurement_text", "recommendation_text"]


def measurement_text(report: Dict[str, Any]) -> str:
    """What was measured on which images: per feature its distribution, and a row for every stride."""
    quantizer = report["quantizer"]
    bound = f"{quantizer['num_codes']} codes" if quantizer["num_codes"] else "unbounded"
    lines = [
        f"Teacher      {report['config_file']}",
        f"Weights      {report['weights']}",
        f"Images       {report['num_images']} of {report['num_images_available']} from {', '.join(report['datasets'])}",
        f"Dictionary   {quantizer['name']}, {bound}, {'signed' if quantizer['signed'] else 'unsigned'}",
        *(f"WARNING      {warning}" for warning in report["warnings"]),
    ]
    for name, feature in report["features"].items():
        lines += ["", f"Feature {name}: {feature['num_values']} values", _table([_feature_row(feature)])]
        if feature["percentile_sample"] < feature["num_values"]:
            lines.append(f"(percentiles of a random sample of {feature['percentile_sample']} values, fixed seed)")
        rows = [_code_row(each["stride"], each["features"][name], feature["rms"]) for each in report["strides"]]
        lines += ["", _table(rows)]
    return "\n".join(lines)


def recommendation_text(report: Dict[str, Any]) -> str:
    """The AP of the quantized teacher, and which stride follows from it."""
    evaluation = report["evaluation"]
    if evaluation is None:
        return "No stride is recommended: that takes the AP of the quantized teacher. Add --eval for it."
    lines = [f"Quantized teacher on {evaluation['dataset']}, {evaluation['num_images']} images"]
    if evaluation["is_subset"]:
        lines.append(f"(a subset; the AP on all {evaluation['num_images_in_dataset']} images will differ)")
    rows = [{"stride": "full precision", "AP": f"{evaluation['full_precision_AP']:.2f}", "change": ""}]
    for each in report["strides"]:
        change = f"{round(-each['AP_loss'], 2) + 0.0:+.2f}"  # never "-0.00"
        rows.append({"stride": f"{each['stride']:g}", "AP": f"{each['AP']:.2f}", "change": change})
    return "\n".join([*lines, _table(rows), "", *_recommendation(report)])


def _recommendation(report: Dict[str, Any]) -> List[str]:
    evaluation, quantizer, stride = report["evaluation"], report["quantizer"], report["recommended_stride"]
    limit = f"{evaluation['max_AP_loss']:g} AP (--max-ap-loss)"
    bound = (
        f"{evaluation['max_relative_stride']:g} times the features' rms (--max-relative-stride), above which a student "
        "that is rounded too learns worse"
    )
    tried = [each["stride"] for each in report["strides"]]
    if stride is not None:
        settings = [f"NAME {quantizer['name']}", f"STRIDE {float(stride)!r}"]
        if quantizer["num_codes"]:
            settings.append(f"NUM_CODES {quantizer['num_codes']}")
        if quantizer["signed"]:
            settings.append("SIGNED True")
        lines = [
            f"Recommended: stride {stride:g}, the largest of these that costs at most {limit}",
            f"  and is at most {bound}.",
            "  " + " ".join(f"MODEL.QMIMIC.QUANTIZER.{setting}" for setting in settings),
        ]
        if stride == max(tried):
            lines.append("  It is the largest that was tried; a larger one (--strides) may do as well.")
        return lines
    if report["warnings"]:
        return ["No stride is recommended for a dictionary that does not fit the features (see WARNING above)."]
    if not evaluation["full_precision_AP"] >= LEAST_AP:
        return ["No stride is recommended: the teacher detects nothing in full precision. Train it first."]
    if quantizer["name"] == "PowerOfTwo":  # its large codes lie far apart, however small the first one is
        advice = "--quantizer Uniform"
    else:
        advice = f"smaller ones, such as --strides {min(tried) / 2:.2g} {min(tried) / 4:.2g}"
        if quantizer["num_codes"]:  # small strides saturate
            advice += ", or more codes (--num-codes)"
    return [
        f"No stride is recommended: each of these costs more than {limit}",
        f"  or is more than {bound}.",
        f"  Try {advice}, or fine-tuning the quantized teacher.",
    ]


def _feature_row(feature: Dict[str, Any]) -> Dict[str, str]:
    row = {"zeros": f"{feature['zero_share']:.1%}", "mean": f"{feature['mean']:.3g}", "rms": f"{feature['rms']:.3g}"}
    if feature["negative_share"] > 0.0:
        row.update({"negative": f"{feature['negative_share']:.1%}", "min": f"{feature['min']:.3g}"})
    percentiles = {f"{percent}%": f"{value:.3g}" for percent, value in feature["percentiles"].items()}
    return {**row, **percentiles, "max": f"{feature['max']:.3g}"}


def _code_row(stride: float, codes: Dict[str, Any], rms: float) -> Dict[str, str]:
    return {
        "stride": f"{stride:g}",
        "stride/rms": f"{stride / rms if rms else math.nan:.3g}",
        "codes used": str(codes["codes_used"]),
        "largest code": str(codes["largest_code"]),
        "zeros": f"{codes['zero_share']:.1%}",
        "relative error": f"{codes['relative_error']:.3f}",
        "cosine": f"{codes['cosine']:.4f}",
        "saturated": f"{codes['saturation']:.2%}",
    }


def _table(rows: List[Dict[str, str]]) -> str:
    return tabulate(rows, headers="keys", disable_numparse=True, stralign="right")
