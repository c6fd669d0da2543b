#!/usr/bin/env python
"""
Where r(f_s) comes to rest, and whether it does: what rounding the student's side does to its features.

    python benchmarks/oscillation.py --teacher output/evidence/teacher_1/model_final.pth [--steps 100] [--json FILE]

Trains students of the demo and, in their last steps, looks at r(f_s) inside the annotated boxes of the same images
after every step. docs/evidence.md ("The search") holds the last results and what they say.
"""

import argparse
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools"), os.path.join(ROOT, "benchmarks")]

import torch  # noqa: E402
from detectron2.engine import HookBase  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import Tensor  # noqa: E402

from evidence_lib.records import figures_of_run, versions  # noqa: E402
from qmimic_d2.engine import Trainer, argument_parser, load_config, set_up_process  # noqa: E402
from qmimic_d2.files import check_writable, write_json  # noqa: E402
from qmimic_d2.modeling import UniformQuantizer  # noqa: E402

STUDENT = "configs/Digits/student_vgg_1_16_qmimic.yaml"
_QUANTIZER = "MODEL.QMIMIC.QUANTIZER."
_FOUR_CODES = [f"{_QUANTIZER}NUM_CODES", "4", f"{_QUANTIZER}STRIDE", "0.75"]
_NOT_IN_LOSS = ["MODEL.QMIMIC.MIMIC.QUANTIZE_STUDENT", "False", "MODEL.QMIMIC.MIMIC.ADAPTER", "conv1x1_relu"]
_CLAMP = [f"{_QUANTIZER}NAME", "Clamp"]

# By name: KEY VALUE pairs over the demo's quantization mimic.
SETTINGS: Dict[str, List[str]] = {
    "s = 0.25, both sides rounded": [],
    "s = 0.25, clamp, no rounding": _CLAMP,
    "4 codes at 0.75, both sides rounded": _FOUR_CODES,
    "4 codes at 0.75, teacher and heads rounded, r not": [*_FOUR_CODES, *_NOT_IN_LOSS],
    "4 codes at 0.75, clamp, no rounding": [*_FOUR_CODES, *_CLAMP],
}
BINS = 20


class RestingPlaces(HookBase):
    """
    In the last steps of a training, looks at r(f_s) of the same images after each of them.

    Shape letters:
        E: entries of r(f_s) of all regions.

    Args:
        batch: images with annotations, as the data loader gives them.
        steps: how many of the last steps.
        quantizer: whose codes are compared before and after a step.
    """

    def __init__(self, batch: List[Dict[str, Any]], steps: int, quantizer: UniformQuantizer):
        self._batch = batch
        self._steps = steps
        self._quantizer = quantizer
        self._previous: Optional[Tensor] = None
        self._flips: List[float] = []
        self._moves: List[float] = []
        self._histogram = torch.zeros(BINS, dtype=torch.float64)

    def after_step(self) -> None:
        if self.trainer.iter < self.trainer.max_iter - self._steps - 1:
            return
        adapted = adapted_features(self.trainer.model, self._batch)
        multiples = adapted[adapted > 0] / self._quantizer.stride  # a ReLU's zeros are at rest
        self._histogram += torch.histc(multiples, BINS, 0.0, 1.0).double()
        if self._previous is not None:
            before, after = self._quantizer.codes(self._previous), self._quantizer.codes(adapted)
            is_on = (before > 0) | (after > 0)
            self._flips.append(float((before != after)[is_on].double().mean()))
            self._moves.append(float((adapted - self._previous)[is_on].abs().double().mean()) / self._quantizer.stride)
        self._previous = adapted

    def figures(self) -> Dict[str, Any]:
        """
        Returns:
            In percent, of the entries between 0 and s, how many lie within s/10 of the threshold s/2 (20 where
            they are spread evenly); of the entries with a code above 0, how many change it in a step; and how
            far these move in a step, in percent of s. With the histogram between 0 and s, in :data:`BINS` bins.
        """
        middle = self._histogram[BINS * 2 // 5 : BINS * 3 // 5].sum() / self._histogram.sum()
        return {
            "near the threshold, %": 100.0 * float(middle),
            "codes that change in a step, %": 100.0 * sum(self._flips) / len(self._flips),
            "movement in a step, % of s": 100.0 * sum(self._moves) / len(self._moves),
            "histogram": (self._histogram / self._histogram.sum()).tolist(),
        }


@torch.no_grad()
def adapted_features(model: torch.nn.Module, batch: List[Dict[str, Any]]) -> Tensor:
    """r(f_s) inside the annotated boxes of a batch, before any quantizer, in evaluation mode. Shape (E,)."""
    mimic = model.mimic
    boxes = [each["instances"].gt_boxes.to(model.device) for each in batch]
    model.eval()
    try:
        (pair,) = mimic.pairs(mimic.student_maps(batch), mimic.teacher.features(batch), boxes)
    finally:
        model.train()
    return pair.student.flatten()


def measure(name: str, teacher: str, output: str, steps: int, opts: Sequence[str] = ()) -> Dict[str, Any]:
    """Trains one of :data:`SETTINGS` in ``output``; its row of the table."""
    pairs = ["MODEL.DEVICE", "cpu", "SEED", "11", "MODEL.QMIMIC.TEACHER.WEIGHTS", teacher, "OUTPUT_DIR", output]
    arguments = argument_parser().parse_args(["--config-file", STUDENT, *pairs, *SETTINGS[name], *opts])
    cfg = set_up_process(load_config(arguments.config_file, arguments.opts, device="cpu"), arguments)
    node = cfg.MODEL.QMIMIC.QUANTIZER
    trainer = Trainer(cfg)
    # other images than those of the first steps, since the loader's order begins anew
    loader = iter(Trainer.build_train_loader(cfg))
    batch = [next(loader) for _ in range(3)][-1]
    places = RestingPlaces(batch, min(steps, cfg.SOLVER.MAX_ITER - 1), UniformQuantizer(node.STRIDE, node.NUM_CODES))
    trainer.register_hooks([places])
    trainer.train()
    figures = places.figures()
    return {"setting": name, **figures, "AP": figures_of_run(output)["AP"]}


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="weights of configs/Digits/teacher_vgg_1_8.yaml")
    parser.add_argument("--steps", type=int, default=100, help="of the end of the training, that are looked at")
    parser.add_argument("--output", default="output/oscillation", help="folder of the runs")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the result here")
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the configs; last")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error("--steps must be 2 or more")
    if args.json:
        check_writable(args.json, "--json")
    torch.set_num_threads(1)
    rows = []
    for name in args.only:
        folder = os.path.join(args.output, str(list(SETTINGS).index(name)))
        rows.append(measure(name, args.teacher, folder, args.steps, args.opts))
        shown = [{key: value for key, value in row.items() if key != "histogram"} for row in rows]
        print(tabulate(shown, headers="keys", tablefmt="github", floatfmt=".1f"))
    if args.json:
        write_json(args.json, {"versions": versions(), "opts": args.opts, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
