"""Data sets in Pascal VOC's layout, as users write them: other tools' dialects, mistakes, hostile XML."""

import re
import shutil
from pathlib import Path
from typing import Any, Callable

from storm_lib.baseline import CLASSES
from storm_lib.cases import Command, Scene, damaged, mutation

_NAME = "storm_voc"


def _command(scene: Scene, folder: Path, names: Any, must: str) -> Command:
    pairs = ("DATASETS.TRAIN", f"('{_NAME}',)", "DATASETS.TEST", f"('{_NAME}',)", "SOLVER.MAX_ITER", 2)
    voc = [[_NAME, str(folder), "train", *CLASSES]]
    return scene.train(*pairs, names=[*names, "train.txt", "DATASETS.TRAIN"], must=must, datasets=[], voc=voc)


def _copy(scene: Scene) -> Path:
    folder = scene.folder / "VOC2007"
    shutil.copytree(scene.baseline.voc, folder)
    return folder


def _register_text(name: str, change: Callable[[str], str], must: str, everywhere: bool = False) -> None:
    @mutation(f"VOC: {name}")
    def changed(scene: Scene) -> Command:
        folder = _copy(scene)
        files = sorted((folder / "Annotations").glob("*.xml"))
        # with an object in it
        files = [path for path in files if "<object>" in path.read_text()]
        chosen = files if everywhere else [scene.rng.choice(files)]
        for path in chosen:
            path.write_text(change(path.read_text()))
        return _command(scene, folder, [path.name for path in chosen], must)


def _sub(pattern: str, new: str, count: int = 1) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, lambda match: new, text, count=count, flags=re.DOTALL)


_BOX = r"<bndbox>.*?</bndbox>"
_ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))

for _name, _change, _must, _everywhere in (
    ("no difficult", _sub("<difficult>.*?</difficult>", "", 0), "handle", True),
    ("no truncated, no pose", _sub("<(truncated|pose)>.*?</(truncated|pose)>", "", 0), "handle", True),
    ("float coordinates", lambda text: re.sub(r"<(x|y)(min|max)>(\d+)<", r"<\1\2>\3.5<", text), "handle", True),
    ("no size", _sub("<size>.*?</size>", ""), "either", False),
    ("a size of 0", _sub("<width>.*?</width>", "<width>0</width>"), "either", False),
    ("a size that is not the image's", _sub("<width>.*?</width>", "<width>77</width>"), "refuse", False),
    ("a size that is text", _sub("<width>.*?</width>", "<width>wide</width>"), "either", False),
    ("a class that is not declared", _sub("<name>.*?</name>", "<name>dragon</name>"), "refuse", False),
    ("a class without a name", _sub("<name>.*?</name>", ""), "refuse", False),
    ("a class name with a slash", _sub("<name>.*?</name>", "<name>a/b</name>"), "refuse", False),
    ("no box", _sub(_BOX, ""), "refuse", False),
    ("a box without xmax", _sub("<xmax>.*?</xmax>", ""), "refuse", False),
    ("a box of NaN", _sub("<xmin>.*?</xmin>", "<xmin>nan</xmin>"), "refuse", False),
    ("a box of text", _sub("<xmin>.*?</xmin>", "<xmin>left</xmin>"), "refuse", False),
    ("an empty coordinate", _sub("<xmin>.*?</xmin>", "<xmin/>"), "refuse", False),
    ("a box turned round", _sub("<xmin>.*?</xmin>", "<xmin>120</xmin>"), "either", False),
    ("difficult that is text", _sub("<difficult>.*?</difficult>", "<difficult>no</difficult>"), "either", False),
    ("XML of no byte", lambda text: "", "refuse", False),
    ("XML cut in the middle", lambda text: text[: len(text) // 2], "refuse", False),
    ("XML nested 100,000 times", lambda text: "<a>" * 100_000 + "</a>" * 100_000, "either", False),
    ("XML with another root", lambda text: "<html><body/></html>", "either", False),
    (
        "entities that multiply",
        lambda text: f'<!DOCTYPE a [<!ENTITY e0 "0123456789">{_ENTITIES}]>' + text.replace("<object>", "&e9;<object>"),
        "either",
        False,
    ),
    (
        "an entity that reads a file",
        lambda text: (
            '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
            + re.sub("<name>.*?</name>", "<name>&e;</name>", text, count=1)
        ),
        "refuse",
        False,
    ),
):
    _register_text(_name, _change, _must, _everywhere)


def _register_list(name: str, change: Callable[[str], Any], must: str) -> None:
    @mutation(f"VOC: a list {name}")
    def listed(scene: Scene) -> Command:
        folder = _copy(scene)
        path = folder / "ImageSets" / "Main" / "train.txt"
        text = change(path.read_text())
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return _command(scene, folder, [], must)


for _name, _change, _must in (
    ("with blank lines", lambda text: "\n" + text.replace("\n", "\n\n") + "  \n", "handle"),
    ("of one line", lambda text: text.splitlines()[0], "handle"),
    ("with Windows' line ends", lambda text: text.replace("\n", "\r\n"), "handle"),
    ("with a second column", lambda text: text.replace("\n", " 1\n"), "either"),
    ("of no byte", lambda text: "", "refuse"),
    ("of blanks", lambda text: "\n \n", "refuse"),
    ("with an image that is not there", lambda text: text + "nowhere\n", "refuse"),
    ("with an image twice", lambda text: text + text, "refuse"),
    ("with paths", lambda text: text.replace("0000", "../0000"), "refuse"),
    ("of noise", lambda text: bytes(range(256)), "refuse"),
    ("in UTF-16", lambda text: text.encode("utf-16"), "refuse"),
):
    _register_list(_name, _change, _must)


def _register_damage(how: str) -> None:
    @mutation(f"VOC: XML, {how}", is_random=True)
    def harmed(scene: Scene) -> Command:
        folder = _copy(scene)
        path = scene.rng.choice(sorted((folder / "Annotations").glob("*.xml")))
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return _command(scene, folder, [path.name], "either")


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


@mutation("VOC: images that end with .JPG")
def _capitals(scene: Scene) -> Command:
    folder = _copy(scene)
    for path in (folder / "JPEGImages").iterdir():
        path.rename(path.with_suffix(".JPG"))
    return _command(scene, folder, [".jpg", ".JPG"], "either")


@mutation("VOC: an image without its XML")
def _no_xml(scene: Scene) -> Command:
    folder = _copy(scene)
    path = sorted((folder / "Annotations").glob("*.xml"))[2]
    path.unlink()
    return _command(scene, folder, [path.name], "refuse")


@mutation("VOC: a test set of other classes")
def _other_classes(scene: Scene) -> Command:
    command = _command(scene, scene.baseline.voc, ["DATASETS.TEST"], "refuse")
    other = ["storm_voc_other", str(scene.baseline.voc), "train", *reversed(CLASSES)]
    command.voc.append(other)
    place = command.arguments.index("DATASETS.TEST") + 1
    command.arguments[place] = "('storm_voc_other',)"
    return command
