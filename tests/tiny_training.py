"""What tests of training share: a tiny data set of both orientations, configs that train on it, runs of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import HookBase
from helpers import WrittenTeacher, tiny_cfg
from PIL import Image
from tiny_coco import registered

ROOT = Path(__file__).resolve().parent.parent

# A name that Detectron2 itself registers, below DETECTRON2_DATASETS: for runs in processes of their own.
BUILTIN_DATASET = "coco_2017_val_100"

# Longest wait for a process.
_SECONDS = 180.0

_CATEGORIES = [{"id": 1 + index, "name": f"class {index}"} for index in range(3)]

# Random sizes and flips, grouping by orientation, SGD with momentum.
_TRAINING = {
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": (4,),
    "MODEL.QMIMIC.DIAGNOSTICS.PERIOD": 2,
}


def write_coco(
    annotations: Path, images: Path, count: int = 9, categories: Sequence[Dict[str, Any]] = tuple(_CATEGORIES)
) -> None:
    """Every third image is upright (48 x 64), the others lie (64 x 48); two objects in each."""
    for folder in (annotations.parent, images):
        folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    content = {"info": {}, "images": [], "annotations": [], "categories": list(categories)}
    for index in range(count):
        width, height = (48, 64) if index % 3 == 0 else (64, 48)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for box in ([4.0, 6.0, 24.0, 30.0], [20.0, 12.0, 26.0, 28.0]):
            number = len(content["annotations"])
            content["annotations"].append(
                {
                    "id": 1 + number,
                    "image_id": index,
                    "category_id": categories[number % 3]["id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    annotations.write_text(json.dumps(content))


@contextlib.contextmanager
def registered_data(
    folder: Path, name: str = "tiny_training", count: int = 9, is_written: bool = False
) -> Iterator[str]:
    """Writes :func:`write_coco`'s data, unless they are there, and registers them while the block runs."""
    if not is_written:
        write_coco(folder / "annotations.json", folder / "images", count)
    with registered(folder, name):
        yield name


def write_builtin_data(root: Path) -> None:
    """:func:`write_coco`'s data where Detectron2 looks for :data:`BUILTIN_DATASET`; ``root`` is DETECTRON2_DATASETS."""
    things = [{"id": each["id"], "name": each["name"]} for each in COCO_CATEGORIES if each["isthing"]]
    folder = root / "coco"
    write_coco(folder / "annotations" / "instances_val2017_100.json", folder / "val2017", categories=things)


def training_cfg(
    output_dir: Path, dataset: str, *options: Any, teacher: WrittenTeacher = None, evaluate: bool = False
) -> CfgNode:
    """A frozen config of a tiny detector, a quantization-mimic student where there is a teacher."""
    pairs = dict(_TRAINING)
    pairs.update({"DATASETS.TRAIN": (dataset,), "OUTPUT_DIR": str(output_dir)})
    pairs["DATASETS.TEST"] = (dataset,) if evaluate else ()
    options = [each for pair in pairs.items() for each in pair] + (teacher.options if teacher else []) + list(options)
    cfg = tiny_cfg(*options, meta_architecture="QuantMimicRCNN" if teacher else "GeneralizedRCNN")
    cfg.freeze()
    return cfg


class Recorder(HookBase):
    """
    What every step of a training computed.

    Attributes:
        losses: by iteration, each a dict of the step's losses, total_loss included.
    """

    def __init__(self):
        self.losses: Dict[int, Dict[str, float]] = {}

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        names = [name for name in latest if "loss" in name]
        self.losses[self.trainer.iter] = {name: latest[name][0] for name in names}


class Run:
    """
    A script, ``train_net.py`` by default, in processes of its own; leaving the block kills them.

    What it writes goes to files, since nobody reads while it runs.
    """

    def __init__(
        self,
        *arguments: Any,
        cwd: Path,
        datasets: Path,
        script: Path = ROOT / "train_net.py",
        launcher: Sequence[Any] = (),
    ):
        self._files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]
        environment = {
            **os.environ,
            "DETECTRON2_DATASETS": str(datasets),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, (*launcher, script, *arguments))],
            cwd=cwd,
            env=environment,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc_info) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in self._files:
            file.close()

    def wait_for(self, path: Path) -> None:
        """Until it has made a file."""
        end = time.monotonic() + _SECONDS
        while not path.exists():
            assert self._process.poll() is None, self.texts()
            assert time.monotonic() < end, (f"{path} does not appear", self.texts())
            time.sleep(0.05)

    def send(self, number: int, to_all: bool = False) -> None:
        """Sends a signal to it, or to every process of its group, as a terminal and some schedulers do."""
        (os.killpg if to_all else os.kill)(self._process.pid, number)

    def finish(self) -> int:
        """Its status, when it has ended."""
        return self._process.wait(timeout=_SECONDS)

    def texts(self) -> Tuple[str, str]:
        """What it has written to stdout and stderr."""
        for file in self._files:
            file.seek(0)
        return self._files[0].read(), self._files[1].read()


def written_losses(output_dir: Path) -> Dict[int, float]:
    """``total_loss`` by iteration from metrics.json, a later line taking the place of an earlier one."""
    rows: List[Dict[str, Any]] = [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}
