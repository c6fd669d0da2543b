"""A tiny data set in COCO's format, made in a test's folder and registered under a name of its own."""

import contextlib
import json
from pathlib import Path
from typing import Iterator, List

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

CATEGORY_IDS = (3, 5, 9)


def write_images(folder: Path, count: int, height: int = 64, width: int = 64) -> List[str]:
    """Random images ``0.jpg``, ``1.jpg`` and so on; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [str(folder / f"{index}.jpg") for index in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


@contextlib.contextmanager
def registered(folder: Path, name: str) -> Iterator[None]:
    """Registers ``annotations.json`` and ``images`` of a folder under a name while the block runs."""
    register_coco_instances(name, {}, str(folder / "annotations.json"), str(folder / "images"))
    try:
        yield
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@contextlib.contextmanager
def registered_coco(folder: Path, count: int = 4, name: str = "tiny_coco") -> Iterator[str]:
    """
    Registers ``count`` images of 64 x 64 with one object each while the block runs; yields the name.

    Image i has the id 10 + i, and its box is [8, 8, 24, 32] (XYWH) of the class i modulo 3.
    """
    paths = write_images(folder / "images", count)
    content = {
        "info": {},
        "images": [
            {"id": 10 + index, "file_name": Path(path).name, "width": 64, "height": 64}
            for index, path in enumerate(paths)
        ],
        "annotations": [
            {
                "id": 1 + index,
                "image_id": 10 + index,
                "category_id": CATEGORY_IDS[index % 3],
                "bbox": [8.0, 8.0, 24.0, 32.0],
                "area": 768.0,
                "iscrowd": 0,
            }
            for index in range(count)
        ],
        "categories": [{"id": each, "name": f"class {each}"} for each in CATEGORY_IDS],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    with registered(folder, name):
        yield name
