"""Checkpoints that are whole files of wrong numbers, names or states."""

from typing import Any, Callable, Dict

import numpy as np
import torch

from storm_lib.cases import Command, Scene, mutation
from storm_lib.checkpoint_files import pickled, resume, run_to_resume, saved, state_of


def _register_values(name: str, change: Callable[[torch.Tensor], torch.Tensor], must: str) -> None:
    def changed(scene: Scene, state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        weights = [key for key, value in state.items() if value.is_floating_point() and key.endswith("weight")]
        key = scene.rng.choice(weights)
        return {**state, key: change(state[key])}

    @mutation(f"checkpoint: {name} among the weights", is_random=True)
    def evaluated(scene: Scene) -> Command:
        return scene.evaluate(saved(scene, {"model": changed(scene, state_of(scene))}), must=must)

    @mutation(f"checkpoint: {name} among the weights of the teacher")
    def teacher(scene: Scene) -> Command:
        content = torch.load(scene.baseline.teacher_weights, weights_only=True)["model"]
        state = dict(content)
        for key, value in content.items():
            if key.startswith("backbone.") and key.endswith("weight"):
                state[key] = change(value)
        path = saved(scene, {"model": state})
        return scene.train(
            *("MODEL.QMIMIC.TEACHER.WEIGHTS", path, "SOLVER.MAX_ITER", 2),
            names=[path.name],
            must=must,
            config=scene.baseline.student,
        )

    @mutation(f"checkpoint: {name} among the weights that are resumed")
    def resumed(scene: Scene) -> Command:
        path = run_to_resume(scene) / "model_0000001.pth"
        content = torch.load(path, weights_only=True)
        content["model"] = changed(scene, content["model"])
        torch.save(content, path)
        return resume(scene, path.name, must=must)


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


for _name, _change, _must in (
    ("NaN", _with(float("nan")), "refuse"),
    ("infinity", _with(float("inf")), "refuse"),
    ("int8", lambda tensor: (tensor * 10).to(torch.int8), "refuse"),
    ("int64", lambda tensor: tensor.to(torch.int64), "refuse"),
    ("bool", lambda tensor: tensor > 0, "refuse"),
    ("complex numbers", lambda tensor: tensor.to(torch.complex64), "refuse"),
    ("float16", lambda tensor: tensor.half(), "either"),
    ("another shape", lambda tensor: tensor[None], "refuse"),
):
    _register_values(_name, _change, _must)


_CONTENTS = {
    "an empty dict": {},
    "a list": [1, 2, 3],
    "None": None,
    "a model that is None": {"model": None},
    "a model that is text": {"model": "weights"},
    "a model of lists": {"model": {"backbone.conv1.conv1.weight": [[1.0]]}},
    "names that are numbers": {"model": {1: torch.zeros(1)}},
    "names of another model": {"model": {"something.weight": torch.zeros(3)}},
}


def _register_content(name: str, content: Any) -> None:
    @mutation(f"checkpoint: .pth that holds {name}")
    def held(scene: Scene) -> Command:
        return scene.evaluate(saved(scene, content), must="refuse")


for _name, _content in _CONTENTS.items():
    _register_content(_name, _content)


@mutation("checkpoint: NumPy scalars beside the weights")
def _numpy_scalars(scene: Scene) -> Command:
    content = {"model": state_of(scene), "best": np.float64(0.5), "iteration": np.int64(3)}
    return scene.evaluate(saved(scene, content), must="handle")


@mutation("checkpoint: arrays of objects")
def _object_arrays(scene: Scene) -> Command:
    return scene.evaluate(pickled(scene, {"model": {"w": np.array([1, "a", None], dtype=object)}}), must="refuse")


def _register_state(name: str, change: Callable[[Dict[str, Any]], Any], must: str = "either") -> None:
    @mutation(f"checkpoint: resumed, {name}")
    def resumed(scene: Scene) -> Command:
        path = run_to_resume(scene) / "model_0000001.pth"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return resume(scene, path.name, must=must)


def _spoil_optimizer(content: Dict[str, Any]) -> None:
    for state in content["trainer"]["_trainer"]["optimizer"]["state"].values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                value.fill_(float("nan"))


for _name, _change, _must in (
    ("without the trainer's state", lambda content: content.pop("trainer"), "refuse"),
    ("without the optimizer", lambda content: content["trainer"]["_trainer"].pop("optimizer"), "refuse"),
    ("NaN in the optimizer", _spoil_optimizer, "refuse"),
    ("a negative iteration", lambda content: content["trainer"].update(iteration=-7), "refuse"),
    ("an iteration that is text", lambda content: content["trainer"].update(iteration="3"), "refuse"),
    ("a trainer that is a list", lambda content: content.update(trainer=[]), "refuse"),
    (
        "an optimizer without groups",
        lambda content: content["trainer"]["_trainer"]["optimizer"].update(param_groups=[]),
        "refuse",
    ),
):
    _register_state(_name, _change, _must)


_TAGS = {
    "of no byte": b"",
    "of a file that is not there": b"model_0009999.pth",
    "of noise": bytes(range(128, 256)),
    "of a path elsewhere": b"../../../../etc/passwd",
    "of many lines": b"model_0000001.pth\n\n\nmodel_final.pth\n",
    "with a NUL": b"model_0000001.pth\0.pth",
    "of 10 MB": b"a" * 10_000_000,
}


def _register_tag(name: str, content: bytes) -> None:
    @mutation(f"checkpoint: last_checkpoint {name}")
    def tagged(scene: Scene) -> Command:
        (run_to_resume(scene) / "last_checkpoint").write_bytes(content)
        return resume(scene, "last_checkpoint")


for _name, _bytes in _TAGS.items():
    _register_tag(_name, _bytes)
