"""Annotation files in COCO's format that are damaged, wrong, or of another tool."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

from PIL import Image

from storm_lib.baseline import DATASET
from storm_lib.cases import ESCAPE, Command, Scene, damaged, mutation

Content = Dict[str, Any]


def _command(scene: Scene, text: Any, must: str, images: Any = None, **options: Any) -> Command:
    path = scene.folder / "mutated.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    images = str(images or scene.baseline.images)
    names = [path.name, "DATASETS.TRAIN", "DATASETS.TEST", DATASET]
    return scene.train("SOLVER.MAX_ITER", 2, names=names, must=must, datasets=[[DATASET, str(path), images]], **options)


def _content(scene: Scene) -> Content:
    return json.loads(scene.baseline.annotations.read_text())


def _one(name: str, value: Any) -> Callable[[Scene, Content], None]:
    """Changes an element of a random annotation."""

    def change(scene: Scene, content: Content) -> None:
        scene.rng.choice(content["annotations"])[name] = value

    return change


def _without(part: str, name: str) -> Callable[[Scene, Content], None]:
    def change(scene: Scene, content: Content) -> None:
        del scene.rng.choice(content[part])[name]

    return change


def _every(part: str, change: Callable[[Content], Any]) -> Callable[[Scene, Content], None]:
    def change_all(scene: Scene, content: Content) -> None:
        for each in content[part]:
            change(each)

    return change_all


def _image(name: str, value: Any) -> Callable[[Scene, Content], None]:
    def change(scene: Scene, content: Content) -> None:
        scene.rng.choice(content["images"])[name] = value

    return change


def _normalized(each: Content) -> None:
    each["bbox"] = [value / 128.0 for value in each["bbox"]]


def _merged(scene: Scene, content: Content) -> None:
    """Two exports of which each counted from 1."""
    other = _content(scene)
    files = [each["file_name"] for each in other["images"]]
    for each, name in zip(other["images"], files[1:] + files[:1]):
        each["file_name"] = name
    for part in ("images", "annotations"):
        content[part] += other[part]


def _set(**values: Any) -> Callable[[Scene, Content], None]:
    return lambda scene, content: content.update(values)


def _repeated(part: str) -> Callable[[Scene, Content], None]:
    return lambda scene, content: content[part].append(dict(content[part][0]))


_CHANGES = {
    "a box that is null": (_one("bbox", None), "refuse"),
    "a box of NaN": (_one("bbox", [float("nan")] * 4), "refuse"),
    "a box of infinity": (_one("bbox", [0.0, 0.0, float("inf"), 9.0]), "refuse"),
    "a box of text": (_one("bbox", ["1", "2", "3", "4"]), "either"),
    "a box of three numbers": (_one("bbox", [1.0, 2.0, 3.0]), "refuse"),
    "a box that is a dict": (_one("bbox", {"x": 1}), "refuse"),
    "a box of negative size": (_one("bbox", [50.0, 50.0, -20.0, -20.0]), "either"),
    "a box far outside": (_one("bbox", [1e6, 1e6, 20.0, 20.0]), "either"),
    "boxes normalized to 0..1": (_every("annotations", _normalized), "refuse"),
    "an annotation without a box": (_without("annotations", "bbox"), "refuse"),
    "an annotation without a category": (_without("annotations", "category_id"), "refuse"),
    "an annotation without an image": (_without("annotations", "image_id"), "refuse"),
    "an annotation without iscrowd": (_without("annotations", "iscrowd"), "either"),
    "an annotation without area": (_without("annotations", "area"), "either"),
    "an unknown category": (_one("category_id", 999), "refuse"),
    "a category that is text": (_one("category_id", "1"), "either"),
    "an unknown image": (_one("image_id", 999_999), "either"),
    "two exports joined, image ids twice": (_merged, "refuse"),
    "an image twice": (_repeated("images"), "refuse"),
    "an annotation twice": (_repeated("annotations"), "either"),
    "a category twice": (_repeated("categories"), "refuse"),
    "no categories": (_set(categories=[]), "refuse"),
    "categories that are null": (_set(categories=None), "refuse"),
    "no images": (_set(images=[]), "refuse"),
    "no annotations": (_set(annotations=[]), "refuse"),
    "images that are a dict": (_set(images={"1": {}}), "refuse"),
    "no info": (lambda scene, content: content.pop("info", None), "handle"),
    "nothing but crowds": (_every("annotations", lambda each: each.update(iscrowd=1)), "refuse"),
    "a size that is not the image's": (_image("width", 77), "refuse"),
    "a size of 0": (_image("height", 0), "either"),
    "a size that is text": (_image("height", "128"), "either"),
    "an image file that is not there": (_image("file_name", "nowhere.jpg"), "refuse"),
    "file names with backslashes": (
        _every("images", lambda each: each.update(file_name="sub\\" + each["file_name"])), "refuse"
    ),
    "a file name that is a number": (_image("file_name", 7), "refuse"),
    "a file name that is a folder": (_image("file_name", "."), "refuse"),
    "a file name with a NUL": (_image("file_name", "a\0b.jpg"), "refuse"),
    "a file name with a terminal escape": (_image("file_name", f"{ESCAPE}.jpg"), "refuse"),
    "image ids that are text": (_every("images", lambda each: each.update(id=str(each["id"]))), "either"),
    "an image id that is a list": (_image("id", [1]), "refuse"),
    "a segmentation of noise": (_one("segmentation", [[1.0, 2.0], "x"]), "either"),
    "an RLE mask": (_one("segmentation", {"size": [128, 128], "counts": [0, 16384]}), "either"),
    "a damaged RLE mask": (_one("segmentation", {"size": [-1, 9], "counts": "\x00\xff"}), "either"),
    "a class name that is a number": (
        lambda scene, content: content["categories"][0].update(name=7), "either"
    ),
}  # fmt: skip


def _register_change(name: str, change: Callable[[Scene, Content], Any], must: str) -> None:
    @mutation(f"COCO: {name}")
    def changed(scene: Scene) -> Command:
        content = _content(scene)
        change(scene, content)
        return _command(scene, json.dumps(content), must)


for _name, (_change, _must) in _CHANGES.items():
    _register_change(_name, _change, _must)


def _leaves(node: Any) -> List[Any]:
    """(container, key) of every value below a node."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(value, (dict, list)):
            found += _leaves(value)
    return found


@mutation("COCO: a random element is of the wrong kind", is_random=True)
def _random_value(scene: Scene) -> Command:
    content = _content(scene)
    node, key = scene.rng.choice(_leaves(content))
    node[key] = scene.rng.choice((None, -1, "x", [], {}, float("nan"), 10**30, True))
    return _command(scene, json.dumps(content), "either")


@mutation("COCO: a random element is missing", is_random=True)
def _random_gap(scene: Scene) -> Command:
    content = _content(scene)
    node, key = scene.rng.choice(_leaves(content))
    del node[key]
    return _command(scene, json.dumps(content), "either")


def _register_damage(how: str) -> None:
    @mutation(f"COCO: {how}", is_random=True)
    def harmed(scene: Scene) -> Command:
        return _command(scene, damaged(scene.baseline.annotations.read_bytes(), scene.rng, how), "either")


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


_TEXTS = {
    "of no byte": b"",
    "that is a list": "[]",
    "that is null": "null",
    "nested 100,000 times": "[" * 100_000 + "]" * 100_000,
    "with a number of 10,000 digits": '{"images": ' + "9" * 10_000 + "}",
    "with 1e309": '{"info": {}, "images": [{"id": 1e309}], "annotations": [], "categories": []}',
    "in UTF-16": "{}".encode("utf-16"),
    "that is a web page": "<html></html>",
    "of another tool": '{"version": "5.0", "shapes": [], "imagePath": "a.jpg"}',
}


def _register_text(name: str, text: Any) -> None:
    @mutation(f"COCO: JSON {name}")
    def given(scene: Scene) -> Command:
        return _command(scene, text, "refuse")


for _name, _text in _TEXTS.items():
    _register_text(_name, _text)


def _register_test_set(name: str, change: Callable[[List[Any]], List[Any]]) -> None:
    @mutation(f"COCO: the test set has {name}")
    def other(scene: Scene) -> Command:
        content = _content(scene)
        names = [each["name"] for each in content["categories"]]
        ids = {each["name"]: each["id"] for each in content["categories"]}
        content["categories"] = change(content["categories"])
        new = {each["name"]: each["id"] for each in content["categories"]}
        renamed = {ids[each]: new[each] for each in names if each in new}
        content["annotations"] = [
            {**each, "category_id": renamed[each["category_id"]]}
            for each in content["annotations"]
            if each["category_id"] in renamed
        ]
        path = scene.folder / "mutated.json"
        path.write_text(json.dumps(content))
        datasets = [scene.baseline.dataset, ["storm_other", str(path), str(scene.baseline.images)]]
        pairs = ("DATASETS.TEST", "('storm_other',)", "SOLVER.MAX_ITER", 2)
        return scene.train(*pairs, names=[path.name, "DATASETS.TEST"], must="refuse", datasets=datasets)


def _reversed_ids(categories: List[Any]) -> List[Any]:
    count = len(categories)
    return [{**each, "id": count - index} for index, each in enumerate(categories)]


_register_test_set("the classes in another order", _reversed_ids)
_register_test_set("no last class", lambda categories: categories[:-1])
_register_test_set("no first class", lambda categories: categories[1:])


def _register_image(name: str, write: Callable[[Path], Any], must: str) -> None:
    @mutation(f"COCO: an image that is {name}")
    def image(scene: Scene) -> Command:
        folder = scene.folder / "images"
        shutil.copytree(scene.baseline.images, folder)
        path = folder / "000003.jpg"
        path.unlink()
        write(path)
        command = _command(scene, scene.baseline.annotations.read_bytes(), must, folder)
        command.names.append(path.name)
        return command


def _save(image: Image.Image, **options: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path, **options)


for _name, _write, _must in (
    ("of no byte", lambda path: path.write_bytes(b""), "refuse"),
    ("text", lambda path: path.write_text("no image"), "refuse"),
    ("a folder", lambda path: path.mkdir(), "refuse"),
    ("a broken link", lambda path: path.symlink_to("nowhere"), "refuse"),
    ("a FIFO", os.mkfifo, "refuse"),
    ("of another size", _save(Image.new("RGB", (64, 48))), "refuse"),
    ("grey", _save(Image.new("L", (128, 128))), "handle"),
    ("16-bit PNG", _save(Image.new("I;16", (128, 128), 4000), format="PNG"), "handle"),
    ("float TIFF", _save(Image.new("F", (128, 128), 0.5), format="TIFF"), "either"),
    ("PNG with a palette", _save(Image.new("P", (128, 128)), format="PNG"), "handle"),
    ("CMYK", _save(Image.new("CMYK", (128, 128)), format="JPEG"), "handle"),
):
    _register_image(_name, _write, _must)
