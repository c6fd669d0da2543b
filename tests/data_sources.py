"""The same small data set in the formats of COCO, Pascal VOC and YOLO."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CLASSES = ["cat", "dog"]
# By split and image: size, then (class, x0, y0, x1, y1) in pixels.
IMAGES = {
    "train": {
        "a": ((64, 48), [("dog", 8.0, 4.0, 40.0, 36.0), ("cat", 0.0, 0.0, 16.0, 12.0)]),
        "b": ((48, 64), [("cat", 12.0, 16.0, 36.0, 64.0)]),
        "c": ((32, 32), []),
    },
    "val": {"d": ((64, 64), [("dog", 16.0, 16.0, 48.0, 48.0)])},
}


def write_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_yolo(folder):
    for split, images in IMAGES.items():
        for name, (size, objects) in images.items():
            write_image(folder / "images" / split / f"{name}.png", size)
            lines = []
            for label, x0, y0, x1, y1 in objects:
                box = ((x0 + x1) / 2 / size[0], (y0 + y1) / 2 / size[1], (x1 - x0) / size[0], (y1 - y0) / size[1])
                lines.append(" ".join(map(str, (CLASSES.index(label), *box))))
            if lines:
                labels = folder / "labels" / split / f"{name}.txt"
                labels.parent.mkdir(parents=True, exist_ok=True)
                labels.write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
    return folder / "data.yaml"


def write_voc(folder):
    for split, images in IMAGES.items():
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
        for name, (size, objects) in images.items():
            write_image(folder / "JPEGImages" / f"{name}.png", size)
            found = "".join(
                f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1:g}</xmin>"
                f"<ymin>{y0 + 1:g}</ymin><xmax>{x1:g}</xmax><ymax>{y1:g}</ymax></bndbox></object>"
                for label, x0, y0, x1, y1 in objects
            )
            xml = folder / "Annotations" / f"{name}.xml"
            xml.parent.mkdir(exist_ok=True)
            width, height = size
            sides = f"<size><width>{width}</width><height>{height}</height></size>"
            xml.write_text(f"<annotation>{sides}{found}</annotation>")
    return folder


def write_coco(folder):
    for split, images in IMAGES.items():
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
        for number, (name, (size, objects)) in enumerate(images.items()):
            write_image(folder / "photos" / f"{name}.png", size)
            image = {"id": number, "file_name": f"{name}.png", "width": size[0], "height": size[1]}
            content["images"].append(image)
            for label, x0, y0, x1, y1 in objects:
                annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0}
                annotation.update(category_id=CLASSES.index(label) + 1, bbox=[x0, y0, x1 - x0, y1 - y0])
                annotation.update(area=(x1 - x0) * (y1 - y0))
                content["annotations"].append(annotation)
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def catalogs_as_before():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
