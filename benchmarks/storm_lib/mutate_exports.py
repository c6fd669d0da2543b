"""Exported files (ONNX, TorchScript, Detectron2's form) that are damaged, hostile, or describe themselves wrongly."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import onnx

from storm_lib.cases import Command, Scene, damaged, mutation

_KEY = "qmimic_d2.json"


def _predict(scene: Scene, model: Path, must: str = "either") -> Command:
    return scene.predict(scene.image(), names=[model.name], must=must, model=model)


def _register_damage(how: str, ending: str) -> None:
    @mutation(f"ONNX: {ending}, {how}", is_random=True)
    def harmed(scene: Scene) -> Command:
        path = scene.folder / f"mutated{ending}"
        path.write_bytes(damaged((scene.baseline.exported / f"model{ending}").read_bytes(), scene.rng, how))
        return _predict(scene, path)


for _how in ("truncated", "bit flips", "noise"):
    for _ending in (".onnx", ".ts"):
        _register_damage(_how, _ending)


def _register_description(name: str, change: Callable[[Dict[str, Any]], Any], must: str = "refuse") -> None:
    def described(text: str) -> str:
        content = json.loads(text)
        changed = change(content)
        return changed if isinstance(changed, str) else json.dumps(content)

    @mutation(f"ONNX: a description with {name}")
    def in_onnx(scene: Scene) -> Command:
        path = scene.folder / "mutated.onnx"
        model = onnx.load(scene.baseline.exported / "model.onnx")
        for entry in model.metadata_props:
            if entry.key == _KEY:
                entry.value = described(entry.value)
        onnx.save(model, path)
        return _predict(scene, path, must)

    @mutation(f"ONNX: TorchScript, a description with {name}")
    def in_torchscript(scene: Scene) -> Command:
        path = scene.folder / "mutated.ts"
        source = scene.baseline.exported / "model.ts"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
            for each in old.namelist():
                content = old.read(each)
                new.writestr(each, described(content.decode()) if each.endswith(_KEY) else content)
        return _predict(scene, path, must)


def _set(*keys: Any, value: Any) -> Callable[[Dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


for _name, _change in (
    ("no word", lambda content: ""),
    ("half of its text", lambda content: json.dumps(content)[:200]),
    ("a list", lambda content: "[]"),
    ("100,000 brackets", lambda content: "[" * 100_000),
    ("1e309 for a threshold", lambda content: json.dumps({**content, "score_threshold": 7}).replace("7", "1e309", 1)),
    ("text for a threshold", _set("score_threshold", value="high")),
    ("null for classes", _set("classes", value=None)),
    ("classes that are text", _set("classes", value="cat")),
    ("a class without an id", _set("classes", 0, value={"name": "x"})),
    ("fewer classes than the network", _set("classes", value=[{"id": 1, "name": "one"}])),
    ("an id of null", _set("classes", 0, "id", value=None)),
    ("an id of 1e309", _set("classes", 0, "id", value=float("inf"))),
    ("a size that is text", _set("preprocessing", "min_size", value="64")),
    ("a negative size", _set("preprocessing", "min_size", value=-64)),
    ("an unknown format", _set("preprocessing", "format", value="XYZ")),
    ("no preprocessing", _set("preprocessing", value=None)),
    ("another version", _set("version", value="9")),
    ("a source that is a number", _set("source", value=5)),
):
    _register_description(_name, _change)


def _register_network(name: str, change: Callable[[onnx.ModelProto, Scene], Any], must: str = "refuse") -> None:
    @mutation(f"ONNX: {name}")
    def network(scene: Scene) -> Command:
        path = scene.folder / "mutated.onnx"
        model = onnx.load(scene.baseline.exported / "model.onnx")
        change(model, scene)
        path.write_bytes(model.SerializeToString())
        return _predict(scene, path, must)


def _no_metadata(model: onnx.ModelProto, scene: Scene) -> None:
    del model.metadata_props[:]


def _other_input(model: onnx.ModelProto, scene: Scene) -> None:
    model.graph.input[0].name = "pixels"


def _no_output(model: onnx.ModelProto, scene: Scene) -> None:
    del model.graph.output[:]


def _outside_data(model: onnx.ModelProto, scene: Scene) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../etc/passwd"), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)


def _huge_weights(model: onnx.ModelProto, scene: Scene) -> None:
    model.graph.initializer[0].dims[:] = [2**40]


def _unknown_operator(model: onnx.ModelProto, scene: Scene) -> None:
    scene.rng.choice(model.graph.node).op_type = "RunShell"


for _name, _change in (
    ("no description", _no_metadata),
    ("an input of another name", _other_input),
    ("no output", _no_output),
    ("weights in a file elsewhere", _outside_data),
    ("weights of 2^40 numbers", _huge_weights),
    ("an unknown operator", _unknown_operator),
    ("no node", lambda model, scene: model.graph.ClearField("node")),
    ("a version of the far future", lambda model, scene: setattr(model, "ir_version", 9999)),
):
    _register_network(_name, _change)

_FILES = {"no byte": b"", "text": b"no model\n", "noise": bytes(range(256)) * 40, "a zip": b"PK\x05\x06" + bytes(18)}


def _register_file(name: str, content: bytes, ending: str) -> None:
    @mutation(f"ONNX: {ending} that is {name}")
    def given(scene: Scene) -> Command:
        path = scene.folder / f"mutated{ending}"
        path.write_bytes(content)
        return _predict(scene, path, "refuse")


for _name, _content in _FILES.items():
    for _ending in (".onnx", ".ts", ".yaml"):
        _register_file(_name, _content, _ending)


@mutation("ONNX: a FIFO that nobody writes to")
def _fifo(scene: Scene) -> Command:
    path = scene.folder / "mutated.onnx"
    os.mkfifo(path)
    return _predict(scene, path, "refuse")


@mutation("ONNX: TorchScript that calls a function when it is read")
def _hostile_torchscript(scene: Scene) -> Command:
    path = scene.folder / "mutated.ts"
    call = b"cos\nsystem\n(X" + len(f"touch {scene.marker}").to_bytes(4, "little") + f"touch {scene.marker}".encode()
    source = scene.baseline.exported / "model.ts"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for each in old.namelist():
            new.writestr(each, b"\x80\x02" + call + b"tR." if each.endswith("/data.pkl") else old.read(each))
    return _predict(scene, path, "refuse")


def _register_form(name: str, file: str, content: bytes, must: str) -> None:
    @mutation(f"ONNX: Detectron2's form, {name}")
    def form(scene: Scene) -> Command:
        folder = scene.folder / "exported"
        shutil.copytree(scene.baseline.exported, folder)
        (folder / file).write_bytes(content.replace(b"MARKER", str(scene.marker).encode()))
        command = _predict(scene, folder / "config.yaml", must)
        command.names.append(file)
        return command


_register_form(
    "YAML that runs code", "config.yaml", b'SEED: !!python/object/apply:os.system ["touch MARKER"]', "refuse"
)
_register_form("weights of no byte", "model.pth", b"", "either")  # config.yaml may name others
_register_form("labels of no byte", "labels.json", b"", "either")
_register_form("labels of noise", "labels.json", bytes(range(256)), "either")
_register_form("labels nested 100,000 times", "labels.json", b"[" * 100_000, "either")
