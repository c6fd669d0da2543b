"""The demo's table, ``results.json``, ``detections.png`` and ``report.html``."""

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

import qmimic_d2
from package_versions import package_versions
from qmimic_d2.analysis import measure_cost
from qmimic_d2.config_files import changed
from qmimic_d2.files import write_json
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.report import Run, collect_run
from qmimic_d2.report.metrics import last_mean
from qmimic_d2.report.page import write_report

__all__ = ["Model", "write_results"]

_NUM_IMAGES = 8
_SCALE = 2
_SCORE_THRESHOLD = 0.5


@dataclass
class Model:
    """One row of the table: a detector, its config, its weights and the seconds it took."""

    label: str
    name: str
    cfg: CfgNode
    weights: str
    seconds: float


def write_results(models: Sequence[Model], folder: str) -> None:
    """Prints the table and writes ``results.json``, ``detections.png`` and ``report.html`` to ``folder``."""
    runs = [
        collect_run(os.path.join(folder, model.name), name=model.label, cfg=model.cfg, weights=model.weights)
        for model in models
    ]
    rows = [_row(*pair) for pair in zip(models, runs)]
    write_json(os.path.join(folder, "results.json"), {"models": rows, "versions": package_versions()})
    _draw(models, os.path.join(folder, "detections.png"))
    _print(rows, folder)
    path = os.path.join(folder, "report.html")
    write_report(runs, path, title="Quantization Mimic: the demo", made_by=f"qmimic_d2 {qmimic_d2.__version__}")
    print(f"All of it on one page, with curves and larger pictures: {path}", flush=True)


def _row(model: Model, run: Run) -> Dict[str, Any]:
    cost = measure_cost(model.cfg, model.cfg.INPUT.MIN_SIZE_TEST, model.cfg.INPUT.MIN_SIZE_TEST)
    return {
        "label": model.label,
        "name": model.name,
        "AP": run.figures["AP"],
        "AP50": run.figures["AP50"],
        "parameters": cost.parameters,
        "flops": cost.flops,
        "match_ratio": last_mean(run.metrics.of("qmimic/match_ratio")),
        "match_ratio_nonzero": last_mean(run.metrics.of("qmimic/match_ratio_nonzero")),
        "seconds": round(model.seconds, 1),
        "seed": model.cfg.SEED,
        "iterations": model.cfg.SOLVER.MAX_ITER if run.metrics.series else None,
        "config_digest": hashlib.sha256(model.cfg.dump().encode()).hexdigest()[:12],
        "weights": model.weights,
    }


def _print(rows: Sequence[Dict[str, Any]], folder: str) -> None:
    table = [
        [
            row["label"],
            f"{row['AP']:.1f}",
            f"{row['AP50']:.1f}",
            f"{row['parameters'] / 1e3:.0f} k",
            f"{row['flops'] / 1e6:.0f} M",
            _percent(row["match_ratio"]),
            _percent(row["match_ratio_nonzero"]),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    headers = ["model", "AP", "AP50", "parameters", "FLOPs", "match", "match, not both 0", "seconds"]
    print("\n" + tabulate(table, headers, tablefmt="github", disable_numparse=True))
    seeds = sorted({row["seed"] for row in rows})
    print(
        f"\nOne seed each ({', '.join(map(str, seeds))}): a difference of a few AP is within what another seed "
        "changes.\nmatch: share of the regions' entries on which teacher and student have the same code, in "
        "training."
    )
    print(f"Table as JSON: {folder}/results.json. Detections side by side: {folder}/detections.png")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _draw(models: Sequence[Model], path: str) -> None:
    """Columns: ground truth and every model; rows: the first images of the test set."""
    dataset = models[0].cfg.DATASETS.TEST[0]
    images = DatasetCatalog.get(dataset)[:_NUM_IMAGES]
    classes = MetadataCatalog.get(dataset).thing_classes
    pictures = [cv2.imread(image["file_name"]) for image in images]
    columns = [_column("ground truth", [_annotated(p, i, classes) for p, i in zip(pictures, images)])]
    for model in models:
        predictor = Predictor(changed(model.cfg, "MODEL.WEIGHTS", model.weights))
        drawn = []
        for picture in pictures:
            found = predictor(picture)
            found = found[found.scores >= _SCORE_THRESHOLD]
            names = [f"{classes[index]} {score:.2f}" for index, score in zip(found.pred_classes, found.scores)]
            drawn.append(_boxes(picture, found.pred_boxes.tensor.numpy(), names, (0, 220, 255)))
        columns.append(_column(model.label.replace("student, ", ""), drawn))
    cv2.imwrite(path, np.hstack(columns))


def _annotated(picture: np.ndarray, image: Dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    boxes = [np.array(each["bbox"]) for each in image["annotations"]]
    corners = [np.concatenate([box[:2], box[:2] + box[2:]]) for box in boxes]
    return _boxes(picture, corners, [classes[each["category_id"]] for each in image["annotations"]], (80, 230, 80))


def _boxes(picture: np.ndarray, corners, names: List[str], color) -> np.ndarray:
    drawn = cv2.resize(picture, None, fx=_SCALE, fy=_SCALE, interpolation=cv2.INTER_CUBIC)
    for (x0, y0, x1, y1), name in zip(corners, names):
        top_left = (int(x0 * _SCALE), int(y0 * _SCALE))
        cv2.rectangle(drawn, top_left, (int(x1 * _SCALE), int(y1 * _SCALE)), color, 1, cv2.LINE_AA)
        place = (top_left[0], max(top_left[1] - 3, 9))
        cv2.putText(drawn, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(drawn, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.36, color, 1, cv2.LINE_AA)
    return drawn


def _column(title: str, pictures: Sequence[np.ndarray]) -> np.ndarray:
    width = pictures[0].shape[1]
    header = np.full((28, width, 3), 255, np.uint8)
    cv2.putText(header, title, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
    for picture in pictures:
        picture[-2:] = picture[:, -2:] = 255  # a white seam between the pictures
    return np.vstack([header, *pictures])
