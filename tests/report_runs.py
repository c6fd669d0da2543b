"""Tiny run folders of train_net.py for tests of the report; nothing in them was trained."""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from helpers import randomize, seeded_model, tiny_cfg
from tiny_coco import CATEGORY_IDS

# AP of the class i of the tiny data set, and the mean of the three.
CLASS_AP = (30.0, 60.0, 45.0)
AP = 45.0

HELD_OUT = {
    "dataset": "tiny_coco",
    "num_images": 4,
    "num_rois": 48,
    "iteration": 40,
    "quantizer": "Uniform(stride=0.25)",
    "levels": {
        "conv5": {
            "match_ratio": 0.75,
            "match_ratio_nonzero": 0.5,
            "cosine": 0.875,
            "student_sparsity": 0.5,
            "teacher_sparsity": 0.4,
            "code_histogram": {"codes": [0.0, 0.25, 0.5], "student": [50, 40, 10], "teacher": [40, 40, 20]},
        }
    },
}


def metrics_lines(last: int = 39, is_mimic: bool = True, evaluated_at: Optional[List[int]] = None) -> str:
    """
    Lines as the trainer writes them every 20 iterations, with figures of other iterations in lines of their own.

    Iteration i has the detection losses 2 / (i + 1) and 1 / (i + 1), and the mimic loss 4 / (i + 1).
    """
    lines = []
    for iteration in range(19, last + 1, 20):
        row: Dict[str, Any] = {"iteration": iteration, "lr": 0.01, "loss_cls": 2 / (iteration + 1)}
        row["loss_rpn_loc"] = 1 / (iteration + 1)
        if is_mimic:
            row["loss_mimic"] = 4 / (iteration + 1)
        row["total_loss"] = sum(value for name, value in row.items() if name.startswith("loss_"))
        lines.append(row)
        if is_mimic:
            shares = {"qmimic/grad_share_map": 0.6, "qmimic/grad_share_backbone": 0.4}
            match = {"qmimic/match_ratio": 0.7 + iteration / 1000, "qmimic/match_ratio_nonzero": 0.3}
            lines.append({"iteration": iteration - 19, **match, **shares, "qmimic/grad_cosine_backbone": -0.1})
    for number, iteration in enumerate(evaluated_at or []):
        lines.append({"iteration": iteration, "bbox/AP": AP - 10.0 * number, "bbox/APl": float("nan")})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_run(
    folder: Path,
    dataset: str,
    *options: Any,
    metrics: Optional[str] = None,
    is_mimic: bool = True,
    is_finished: bool = True,
    seed: int = 1,
) -> Path:
    """
    The folder of a student, with a teacher where ``is_mimic``.

    Args:
        dataset: registered by :func:`tiny_coco.registered_coco`.
        options: KEY VALUE pairs over the tiny config.
        metrics: content of metrics.json; None = :func:`metrics_lines`.
        is_finished: with weights, an evaluation, its detections, and a held-out measurement for a mimic.
    """
    folder.mkdir(parents=True)
    pairs = ["DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,), "OUTPUT_DIR", str(folder)]
    pairs += ["INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 40]
    if is_mimic:
        (folder / "teacher_config.yaml").write_text(tiny_cfg("MODEL.VGG.WIDTH_DIVISOR", 16).dump())
        pairs += ["MODEL.QMIMIC.TEACHER.CONFIG_FILE", "teacher_config.yaml"]
        pairs += ["MODEL.QMIMIC.TEACHER.WEIGHTS", "a/place/teacher/model_final.pth"]
    cfg = tiny_cfg(*pairs, *options, meta_architecture="QuantMimicRCNN" if is_mimic else "GeneralizedRCNN")
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text(metrics_lines(is_mimic=is_mimic) if metrics is None else metrics)
    if is_finished:
        write_results(folder, cfg, seed, is_mimic)
    return folder


def write_results(folder: Path, cfg, seed: int, is_mimic: bool) -> None:
    cfg = cfg.clone()
    cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE = ""
    torch.save({"model": randomize(seeded_model(cfg, seed)).state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    figures = {"AP": AP, "AP50": 80.0, "APl": None, **{f"AP-class {each}": ap for each, ap in zip("359", CLASS_AP)}}
    evaluation = {"datasets": list(cfg.DATASETS.TEST), "results": {"bbox": figures}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "inference").mkdir()
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections()))
    if is_mimic:
        (folder / "mimic.json").write_text(json.dumps(HELD_OUT))


def detections() -> List[Dict[str, Any]]:
    """
    On image 10: its object (class 0), found. On image 11: the right place with a wrong class. On image 12: the right
    class in a wrong place, and one of too small a score.
    """
    box, elsewhere = [9.0, 9.0, 24.0, 32.0], [38.0, 40.0, 20.0, 20.0]
    return [
        {"image_id": 10, "category_id": CATEGORY_IDS[0], "bbox": box, "score": 0.9},
        {"image_id": 11, "category_id": CATEGORY_IDS[0], "bbox": box, "score": 0.8},
        {"image_id": 12, "category_id": CATEGORY_IDS[2], "bbox": elsewhere, "score": 0.7},
        {"image_id": 12, "category_id": CATEGORY_IDS[2], "bbox": box, "score": 0.2},
    ]
