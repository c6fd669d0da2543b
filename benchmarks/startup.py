#!/usr/bin/env python
"""
How long a training needs from its command to the end of its first iteration, next to a stock Detectron2 training.

    python benchmarks/startup.py [--repeats 5] [--before TREE] [--json FILE]

The digits student with a teacher (random weights) runs by ``train_net.py``. Stock is a detector of about its size on
the same images, trained as Detectron2's ``tools/plain_train_net.py`` does, in a process without this package.
``--before`` names another checkout, which is measured as well. All of them alternate. benchmarks/README.md holds the
last results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Dict, List, Sequence, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

STUDENT = "Digits/student_vgg_1_16_qmimic.yaml"
TEACHER = "Digits/teacher_vgg_1_8_quant.yaml"

_WORD = "CPU seconds until the end of the first iteration:"

# Runs a script, and ends the process after the first training step.
_UNTIL_FIRST_STEP = f"""
import os, runpy, sys, time
from detectron2.engine import train_loop
sys.argv = sys.argv[1:]
step = train_loop.SimpleTrainer.run_step
def first_step(trainer):
    step(trainer)
    print("{_WORD}", time.process_time(), flush=True)
    os._exit(0)
train_loop.SimpleTrainer.run_step = first_step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    args = parse_arguments()
    if args.stock:
        train_stock(*args.stock)
        return
    with tempfile.TemporaryDirectory() as folder:
        commands = build_commands(folder, args.before)
        measured: Dict[str, List[Tuple[float, float]]] = {name: [] for name in commands}
        for repeat in range(args.repeats + 1):
            for name, (command, tree) in commands.items():
                seconds = run(command, tree)
                if repeat:  # the first round fills the caches of files
                    measured[name].append(seconds)
    rows = summary(measured)
    sys.stdout.write("| command | CPU s | wall s | ratio to stock, CPU |\n|---|---|---|---|\n")
    for row in rows:
        sys.stdout.write("| {name} | {cpu:.1f} | {wall:.1f} | {ratio:.2f} |\n".format(**row))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", default="", help="another checkout of this project")
    parser.add_argument("--json", default="")
    parser.add_argument("--stock", nargs=3, metavar=("ANNOTATIONS", "IMAGES", "OUTPUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build_commands(folder: str, before: str = "") -> Dict[str, Tuple[List[str], str]]:
    """Commands and the checkouts that they run in; makes the data and the teacher's weights in ``folder``."""
    sys.path.insert(0, ROOT)
    import torch
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.modeling import build_model

    from qmimic_d2.engine import load_config

    weights = os.path.join(folder, "teacher.pth")
    torch.save({"model": build_model(load_config(TEACHER, device="cpu")).state_dict()}, weights)
    name = load_config(STUDENT, ["MODEL.QMIMIC.TEACHER.WEIGHTS", weights]).DATASETS.TRAIN[0]
    DatasetCatalog.get(name)
    data = MetadataCatalog.get(name)
    options = ["--config-file", STUDENT, "MODEL.QMIMIC.TEACHER.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]
    commands = {"stock": ([os.path.abspath(__file__), "--stock", data.json_file, data.image_root, folder], ROOT)}
    for label, tree in (("before", before), ("this checkout", ROOT)):
        if tree:
            output = os.path.join(folder, label.replace(" ", "_"))
            commands[label] = (["-c", _UNTIL_FIRST_STEP, "train_net.py", *options, "OUTPUT_DIR", output], tree)
    return commands


def run(command: Sequence[str], tree: str) -> Tuple[float, float]:
    """CPU and wall seconds from the start of the process to the end of its first iteration."""
    environment = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    wall = time.perf_counter() - begin
    found = [line for line in process.stdout.splitlines() if line.startswith(_WORD)]
    if not found:
        raise RuntimeError(f"{command} made no step: {process.stderr[-2000:]}")
    return float(found[0][len(_WORD) :]), wall


def summary(measured: Dict[str, List[Tuple[float, float]]]) -> List[Dict[str, object]]:
    """One row a command, with medians; the ratio is the median of the repeats' ratios."""
    return [
        {
            "name": name,
            "cpu": median(cpu for cpu, _ in seconds),
            "wall": median(wall for _, wall in seconds),
            "ratio": median(cpu / stock for (cpu, _), (stock, _) in zip(seconds, measured["stock"])),
        }
        for name, seconds in measured.items()
    ]


def train_stock(annotations: str, images: str, output: str) -> None:
    """Detectron2's plain training loop, until its first iteration is done."""
    import torch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import build_detection_train_loader
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import default_argument_parser, default_setup
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage

    register_coco_instances("stock", {}, annotations, images)
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.MASK_ON", False, "MODEL.WEIGHTS", "", "OUTPUT_DIR", f"{output}/stock"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 10),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 128, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
            *("INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", 128, "SOLVER.IMS_PER_BATCH", 8),
            *("DATASETS.TRAIN", ("stock",), "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    default_setup(cfg, default_argument_parser().parse_args([]))
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    DetectionCheckpointer(model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler).resume_or_load("")
    data_loader = build_detection_train_loader(cfg)
    with EventStorage(0):
        losses = sum(model(next(iter(data_loader))).values())
        assert torch.isfinite(losses).all()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        scheduler.step()
    sys.stdout.write(f"{_WORD} {time.process_time()}\n")


if __name__ == "__main__":
    main()
