"""Good checkpoints of the baseline, to be changed, and the commands that read them."""

import pickle
import shutil
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch

from storm_lib.cases import Command, Scene

__all__ = ["arrays_of", "pickled", "resume", "run_to_resume", "saved", "state_of"]


def state_of(scene: Scene) -> Dict[str, torch.Tensor]:
    return torch.load(scene.baseline.weights, weights_only=True)["model"]


def saved(scene: Scene, content: Any, name: str = "mutated.pth", **options: Any) -> Path:
    path = scene.folder / name
    torch.save(content, path, **options)
    return path


def pickled(scene: Scene, content: Any, name: str = "mutated.pkl") -> Path:
    path = scene.folder / name
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def arrays_of(scene: Scene) -> Dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state_of(scene).items()}


def run_to_resume(scene: Scene) -> Path:
    """A training that stopped after two of four iterations."""
    output = scene.folder / "output"
    shutil.copytree(scene.baseline.run, output, ignore=shutil.ignore_patterns("model_final.pth", "model_0000003.pth"))
    (output / "last_checkpoint").write_text("model_0000001.pth")
    return output


def resume(scene: Scene, *names: str, must: str = "either") -> Command:
    command = scene.train(names=[*names, "last_checkpoint"], must=must)
    command.arguments.insert(0, "--resume")
    return command
