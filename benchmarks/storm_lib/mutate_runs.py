"""Run folders of somebody else, mangled, for ``report``."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

import yaml

from storm_lib.cases import ESCAPE, Command, Scene, damaged, mutation

_FILES = (
    "config.yaml",
    "metrics.json",
    "evaluation.json",
    "mimic.json",
    "last_checkpoint",
    "inference/coco_instances_results.json",
    "model_final.pth",
    "teacher_config.yaml",
)


def _copy(scene: Scene, name: str = "run") -> Path:
    folder = scene.folder / name
    shutil.copytree(scene.baseline.run, folder)
    return folder


def _report(scene: Scene, *runs: Any, names: Any = (), must: str = "either", images: int = 1) -> Command:
    options = ("--output", scene.folder / "page.html", "--images", images, "--no-latency")
    return scene.cli("report", *runs, *options, names=[*map(str, runs), *names], must=must)


def _harm(path: Path, write: Callable[[Path], Any]) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    write(path)


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


_HARMS: Dict[str, Callable[[Path], Any]] = {
    "of no byte": lambda path: path.write_bytes(b""),
    "of noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "nested 100,000 times": _deep,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a FIFO": os.mkfifo,
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "null": lambda path: path.write_text("null\n"),
    "a number": lambda path: path.write_text("1e309\n"),
    "in UTF-16": lambda path: path.write_bytes('{"a": 1}\n'.encode("utf-16")),
    "a link out of the folder": lambda path: path.symlink_to("/etc/passwd"),
}


def _register_harm(name: str, write: Callable[[Path], Any]) -> None:
    @mutation(f"run folder: a file {name}", is_random=True)
    def harmed(scene: Scene) -> Command:
        folder = _copy(scene)
        file = scene.rng.choice(_FILES)
        _harm(folder / file, write)
        return _report(scene, folder)


for _name, _write in _HARMS.items():
    _register_harm(_name, _write)


def _register_damage(how: str) -> None:
    @mutation(f"run folder: a file, {how}", is_random=True)
    def harmed(scene: Scene) -> Command:
        folder = _copy(scene)
        path = folder / scene.rng.choice([each for each in _FILES if (folder / each).is_file()])
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return _report(scene, folder)


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


def _wrong(scene: Scene, node: Any) -> None:
    """Gives a random element below a node a value of the wrong kind."""
    places = []
    stack = [node]
    while stack:
        each = stack.pop()
        for key, value in each.items() if isinstance(each, dict) else enumerate(each):
            places.append((each, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    if places:
        place, key = scene.rng.choice(places)
        place[key] = scene.rng.choice((None, "x", [], {}, -1, float("inf"), float("nan"), True, 10**400, [[]]))


@mutation("run folder: JSON with a value of the wrong kind", is_random=True)
def _wrong_json(scene: Scene) -> Command:
    folder = _copy(scene)
    names = ("metrics.json", "evaluation.json", "inference/coco_instances_results.json")
    path = folder / scene.rng.choice(names)
    lines = path.read_text().splitlines() if path.name == "metrics.json" else [path.read_text()]
    changed = []
    for line in lines:
        content = json.loads(line)
        _wrong(scene, content)
        changed.append(json.dumps(content))
    path.write_text("\n".join(changed) + "\n")
    return _report(scene, folder)


@mutation("run folder: config.yaml with a value of the wrong kind", is_random=True)
def _wrong_config(scene: Scene) -> Command:
    folder = _copy(scene)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    _wrong(scene, content)
    (folder / "config.yaml").write_text(_dumped(content))
    return _report(scene, folder)


def _dumped(content: Any) -> str:
    return yaml.safe_dump(content)


_CODE = (
    'SEED: !!python/object/apply:os.system ["touch {marker}"]\n',
    '!!python/object/apply:os.system ["touch {marker}"]\n',
    '_BASE_: !!python/object/apply:os.system ["touch {marker}"]\n',
    '_BASE_: "hostile.yaml"\n',
)


def _register_code(file: str) -> None:
    @mutation(f"run folder: {file} that runs code", is_random=True)
    def code(scene: Scene) -> Command:
        folder = _copy(scene)
        (folder / "hostile.yaml").write_text(_CODE[0].format(marker=scene.marker))
        (folder / file).write_text(scene.rng.choice(_CODE).format(marker=scene.marker))
        if file == "teacher_config.yaml":
            _name_teacher(folder, file)
        return _report(scene, folder)


def _name_teacher(folder: Path, file: str) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["MODEL"]["META_ARCHITECTURE"] = "QuantMimicRCNN"
    content["MODEL"]["QMIMIC"]["TEACHER"]["CONFIG_FILE"] = file
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


_register_code("config.yaml")
_register_code("teacher_config.yaml")


@mutation("run folder: a teacher that is Python")
def _python_teacher(scene: Scene) -> Command:
    folder = _copy(scene)
    (folder / "teacher.py").write_text(f"open({str(scene.marker)!r}, 'w').close()\nmodel = None\n")
    _name_teacher(folder, "teacher.py")
    return _report(scene, folder)


def _register_base(name: str, base: str) -> None:
    @mutation(f"run folder: config.yaml with _BASE_ {name}")
    def based(scene: Scene) -> Command:
        folder = _copy(scene)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(f'_BASE_: "{base}"\n{text}')
        return _report(scene, folder)


_register_base("of itself", "config.yaml")
_register_base("on another machine", "http://127.0.0.1:9/a.yaml")
_register_base("out of the folder", "/etc/passwd")


@mutation("run folder: weights that call a function")
def _weights(scene: Scene) -> Command:
    folder = _copy(scene)
    shell = f"touch {scene.marker}".encode()
    opcodes = b"\x80\x02cos\nsystem\nX" + len(shell).to_bytes(4, "little") + shell + b"\x85R."
    (folder / "model_final.pth").write_bytes(opcodes)
    return _report(scene, folder)


@mutation("run folder: last_checkpoint that names a file elsewhere")
def _elsewhere(scene: Scene) -> Command:
    folder = _copy(scene)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("../../../etc/passwd")
    return _report(scene, folder)


@mutation("run folder: an empty folder")
def _empty(scene: Scene) -> Command:
    folder = scene.folder / "run"
    folder.mkdir()
    return _report(scene, folder, must="refuse")


@mutation("run folder: a file in place of a folder")
def _file(scene: Scene) -> Command:
    path = scene.folder / "run"
    path.write_text("")
    return _report(scene, path, must="refuse")


@mutation("run folder: a name with markup and a terminal escape")
def _odd_name(scene: Scene) -> Command:
    folder = _copy(scene, f"<script>alert(1)<{ESCAPE}")
    return _report(scene, folder, names=["<script>"], must="either")


@mutation("run folder: one bad folder next to a good one", is_random=True)
def _beside(scene: Scene) -> Command:
    folder = _copy(scene)
    _harm(folder / scene.rng.choice(_FILES[:4]), scene.rng.choice(list(_HARMS.values())))
    return _report(scene, folder, scene.baseline.run)


@mutation("run folder: metrics of one step, 300,000 times over")
def _long(scene: Scene) -> Command:
    folder = _copy(scene)
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n' * 300_000)
    return _report(scene, folder, images=0)


@mutation("run folder: lines of metrics cut by a kill")
def _cut(scene: Scene) -> Command:
    folder = _copy(scene)
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 9, "total_lo\n\n\0\0\0\n{"iteration": "x"}\n[]\n{"iteration": -5, "total_loss": 1}')
    return _report(scene, folder, must="handle")
