"""What a distillation came to: the table of its detectors, and the folder that ships."""

import os
from dataclasses import dataclass
from typing import Dict, List, Sequence

import numpy as np
from tabulate import tabulate

from qmimic_d2.engine import load_config
from qmimic_d2.files import write_text
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.report.cost import image_seconds, run_cost
from qmimic_d2.run_folder import CONFIG, FINAL_CHECKPOINT, read_evaluation

__all__ = ["Row", "collect_rows", "model_card", "table_text", "write_model_card"]

_LABELS = {"teacher": "teacher", "student": "student, quantization mimic", "scratch": "student, from scratch"}


@dataclass(frozen=True)
class Row:
    """
    A trained detector.

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
    ap50: float
    parameters: int
    flops: int
    weight_bytes: int
    seconds: float


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
                cost.weight_bytes or 0,
                times[number],
            )
        )
    return rows


def table_text(rows: Sequence[Row]) -> str:
    """The table that ends a distillation, in Markdown."""
    lines = [
        [row.label, f"{row.ap:.1f}", f"{row.ap50:.1f}", f"{row.parameters / 1e3:,.0f} k", f"{row.flops / 1e6:,.0f} M"]
        + [f"{row.seconds * 1e3:.1f}", f"{row.weight_bytes / 1e6:.2f}"]
        for row in rows
    ]
    titles = ["detector", "AP", "AP50", "parameters", "FLOPs", "ms", "MB"]
    return tabulate(lines, titles, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def model_card(rows: Sequence[Row], classes: Sequence[str], data: str, files: Dict[str, int], command: str) -> str:
    """
    The README of the folder that ships.

    Args:
        rows: of the trainings.
        classes: of the detector.
        data: what it was trained and evaluated on.
        files: bytes by name.
        command: that made it.
    """
    listed = "\n".join(f"- `{name}`: {size / 1e3:,.0f} kB" for name, size in files.items())
    return f"""# Detector of {", ".join(classes)}

{data}

{table_text(rows)}

{listed}

Run it, with numpy, Pillow and onnxruntime alone:

```python
from qmimic_d2.export import OnnxDetector
detector = OnnxDetector("model.onnx")
found = detector(image)  # (H, W, 3), BGR, uint8; found.boxes, found.scores, found.classes
```

Made by

    {command}
"""


def write_model_card(folder: str, text: str) -> None:
    """Writes ``README.md`` next to the exported files."""
    write_text(os.path.join(folder, "README.md"), text)
