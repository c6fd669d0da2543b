"""Configs that run code, never end, are damaged, or hold values of the wrong kind."""

import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import yaml

from storm_lib.cases import Command, Scene, damaged, mutation

# Keys that say how long a training is, and where it writes: other values are no fault.
_LEFT_ALONE = ("SOLVER.MAX_ITER", "OUTPUT_DIR", "VERSION", "SEED")
_WRONG = (-1, 0, 1.5, True, None, "wrong", "", [], [-1], ["a"], {}, {"A": 1}, float("nan"), float("inf"))

_TAGS = (
    '!!python/object/apply:os.system ["touch {marker}"]',
    '!!python/object/apply:subprocess.check_output [["touch", "{marker}"]]',
    "!!python/object/apply:eval [\"__import__('os').system('touch {marker}')\"]",
    '!!python/object/new:os.system ["touch {marker}"]',
    '!!python/object/new:type {{args: ["z", !!python/tuple [], {{"extend": !!python/name:exec }}], '
    "listitems: \"__import__('os').system('touch {marker}')\"}}",
    "!!python/object/apply:builtins.exec [\"__import__('os').system('touch {marker}')\"]",
    '!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{marker}"]]',
)


def _written(scene: Scene, content: Any, name: str = "mutated.yaml") -> Path:
    path = scene.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _tagged(scene: Scene) -> str:
    """A config with code in one of its values."""
    tag = scene.rng.choice(_TAGS).format(marker=scene.marker)
    return scene.rng.choice(
        (f"MODEL:\n  WEIGHTS: {tag}\n", f"OUTPUT_DIR: {tag}\n", f"SEED: {tag}\n", f"? {tag}\n: 1\n", f"{tag}\n")
    )


def _flat(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(scene: Scene) -> List[str]:
    """A refusal names the file, or a key."""
    keys = [key for key, _ in _flat(yaml.safe_load(scene.baseline.plain.read_text()))]
    return ["mutated.yaml", "config key", *keys]


def _train(scene: Scene, content: Any, must: str = "either") -> Command:
    path = _written(scene, content)
    return scene.train("SOLVER.MAX_ITER", 2, names=_names(scene), must=must, config=path)


@mutation("config: YAML that runs code, train_net.py", is_random=True)
def _code(scene: Scene) -> Command:
    return _train(scene, _tagged(scene), must="refuse")


@mutation("config: YAML that runs code, through _BASE_", is_random=True)
def _code_of_base(scene: Scene) -> Command:
    _written(scene, _tagged(scene), "hostile.yaml")
    _written(scene, "_BASE_: hostile.yaml\n", "middle.yaml")
    command = _train(scene, "_BASE_: middle.yaml\n", must="refuse")
    command.names.append("hostile.yaml")
    return command


@mutation("config: YAML that runs code, for _BASE_", is_random=True)
def _code_for_base(scene: Scene) -> Command:
    tag = scene.rng.choice(_TAGS).format(marker=scene.marker)
    return _train(scene, f"_BASE_: {tag}\n", must="refuse")


@mutation("config: YAML that runs code, the teacher's", is_random=True)
def _code_of_teacher(scene: Scene) -> Command:
    path = _written(scene, _tagged(scene))
    return scene.train(
        *("MODEL.QMIMIC.TEACHER.CONFIG_FILE", path), names=[path.name], must="refuse", config=scene.baseline.student
    )


def _register_command(name: str, *arguments: Any) -> None:
    @mutation(f"config: YAML that runs code, {name}", is_random=True)
    def command(scene: Scene) -> Command:
        path = _written(scene, _tagged(scene))
        pairs = ["--config-file", path, "--weights", scene.baseline.weights, "--device", "cpu"]
        places = {"IMAGE": scene.image(), "OUT": scene.folder / "output"}
        given = [places.get(each, each) for each in arguments]
        return scene.cli(name, *given, *pairs, names=[path.name], must="refuse")


_register_command("predict", "--input", "IMAGE", "--output", "OUT")
_register_command("export", "--format", "detectron2", "--output", "OUT")
_register_command("calibrate", "--num-images", "2")


@mutation("config: KEY VALUE pairs that hold code", is_random=True)
def _code_in_pairs(scene: Scene) -> Command:
    code = f"__import__('os').system('touch {scene.marker}')"
    key = scene.rng.choice(("MODEL.WEIGHTS", "INPUT.MIN_SIZE_TRAIN", "SOLVER.STEPS", "DATASETS.TRAIN", "SEED"))
    value = scene.rng.choice((code, f"({code},)", f"[{code}]", f'!!python/object/apply:eval ["{code}"]'))
    return scene.train(key, value, names=[key, value, code], must="refuse")


def _register_damage(how: str) -> None:
    @mutation(f"config: {how}", is_random=True)
    def config(scene: Scene) -> Command:
        return _train(scene, damaged(scene.baseline.plain.read_bytes(), scene.rng, how))

    @mutation(f"config: the teacher's, {how}", is_random=True)
    def teacher(scene: Scene) -> Command:
        good = Path(yaml.safe_load(scene.baseline.student.read_text())["MODEL"]["QMIMIC"]["TEACHER"]["CONFIG_FILE"])
        path = _written(scene, damaged(good.read_bytes(), scene.rng, how))
        pairs = ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", path, "SOLVER.MAX_ITER", 2)
        command = scene.train(*pairs, names=_names(scene), config=scene.baseline.student)
        command.names += ["TEACHER.WEIGHTS", "teacher.pth"]
        return command


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


@mutation("config: a value of the wrong kind", is_random=True)
def _wrong_value(scene: Scene) -> Command:
    content = yaml.safe_load(scene.baseline.plain.read_text())
    key, _ = scene.rng.choice([each for each in _flat(content) if each[0] not in _LEFT_ALONE])
    *nodes, last = key.split(".")
    node = content
    for each in nodes:
        node = node[each]
    node[last] = scene.rng.choice(_WRONG)
    command = _train(scene, yaml.safe_dump(content))
    command.names.append(last)
    return command


@mutation("config: a node in place of a value, or the reverse", is_random=True)
def _wrong_node(scene: Scene) -> Command:
    content = yaml.safe_load(scene.baseline.plain.read_text())
    name = scene.rng.choice([key for key, value in content.items() if isinstance(value, dict)])
    content[name] = scene.rng.choice(_WRONG)
    command = _train(scene, yaml.safe_dump(content))
    command.names.append(name)
    return command


_TEXTS: Dict[str, Any] = {
    "of no byte": b"",
    "that is a list": "- 1\n- 2\n",
    "that is one word": "word\n",
    "that is null": "null\n",
    "with tabs": "MODEL:\n\tWEIGHTS: a\n",
    "in UTF-16": "SEED: 1\n".encode("utf-16"),
    "with NUL": b"SEED: 1\0\n",
    "in Latin-1": "OUTPUT_DIR: \xe9\n".encode("latin-1"),
    "of two documents": "SEED: 1\n---\nSEED: 2\n",
    "nested 3,000 times, in braces": "{a: " * 3000 + "1" + "}" * 3000,
    "nested 3,000 times, in brackets": "SEED: " + "[" * 3000 + "]" * 3000,
    "nested 1,000 times, in lines": "\n".join(" " * depth + "a:" for depth in range(1000)) + " 1\n",
    "with an alias to itself": "MODEL: &a\n  WEIGHTS: *a\n",
    "with a node in itself": "&a\nMODEL: *a\n",
    "with an unknown alias": "SEED: *nothing\n",
    "with an unknown tag": "SEED: !nothing 1\n",
    "with a key that is a list": "? [1, 2]\n: 3\n",
    "with a number as key": "1: 2\n",
    "with a number of 5,000 digits": "SEED: " + "9" * 5000 + "\n",
    "with 1e309": "SOLVER:\n  BASE_LR: 1.0e+309\n",
    "with sets and dates": "SEED: 2001-01-01\nMODEL: !!set {a}\n",
    "with a byte string": "MODEL:\n  WEIGHTS: !!binary aGVsbG8=\n",
    "with a web page": "<!DOCTYPE html><html></html>\n",
    "with JSON of another tool": '{"model": {"type": "FasterRCNN"}}\n',
}


def _register_text(name: str, content: Any) -> None:
    @mutation(f"config: YAML {name}")
    def text(scene: Scene) -> Command:
        return _train(scene, content)


for _name, _content in _TEXTS.items():
    _register_text(_name, _content)


@mutation("config: aliases that multiply")
def _aliases(scene: Scene) -> Command:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return _train(scene, "\n".join([*lines, "MODEL:", "  WEIGHTS: *a11", ""]), must="refuse")


@mutation("config: merge keys that multiply")
def _merges(scene: Scene) -> Command:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 8)}]}}" for n in range(1, 10)]
    return _train(scene, "\n".join([*lines, ""]), must="refuse")


_BASES = {
    "of itself": "mutated.yaml",
    "that is not there": "nowhere.yaml",
    "that is a folder": ".",
    "that is a number": "5",
    "that is a list": "[a, b]",
    "that is null": "null",
    "on another machine": "http://127.0.0.1:9/evil.yaml",
    "of a strange scheme": "detectron2://nothing/evil.yaml",
}


def _register_base(name: str, base: str) -> None:
    @mutation(f"config: _BASE_ {name}")
    def based(scene: Scene) -> Command:
        command = _train(scene, f"_BASE_: {base}\nSEED: 1\n", must="either")
        command.names += ["_BASE_", base]
        return command


for _name, _base in _BASES.items():
    _register_base(_name, _base)


@mutation("config: _BASE_ in a circle")
def _circle(scene: Scene) -> Command:
    for number in range(3):
        _written(scene, f"_BASE_: circle{(number + 1) % 3}.yaml\n", f"circle{number}.yaml")
    command = _train(scene, "_BASE_: circle0.yaml\n", must="refuse")
    command.names.append("circle")
    return command


@mutation("config: _BASE_ of 1,200 files")
def _chain(scene: Scene) -> Command:
    for number in range(1200):
        _written(scene, f"_BASE_: chain{number + 1}.yaml\n", f"chain{number}.yaml")
    _written(scene, scene.baseline.plain.read_bytes(), "chain1200.yaml")
    command = _train(scene, "_BASE_: chain0.yaml\n")
    command.names.append("chain")
    return command


@mutation("config: a FIFO that nobody writes to")
def _fifo(scene: Scene) -> Command:
    path = scene.folder / "mutated.yaml"
    os.mkfifo(path)
    return scene.train(names=[path.name], must="refuse", config=path)


_SETTINGS = (
    "SOLVER.CHECKPOINT_PERIOD 0",
    "SOLVER.CHECKPOINT_PERIOD -5",
    "TEST.EVAL_PERIOD -3",
    "DATALOADER.NUM_WORKERS -1",
    "SEED 4294967296",
    "INPUT.MIN_SIZE_TRAIN ()",
    "INPUT.MIN_SIZE_TRAIN (0,)",
    "INPUT.MIN_SIZE_TEST -1",
    "INPUT.MAX_SIZE_TRAIN 0",
    "INPUT.RANDOM_FLIP diagonal",
    "INPUT.CROP.TYPE wrong INPUT.CROP.ENABLED True",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING wrong",
    "INPUT.FORMAT XYZ",
    "MODEL.DEVICE wrong",
    "MODEL.PIXEL_STD [0.0,0.0,0.0]",
    "MODEL.PIXEL_MEAN [1.0]",
    "MODEL.RPN.IOU_THRESHOLDS [0.7]",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS []",
    "TEST.EXPECTED_RESULTS [['bbox','AP']]",
    "TEST.DETECTIONS_PER_IMAGE -1",
    "MODEL.ANCHOR_GENERATOR.SIZES [[]]",
    "SOLVER.LR_SCHEDULER_NAME wrong",
    "SOLVER.BASE_LR nan",
)


def _register_setting(text: str) -> None:
    pairs = text.split()

    @mutation(f"config: {text}")
    def setting(scene: Scene) -> Command:
        return scene.train("SOLVER.MAX_ITER", 2, *pairs, names=[pairs[0], pairs[0].rpartition(".")[2]])


for _text in _SETTINGS:
    _register_setting(_text)


_FOLDERS = {
    "a file": "file",
    "below a file": "file/below",
    "a FIFO": "fifo",
    "of a name too long": "n" * 300,
    "where nobody may write": "/proc/storm",
    "with a terminal escape": "a\x1b]0;storm\x07b",
    "of odd characters": "a b'\"$(touch x);\u00e9\u4e2d",
}


def _register_folder(name: str, place: str) -> None:
    @mutation(f"config: OUTPUT_DIR {name}")
    def folder(scene: Scene) -> Command:
        (scene.folder / "file").write_text("")
        os.mkfifo(scene.folder / "fifo")
        path = os.path.join(scene.folder, place)
        return scene.train("OUTPUT_DIR", path, "SOLVER.MAX_ITER", 2, names=["OUTPUT_DIR", path])


for _name, _place in _FOLDERS.items():
    _register_folder(_name, _place)
