"""What a distillation came to: the table of its detectors, and the folder that ships."""

import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from tabulate import tabulate

from qmimic_d2.engine import load_config
from qmimic_d2.engine.exporting import FORMATS
from qmimic_d2.engine.verification import VERIFICATION_NAME
from qmimic_d2.files import read_json, write_text
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.report.cost import image_seconds, run_cost
from qmimic_d2.run_folder import CONFIG, FINAL_CHECKPOINT, read_evaluation

__all__ = [
    "Row",
    "ShippedFile",
    "collect_rows",
    "given_teacher",
    "model_card",
    "shipped_files",
    "table_text",
    "write_model_card",
]

_LABELS = {"teacher": "teacher", "student": "student, quantization mimic", "scratch": "student, from scratch"}


@dataclass(frozen=True)
class Row:
    """
    A trained detector. What is None was not measured.

    Attributes:
        label: for people.
        ap, ap50: in percent, on the test set.
        parameters: number of them.
        flops: multiply-accumulate operations of an image.
        weight_bytes: of its tensors.
        seconds: CPU time of an image, one thread, resizing included.
    """

    label: str
    ap: float
    ap50: Optional[float] = None
    parameters: Optional[int] = None
    flops: Optional[int] = None
    weight_bytes: Optional[int] = None
    seconds: Optional[float] = None


def collect_rows(output: str, names: Sequence[str], images: Sequence[np.ndarray]) -> List[Row]:
    """
    Args:
        output: folder of the distillation.
        names: of its trainings, all of them done.
        images: shape (H, W, 3), BGR, uint8; for the time and the FLOPs.
    """
    folders = [os.path.join(output, name) for name in names]
    weights = [os.path.join(folder, FINAL_CHECKPOINT) for folder in folders]
    configs = [
        load_config(os.path.join(folder, CONFIG), ["MODEL.WEIGHTS", path, "MODEL.DEVICE", "cpu"], eval_only=True)
        for folder, path in zip(folders, weights)
    ]
    predictors = [Predictor(cfg) for cfg in configs]
    times = image_seconds(predictors, [images] * len(names), 1)
    rows = []
    for number, name in enumerate(names):
        figures = read_evaluation(folders[number])["bbox"]
        cost = run_cost(configs[number], predictors[number], weights[number], images)
        rows.append(
            Row(
                _LABELS[name],
                figures["AP"],
                figures["AP50"],
                cost.parameters,
                cost.flops,
                cost.weight_bytes,
                times[number],
            )
        )
    return rows


def table_text(rows: Sequence[Row]) -> str:
    """The table that ends a distillation, in Markdown."""
    columns = [
        ["–" if value is None else form.format(value * factor) for value in values]
        for values, factor, form in (
            ([row.ap for row in rows], 1.0, "{:.1f}"),
            ([row.ap50 for row in rows], 1.0, "{:.1f}"),
            ([row.parameters for row in rows], 1e-3, "{:,.0f} k"),
            ([row.flops for row in rows], 1e-6, "{:,.0f} M"),
            ([row.seconds for row in rows], 1e3, "{:.1f}"),
            ([row.weight_bytes for row in rows], 1e-6, "{:.2f}"),
        )
    ]
    lines = list(zip([row.label for row in rows], *columns))
    titles = ["detector", "AP", "AP50", "parameters", "FLOPs", "ms", "MB"]
    return _table(lines, titles)


@dataclass(frozen=True)
class ShippedFile:
    """
    An exported detector.

    Attributes:
        name: of the file.
        ap: in percent, as the export verified it on the test set.
        num_bytes: of the file.
        milliseconds: of an image, one thread.
    """

    name: str
    ap: float
    num_bytes: int
    milliseconds: float


def _verified(folder: str) -> Dict[str, Any]:
    """Figures of an export, by form."""
    return {each["name"].partition(",")[0]: each for each in read_json(os.path.join(folder, VERIFICATION_NAME))}


def given_teacher(folder: str) -> List[Row]:
    """
    The row of a teacher that was not trained here, as an export's verification evaluated it; none where it could not.

    Raises:
        OSError, ValueError: the export's figures cannot be read.
    """
    found = _verified(folder).get("teacher")
    if found is None:
        return []
    weight_bytes, seconds = found["file_bytes"], found["milliseconds"] / 1e3
    return [Row(_LABELS["teacher"], found["AP"], weight_bytes=weight_bytes, seconds=seconds)]


def shipped_files(folder: str) -> List[ShippedFile]:
    """
    The files that an export wrote into a folder and verified there.

    Raises:
        OSError, ValueError: the export's figures cannot be read.
    """
    verified = _verified(folder)
    return [
        ShippedFile(export.file, verified[form]["AP"], verified[form]["file_bytes"], verified[form]["milliseconds"])
        for form, export in FORMATS.items()
        if form in verified
    ]


def model_card(
    rows: Sequence[Row], files: Sequence[ShippedFile], classes: Sequence[str], data: str, made_by: str, command: str
) -> str:
    """
    The README of the folder that ships.

    Args:
        rows: of the trainings.
        files: of the folder.
        classes: of the detector.
        data: what it was trained and evaluated on.
        made_by: version of the package, and seed.
        command: that made it.
    """
    lines = [
        [f"`{each.name}`", f"{each.ap:.1f}", f"{each.milliseconds:.1f}", f"{each.num_bytes / 1e6:.2f}"]
        for each in files
    ]
    listed = _table(lines, ["file", "AP", "ms", "MB"])
    return f"""# Detector of {", ".join(classes)}

{data}

{table_text(rows)}

{listed}

AP is COCO's, in percent; ms is the time of an image on one thread. Run it, with numpy, Pillow and onnxruntime alone:

```python
from qmimic_d2.export import OnnxDetector
detector = OnnxDetector("{files[0].name}")
found = detector(image)  # (H, W, 3), BGR, uint8; found.boxes, found.scores, found.classes
```

Made by {made_by}:

    {command}
"""


def _table(lines: Sequence[Sequence[str]], titles: Sequence[str]) -> str:
    colalign = ("left", *["right"] * (len(titles) - 1))
    return tabulate(lines, titles, "github", disable_numparse=True, colalign=colalign)


def write_model_card(folder: str, text: str) -> None:
    """Writes ``README.md`` next to the exported files."""
    write_text(os.path.join(folder, "README.md"), text)
