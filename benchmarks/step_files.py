#!/usr/bin/env python
"""
Which files of the package run in one training step, from the mapper's dict to the sum of the losses.

    python benchmarks/step_files.py [--config-file Digits/student_vgg_1_16_qmimic.yaml] [KEY VALUE ...]

The teacher's weights are random. The step is the second one, so what happens once in a training is left out;
``MODEL.QMIMIC.DIAGNOSTICS.PERIOD 1`` adds what is measured now and then.
"""

import argparse
import os
import sys
import tempfile
from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from qmimic_d2.engine import load_config  # noqa: E402
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config  # noqa: E402

PACKAGE = os.path.join(ROOT, "qmimic_d2") + os.sep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="Digits/student_vgg_1_16_qmimic.yaml")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    files = files_of_a_step(args.config_file, args.opts)
    sys.stdout.write("\n".join([*files, f"{len(files)} files"]) + "\n")


def files_of_a_step(config_file: str, opts: Sequence[str] = ()) -> List[str]:
    """Paths below the package, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "teacher.pth")
        cfg = load_config(config_file, ["MODEL.QMIMIC.TEACHER.WEIGHTS", weights, *opts], device="cpu")
        backbone = load_teacher_config(cfg).build_backbone()
        torch.save({"model": backbone.state_dict(prefix="backbone.")}, weights)
        model = build_model(cfg).train()
    ran = set()

    def note(frame, event, argument) -> None:
        if event == "call":
            ran.add(frame.f_code.co_filename)

    with EventStorage(0) as storage:
        for storage.iter in range(2):
            inputs = batch(cfg)
            sys.setprofile(note if storage.iter else None)
            try:
                sum(model(inputs).values())
            finally:
                sys.setprofile(None)
    return sorted(each[len(PACKAGE) :] for each in ran if each.startswith(PACKAGE))


def batch(cfg: CfgNode) -> List[dict]:
    """Two images as Detectron2's mapper gives them, with an object each."""
    size = cfg.INPUT.MIN_SIZE_TRAIN[0]
    instances = Instances((size, size), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]])))
    instances.gt_classes = torch.zeros(1, dtype=torch.long)
    return [{"image": torch.full((3, size, size), 9 * index), "instances": instances} for index in (1, 2)]


if __name__ == "__main__":
    main()
