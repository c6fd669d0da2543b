"""
WIDER FACE's evaluation again, slowly and without arrays, written from the description of the protocol alone: what
qmimic_d2.evaluation.wider_face.protocol is compared with. Also the ground-truth files as MATLAB writes them.
"""

from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
from scipy.io import savemat

from qmimic_d2.evaluation import SUBSETS, WiderFaceGroundTruth


def reference_evaluation(ground_truth: WiderFaceGroundTruth, predictions: Dict[str, Any]) -> Dict[str, float]:
    """AP by subset; arguments as those of :func:`qmimic_d2.evaluation.evaluate_predictions`."""
    predictions = {image_id: [list(map(float, row)) for row in rows] for image_id, rows in predictions.items()}
    _map_scores(predictions)
    return {subset: _subset_ap(ground_truth, predictions, subset) for subset in SUBSETS}


def _map_scores(predictions: Dict[str, List[List[float]]]) -> None:
    scores = [row[4] for rows in predictions.values() for row in rows]
    least, greatest = min(scores), max(scores)
    for rows in predictions.values():
        for row in rows:
            row[4] = (row[4] - least) / (greatest - least)


def _subset_ap(ground_truth: WiderFaceGroundTruth, predictions: Dict[str, List[List[float]]], subset: str) -> float:
    num_faces = 0
    counted, recalled = [0] * 1000, [0] * 1000
    for image_id, boxes in ground_truth.boxes.items():
        kept = ground_truth.kept[subset][image_id]
        num_faces += sum(bool(each) for each in kept)
        rows = sorted(predictions.get(image_id, []), key=lambda row: -row[4])
        if rows and len(boxes):
            flags = _judge(rows, boxes.tolist(), kept.tolist())
            for step in range(1000):
                threshold = 1 - (step + 1) / 1000
                for row, (counts, recalls) in zip(rows, flags):
                    if row[4] < threshold:
                        break
                    counted[step] += counts
                    recalled[step] += recalls
    curve = [(hits / num_faces, hits / proposals if proposals else 0.0) for proposals, hits in zip(counted, recalled)]
    return _area(curve)


def _judge(rows: List[List[float]], boxes: List[List[float]], kept: List[bool]) -> List[Any]:
    """Per detection, whether it counts as one, and whether it recalls a face."""
    found = set()
    flags = []
    for row in rows:
        overlaps = [_iou(row, box) for box in boxes]
        best = overlaps.index(max(overlaps))
        if overlaps[best] < 0.5:
            flags.append((True, False))
        elif not kept[best]:
            flags.append((False, False))
        else:
            flags.append((True, best not in found))
            found.add(best)
    return flags


def _iou(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0]) + 1
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] + 1) * (box[3] + 1) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def _area(curve: List[Any]) -> float:
    points = [(0.0, 0.0), *curve, (1.0, 0.0)]
    area = 0.0
    best = 0.0
    for index in range(len(points) - 1, 0, -1):
        best = max(best, points[index][1])
        area += (points[index][0] - points[index - 1][0]) * best
    return area


def random_ground_truth(num_images: int, num_faces: int, num_events: int, seed: int = 0) -> WiderFaceGroundTruth:
    """Images of up to 1000 pixels; some without a face, and some boxes without a width, as in the official files."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(num_images, 0.4))
    counts = generator.multinomial(num_faces, shares)
    ground_truth = WiderFaceGroundTruth({}, {subset: {} for subset in SUBSETS})
    for index, count in enumerate(counts):
        event = index * num_events // num_images
        image_id = f"{event}--Event/{event}_Event_{index}"
        size = np.floor(np.exp(generator.uniform(np.log(4), np.log(300), count)))
        boxes = np.stack(
            [
                np.floor(generator.uniform(0, 1000, count)),
                np.floor(generator.uniform(0, 700, count)),
                np.where(generator.random(count) < 0.002, 0, size),
                np.floor(size * generator.uniform(1.0, 1.5, count)),
            ],
            axis=1,
        )
        ground_truth.boxes[image_id] = boxes if count else np.zeros((1, 4))
        is_valid = (generator.random(count) < 0.98) if count else np.zeros(1, dtype=bool)
        for subset, least in zip(SUBSETS, (50, 30, 10)):
            ground_truth.kept[subset][image_id] = is_valid & (ground_truth.boxes[image_id][:, 3] >= least)
    return ground_truth


def random_predictions(ground_truth: WiderFaceGroundTruth, per_image: int, seed: int = 1) -> Dict[str, np.ndarray]:
    """(D, 5) per image: boxes near faces, some of them several times, and boxes anywhere; equal scores among them."""
    generator = np.random.default_rng(seed)
    predictions = {}
    for image_id, boxes in ground_truth.boxes.items():
        chosen = boxes[generator.integers(len(boxes), size=per_image)]
        spread = generator.choice([0.03, 0.15, 1.0], size=(per_image, 1)) * np.maximum(chosen[:, 2:3], 2.0)
        rows = chosen + generator.normal(size=(per_image, 4)) * spread
        scores = np.round(generator.random((per_image, 1)), 2)
        predictions[image_id] = np.concatenate([rows[:, :2], np.abs(rows[:, 2:]), scores], axis=1)
    return predictions


def save_ground_truth(folder: Path, ground_truth: WiderFaceGroundTruth) -> str:
    """Writes the four .mat files and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    by_event: Dict[str, List[str]] = {}
    for image_id in ground_truth.boxes:
        by_event.setdefault(image_id.partition("/")[0], []).append(image_id)

    def column(values: Sequence[Any]) -> np.ndarray:
        cells = np.empty((len(values), 1), dtype=object)
        for index, each in enumerate(values):
            cells[index, 0] = each
        return cells

    def per_image(value) -> np.ndarray:
        return column([column([value(image_id) for image_id in images]) for images in by_event.values()])

    content = {
        "event_list": column(list(by_event)),
        "file_list": per_image(lambda image_id: image_id.partition("/")[2]),
        "face_bbx_list": per_image(lambda image_id: ground_truth.boxes[image_id].astype(np.int32)),
    }
    savemat(folder / "wider_face_val.mat", content)
    for subset in SUBSETS:
        kept = ground_truth.kept[subset]
        numbers = per_image(lambda image_id: np.flatnonzero(kept[image_id]).reshape(-1, 1).astype(np.uint16) + 1)
        savemat(folder / f"wider_{subset}_val.mat", {**content, "gt_list": numbers})
    return str(folder)
