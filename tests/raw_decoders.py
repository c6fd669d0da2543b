"""The three decoders of a raw network's outputs, and Detectron2's own inference on the same outputs."""

import ctypes
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import numpy as np
import pytest
import torch
from detectron2.structures import ImageList
from exported import spread_model
from helpers import ONE_STAGE, ONE_STAGE_FPN
from torch import nn

from qmimic_d2.export import Detections, ModelDescription, describe_model, describe_raw
from qmimic_d2.export.preprocessing import NOT_FINITE, Placement
from qmimic_d2.export.raw.sources import decoder_sources

CLASSES = [(3, "a"), (5, 'b "quoted" \\ % ??/'), (9, "ü")]
SIZE = (64, 96)

RUN_JS = """
import { readFileSync } from "fs";
import { decode } from "./decode.mjs";
const [height, width] = process.argv.slice(2).map(Number);
const outputs = Object.fromEntries(JSON.parse(readFileSync("names.json")).map((name) => {
  const bytes = readFileSync(name + ".bin");
  return [name, new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)];
}));
try {
  console.log(JSON.stringify(decode(outputs, height, width)));
} catch (error) {
  console.log(JSON.stringify(error.message));
}
"""


def one_stage(family: str, *options: Any, has_fpn: bool = True, prefix: str = "Quant"):
    """Config and model of a tiny one-stage detector that finds something; its input is :data:`SIZE`."""
    node = f"MODEL.{family.upper()}"
    found = (f"{node}.PRIOR_PROB", 0.5, f"{node}.SCORE_THRESH_TEST", 0.5)
    base = (ONE_STAGE_FPN if has_fpn else ONE_STAGE)[family]
    return spread_model(*base, *found, *options, meta_architecture=prefix + family)


def raw_description(cfg, model: nn.Module) -> ModelDescription:
    return describe_raw(model, describe_model(cfg, model, CLASSES, fixed_size=SIZE))


class Decoders:
    """The decoders of a detector, by the language that they are written in."""

    def __init__(self, model: nn.Module, description: ModelDescription, folder: Path):
        self.model, self.description, self.folder = model, description, folder
        for name, text in decoder_sources(description).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "run.mjs").write_text(RUN_JS)
        (folder / "names.json").write_text(json.dumps(list(self.shapes)))
        if not (shutil.which("gcc") and shutil.which("node")):
            pytest.skip("gcc and node compile and run the decoders, and one of them is not here")
        flags = "-std=c99 -pedantic -Wall -Wextra -Werror -O2 -shared -fPIC -o decode.so decode.c -lm"
        subprocess.run(["gcc", *flags.split()], cwd=folder, check=True)
        self.library = ctypes.CDLL(str(folder / "decode.so"))

    @property
    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        return self.description.decoding.output_shapes

    def filled(self, **values: float) -> Dict[str, np.ndarray]:
        """Outputs by name, all of one value of their kind: logits, deltas, centerness."""
        return {name: np.full(shape, values[name.partition("_")[0]], np.float32) for name, shape in self.shapes.items()}

    def random(self, seed: int, **scales: float) -> Dict[str, np.ndarray]:
        """Noise of these deviations; most of FCOS's distances are positive."""
        generator = np.random.default_rng(seed)
        outputs = self.filled(**scales)
        means = self.filled(logits=0.0, deltas=float(self.description.decoding.has_centerness), centerness=0.0)
        return {
            name: (generator.standard_normal(each.shape, np.float32) + means[name]) * each
            for name, each in outputs.items()
        }

    def python(self, outputs: Dict[str, np.ndarray], size: Tuple[int, int]) -> Detections:
        return self._placement(size).restore(*self.description.decoding.decode(list(outputs.values())))

    def c(self, outputs: Dict[str, np.ndarray], size: Tuple[int, int]) -> Detections:
        detection = np.dtype([("box", np.float32, 4), ("score", np.float32), ("index", np.int32)])
        found = np.zeros(self.description.decoding.max_detections, detection)
        arrays = [np.ascontiguousarray(each) for each in outputs.values()]
        pointers = (ctypes.c_void_p * len(arrays))(*(each.ctypes.data for each in arrays))
        count = self.library.decode(pointers, *size, ctypes.c_void_p(found.ctypes.data))
        if count < 0:
            raise ValueError(NOT_FINITE)
        return Detections(found["box"][:count], found["score"][:count], found["index"][:count].astype(np.int64))

    def js(self, outputs: Dict[str, np.ndarray], size: Tuple[int, int]) -> Detections:
        for name, each in outputs.items():
            (self.folder / f"{name}.bin").write_bytes(np.ascontiguousarray(each).tobytes())
        command = ["node", "run.mjs", *map(str, size)]
        rows = json.loads(subprocess.run(command, cwd=self.folder, check=True, capture_output=True).stdout)
        if isinstance(rows, str):
            raise ValueError(rows)
        boxes = np.array([row["box"] for row in rows], np.float32).reshape(-1, 4)
        scores = np.array([row["score"] for row in rows], np.float32)
        return Detections(boxes, scores, np.array([row["classIndex"] for row in rows], np.int64))

    def detectron2(self, outputs: Dict[str, np.ndarray], size: Tuple[int, int]) -> Detections:
        """Inference of the model itself, as if its head had given these outputs."""
        maps = [torch.from_numpy(each.copy()) for each in outputs.values()]
        count = len(maps) // len(self.model.head_in_features)
        predictions = [maps[kind::count] for kind in range(count)]
        (found,) = self.model.forward_inference(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), maps[::count], predictions)
        placement = self._placement(size)
        return placement.restore(found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy())

    def _placement(self, size: Tuple[int, int]) -> Placement:
        return Placement(*size, *self.description.input_spec.resized(*size))

    @property
    def all(self) -> Sequence[Any]:
        return self.python, self.c, self.js
