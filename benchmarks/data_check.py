#!/usr/bin/env python
"""
How long the check of the data takes that a training begins with.

    python benchmarks/data_check.py [--annotations 100000] [--per-image 7] [--json FILE]

The data set is made up: COCO's format, images of 640 x 480 as links to a few files, once as it should be and once
without iscrowd, area, id and info, which are repaired. The files are in the page cache; a cold or a distant disk adds
what it takes to open every image. docs/training.md holds the last result.
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qmimic_d2.data.loading import load_dataset  # noqa: E402
from qmimic_d2.engine.checks.data import check_datasets  # noqa: E402
from qmimic_d2.files import check_writable, write_json  # noqa: E402

WIDTH, HEIGHT = 640, 480
NUM_FILES = 20
NUM_CLASSES = 80


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measures and prints; writes the same to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, default=100000)
    parser.add_argument("--per-image", type=int, default=7, help="annotations; COCO's training set has 7")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json, "--json")
    report = measure(args.annotations, args.per_image)
    print(f"{report['annotations']} annotations, {report['images']} images")
    rows = [(step, *seconds) for step, seconds in report["seconds"].items()]
    print(tabulate(rows, headers=["step", "CPU seconds", "wall seconds"], floatfmt=".1f"))
    if args.json:
        write_json(args.json, report)


def measure(num_annotations: int, per_image: int) -> Dict[str, Any]:
    """CPU and wall seconds of the check, and of Detectron2's loading for comparison."""
    num_images = max(num_annotations // per_image, 1)
    seconds: Dict[str, Tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
        for kind, is_whole in (("whole", True), ("repaired", False)):
            name = f"data_check_{kind}"
            write_data(Path(folder) / kind, num_images, num_annotations, is_whole)
            register_coco_instances(
                name, {}, os.path.join(folder, kind, "annotations.json"), os.path.join(folder, kind, "images")
            )
            logging.disable(logging.WARNING)  # the repairs are no news here
            cfg = get_cfg()
            cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
            seconds[f"check, {kind}"] = timed(check_datasets, cfg)
            seconds[f"Detectron2's loading, {kind}"] = timed(load_dataset, name)
            logging.disable(logging.NOTSET)
    return {"annotations": num_annotations, "images": num_images, "seconds": seconds}


def timed(function, *arguments) -> Tuple[float, float]:
    """CPU time and wall time of a call."""
    start = time.process_time(), time.perf_counter()
    function(*arguments)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def write_data(folder: Path, num_images: int, num_annotations: int, is_whole: bool) -> None:
    """``annotations.json`` and ``images``."""
    (folder / "images").mkdir(parents=True)
    generator = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for index in range(min(NUM_FILES, num_images)):
        Image.fromarray(np.roll(pixels, index)).save(folder / "images" / f"{index}.jpg")
    for index in range(NUM_FILES, num_images):
        os.link(folder / "images" / f"{index % NUM_FILES}.jpg", folder / "images" / f"{index}.jpg")
    annotations = []
    for index in range(num_annotations):
        width, height = generator.uniform(4, 200), generator.uniform(4, 200)
        box = [generator.uniform(0, WIDTH - width), generator.uniform(0, HEIGHT - height), width, height]
        annotation = {
            "image_id": index % num_images,
            "category_id": 1 + index % NUM_CLASSES,
            "bbox": box,
            "segmentation": [[box[0], box[1], box[0] + width, box[1], box[0] + width, box[1] + height]],
        }
        if is_whole:
            annotation.update(id=index + 1, iscrowd=0, area=width * height)
        annotations.append(annotation)
    content = {
        "images": [
            {"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT} for index in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": 1 + index, "name": f"class {index}"} for index in range(NUM_CLASSES)],
    }
    if is_whole:
        content["info"] = {}
    (folder / "annotations.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
