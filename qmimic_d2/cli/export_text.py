"""What the export prints."""

import math
from typing import Sequence, Tuple

from tabulate import tabulate

from qmimic_d2.cli.printable import printable
from qmimic_d2.engine.exporting import Exported
from qmimic_d2.engine.verification import Verification, VerifiedModel
from qmimic_d2.export import ModelDescription
from qmimic_d2.export.raw.sources import decoder_sources

__all__ = ["export_text", "human_bytes", "verdict_text", "verification_text"]


def export_text(exported: Exported, description: ModelDescription) -> str:
    """What was written, and what it takes to run it."""
    preprocessing = description.to_dict()["preprocessing"]
    others = [description.file_name, *decoder_sources(description)]
    lines = [
        f"Wrote {printable(exported.path)} ({human_bytes(exported.file_bytes)}) and {', '.join(others)}",
        f"Quantizer: {description.quantizer or 'none'}",
        f"Input: {preprocessing['image']}; size {preprocessing['size']}; resize: {preprocessing['resize']}",
    ]
    if exported.student is not None:
        if exported.student.is_stock:
            lines.append("Loads in stock Detectron2, without this package")
        else:
            lines.append(f"Needs this package ({exported.student.cfg.MODEL.META_ARCHITECTURE}), because of:")
            lines += [f"  {reason}" for reason in exported.student.needs_package]
    return "\n".join(lines)


def verification_text(rows: Sequence[VerifiedModel], verification: Verification) -> str:
    """The table of a verification: the reference, the exported files, and others."""
    threads = f"{verification.threads} thread{'s' if verification.threads > 1 else ''}"
    table = [_row(each, rows[0]) for each in rows]
    images = f"{verification.num_images} images of {verification.dataset_name}"
    return "\n".join(
        [
            "",
            f"On {images}; boxes and scores: largest difference; times: median of one image, {threads}",
            tabulate(table, headers="keys", disable_numparse=True, stralign="right"),
        ]
    )


def verdict_text(
    reference: VerifiedModel, exported: VerifiedModel, tolerance: float, is_gain_allowed: bool
) -> Tuple[str, bool]:
    """
    Args:
        reference: the training's model.
        exported: a file.
        tolerance: in points of AP.
        is_gain_allowed: whether only a loss counts.

    Returns:
        A line, and whether the file is within the tolerance. It is not where the reference has no AP to lose.
    """
    speed = reference.milliseconds / exported.milliseconds
    aps = f"AP {reference.AP:.2f} -> {exported.AP:.2f}"
    if not _is_measured(reference):
        return f"{aps}, NOT verified: {_why_not(reference)}", False
    change = _change(exported.AP, reference.AP)
    is_within = change >= -tolerance and (is_gain_allowed or change <= tolerance)
    verdict = "within" if is_within else "NOT within"
    return (
        f"{aps} ({_signed(change)}), {verdict} the tolerance of {tolerance:g}; {speed:.1f} times as fast as eager",
        is_within,
    )


def _is_measured(reference: VerifiedModel) -> bool:
    """Whether its AP can fall at all: one of 0, to the digits that are shown, cannot."""
    return not math.isnan(reference.AP) and round(reference.AP, 2) > 0.0


def _why_not(reference: VerifiedModel) -> str:
    if not reference.detections:
        return (
            "the training's model detects nothing on these images, so there is nothing to compare; verify with a "
            "trained checkpoint, on images like those of its training"
        )
    return (
        f"the training's model has {reference.detections} detections on these images and none of them is right, so "
        "that no loss would show; verify with a trained checkpoint, on a data set of its classes"
    )


def _change(ap: float, reference: float) -> float:
    """A model that detects nothing counts as AP 0."""
    return (0.0 if math.isnan(ap) else ap) - (0.0 if math.isnan(reference) else reference) + 0.0


def _signed(change: float) -> str:
    return f"{round(change, 2) + 0.0:+.2f}"  # never "-0.00"


def _row(model: VerifiedModel, reference: VerifiedModel):
    apart = model.difference
    return {
        "model": model.name,
        "AP": f"{model.AP:.2f}",
        "change": "" if model is reference else _signed(_change(model.AP, reference.AP)),
        "boxes": "" if apart is None else f"{apart.boxes:.3f} px",
        "scores": "" if apart is None else f"{apart.scores:.4f}",
        "unmatched": "" if apart is None else f"{apart.unmatched} of {2 * apart.matched + apart.unmatched}",
        "size": human_bytes(model.file_bytes),
        "time": f"{model.milliseconds:.2f} ms",
    }


def human_bytes(count: int) -> str:
    """In kB or MB, powers of ten."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
