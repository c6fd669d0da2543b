"""A tiny detector in every form, and processes in which packages are missing."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Sequence

import numpy as np
import torch
from helpers import WrittenTeacher, randomize, seeded_model, tiny_cfg, write_teacher
from torch import nn

from qmimic_d2.engine.exporting import Exporter

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("detectron2", "torchscript", "onnx")
SIZES = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128)

# Weights of a seed make scores of 1/4 and boxes that are the proposals; these spread both, without ties.
_SPREAD = 6.0


def spread(model: nn.Module) -> nn.Module:
    """Makes what an untrained detector predicts differ from place to place."""
    for name, parameter in model.named_parameters():
        if "box_predictor" in name or "objectness_logits" in name or name.startswith("head."):
            parameter.data.mul_(_SPREAD)
    return model


def spread_model(*options: Any, meta_architecture: str = "QuantRCNN"):
    """Config and model of a tiny detector with such weights, in evaluation mode."""
    cfg = tiny_cfg(*SIZES, *options, meta_architecture=meta_architecture)
    return cfg, spread(randomize(seeded_model(cfg))).eval()


def write_detector(folder: Path, *options: Any, name: str = "detector") -> WrittenTeacher:
    """YAML and checkpoint of a tiny quantized student with such weights."""
    pairs = ("MODEL.META_ARCHITECTURE", "QuantRCNN", *SIZES, *options)
    written = write_teacher(folder, *pairs, name=name)
    torch.save({"model": spread(written.model).state_dict()}, written.weights)
    return written


@dataclass(frozen=True)
class Forms:
    """A detector on disk and its exported files, by form."""

    detector: WrittenTeacher
    folder: Path
    files: Dict[str, str]


def write_forms(folder: Path, *options: Any, forms: Sequence[str] = FORMS) -> Forms:
    """Exports :func:`write_detector`'s."""
    folder.mkdir(parents=True, exist_ok=True)
    detector = write_detector(folder, *options)
    cfg = detector.cfg.clone()
    cfg.MODEL.WEIGHTS = detector.weights
    exporter = Exporter(cfg, config_file=detector.config_file)
    return Forms(detector, folder, {form: exporter.write(form, str(folder / "out")).path for form in forms})


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_close(one, other, boxes: float = 1e-2, scores: float = 1e-4) -> None:
    """Two :class:`Detections` are the same up to rounding."""
    assert len(one) == len(other) > 0
    assert one.classes.tolist() == other.classes.tolist()
    np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=boxes)
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=scores)


def run_without(packages: Sequence[str], code: str, *arguments: Any) -> str:
    """Runs Python code in a process in which importing these packages raises; returns what it prints."""
    blocked = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {tuple(packages)!r}:\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
