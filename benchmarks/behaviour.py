#!/usr/bin/env python
"""
Records what every detector family computes in ten training steps, so that two versions can be compared bit by bit.

    python benchmarks/behaviour.py --record before.json
    python benchmarks/behaviour.py --compare before.json
    python benchmarks/behaviour.py --record before.json --package /path/of/another/checkout

Each case is a family, a variant of the student, a place of the adapter and a kind of config. It takes ten steps of SGD
on seeded batches. The record holds every loss of every step as a hexadecimal float, and a digest of the weights after
the last one. Records compare on one machine only: another processor or PyTorch may round otherwise.

Exit status of --compare: 0 where all cases are equal, 1 where one differs or is missing (each is named).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10

MIMIC = "MODEL.QMIMIC.MIMIC"
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
# What the quantizer and the loss weight are in each variant; the first two have no teacher.
VARIANTS: Dict[str, Tuple[str, ...]] = {
    "scratch": (f"{QUANTIZER}.NAME", ""),
    "quantized": (),
    "plain mimic": (f"{QUANTIZER}.NAME", "", f"{MIMIC}.NORMALIZE_BY", "target"),
    "quantization mimic": (f"{MIMIC}.NORMALIZE_BY", "target"),
    "balanced": (f"{MIMIC}.SCHEDULE", "balanced", f"{MIMIC}.NORMALIZE_BY", "target", f"{MIMIC}.BALANCE_PERIOD", 3),
}
ADAPTERS: Dict[str, Tuple[str, ...]] = {
    "branch": (),
    "trunk": (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.ADAPTER", "conv1x1_relu"),
}


def families() -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
    """By name: what follows "Quant" or "QuantMimic" in the meta-architecture, and KEY VALUE pairs of the family."""
    import helpers

    fpn = (*helpers.RESNET_FPN, f"{MIMIC}.ROI_SOURCE", ["proposals"])
    return {
        "faster_rcnn": ("RCNN", ()),
        "faster_rcnn_resnet": ("RCNN", helpers.RESNET_C4),
        "faster_rcnn_fpn": ("RCNN", fpn),
        "rfcn": ("RCNN", helpers.RFCN),
        "cascade_rcnn": ("RCNN", helpers.CASCADE),
        "mask_rcnn": ("RCNN", helpers.MASK_HEAD),
        "keypoint_rcnn": ("RCNN", helpers.KEYPOINT_HEAD),
        "retinanet": ("RetinaNet", helpers.ONE_STAGE["RetinaNet"]),
        "fcos": ("FCOS", helpers.ONE_STAGE["FCOS"]),
        "retinanet_fpn": ("RetinaNet", helpers.ONE_STAGE_FPN["RetinaNet"]),
        "fcos_fpn": ("FCOS", helpers.ONE_STAGE_FPN["FCOS"]),
    }


def has_teacher(variant: str) -> bool:
    return variant not in ("scratch", "quantized")


def yaml_cases(folder: Path) -> Iterator[Tuple[str, Any]]:
    """Name and model of every case that a YAML describes."""
    import helpers

    for family, (suffix, options) in families().items():
        # a teacher is of the student's family and has twice its channels
        wider = ("MODEL.RESNETS.WIDTH_DIVISOR", 8) if "MODEL.RESNETS.WIDTH_DIVISOR" in options else ()
        teacher = helpers.write_teacher(folder, *_without_mimic(options), *wider, name=family)
        for variant, settings in VARIANTS.items():
            for place, adapter in ADAPTERS.items():
                if place == "trunk" and ("fpn" in family or not has_teacher(variant)):
                    continue
                named = teacher.options if has_teacher(variant) else ()
                prefix = "QuantMimic" if has_teacher(variant) else "Quant"
                cfg = helpers.tiny_cfg(*options, *settings, *adapter, *named, meta_architecture=prefix + suffix)
                cfg.freeze()
                yield f"yaml / {family} / {variant} / {place}", helpers.seeded_model(cfg)


def _without_mimic(options: Tuple[Any, ...]) -> List[Any]:
    pairs = [(key, value) for key, value in zip(options[::2], options[1::2]) if not key.startswith(MIMIC)]
    return [each for pair in pairs for each in pair]


def lazy_cases(folder: Path) -> Iterator[Tuple[str, Any]]:
    """The same of LazyConfigs, one detector of each meta-architecture."""
    import helpers
    import torch
    from detectron2.config import instantiate
    from test_lazy_config import FAMILIES

    from qmimic_d2.lazy_config import add_mimic, add_quantizer

    teacher = helpers.write_teacher(folder, name="lazy")
    for family, build in FAMILIES.items():
        for variant, settings in VARIANTS.items():
            node = _nested(settings)
            node.setdefault("QUANTIZER", {}).setdefault("STRIDE", 0.25)
            torch.manual_seed(1)
            if has_teacher(variant):
                node["TEACHER"] = {"CONFIG_FILE": teacher.config_file, "WEIGHTS": teacher.weights}
                node.setdefault("MIMIC", {}).update(POOLER_RESOLUTION=3, ROI_SOURCE=["ground_truth"])
                model = add_mimic(build(), node, max_iter=STEPS)
            else:
                model = add_quantizer(build(), node)
            torch.manual_seed(1)
            yield f"lazy / {family} / {variant} / branch", instantiate(model)


def _nested(settings: Tuple[Any, ...]) -> Dict[str, Dict[str, Any]]:
    """KEY VALUE pairs below MODEL.QMIMIC as nested dicts."""
    nested: Dict[str, Dict[str, Any]] = {}
    for key, value in zip(settings[::2], settings[1::2]):
        node, name = key.split(".")[-2:]
        nested.setdefault(node, {})[name] = value
    return nested


def train(model: Any) -> Dict[str, Any]:
    """The losses of ten seeded steps, and the digest of the weights behind them."""
    import helpers
    import torch
    from detectron2.utils.events import EventStorage

    from qmimic_d2.checkpoint import weights_digest

    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.002, momentum=0.9)
    num_classes = 1 if getattr(getattr(model, "roi_heads", None), "keypoint_on", False) else helpers.NUM_CLASSES
    steps = []
    with EventStorage(0) as storage:
        for iteration in range(STEPS):
            storage.iter = iteration
            torch.manual_seed(100 + iteration)
            inputs = helpers.batch((64, 80), (64, 64), seed=iteration, num_classes=num_classes)
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            steps.append({name: float(loss).hex() for name, loss in sorted(losses.items())})
    return {"losses": steps, "weights": weights_digest(_under_earlier_names(model.state_dict()))}


def _under_earlier_names(state: Dict[str, Any]) -> Dict[str, Any]:
    """The entries of the mimic had another prefix before 2026-11-25; records from then stay valid."""
    return {f"mimic_loss.{name[6:]}" if name.startswith("mimic.") else name: each for name, each in state.items()}


def record() -> Dict[str, Any]:
    """All cases by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for cases in (yaml_cases, lazy_cases):
            for name, model in cases(Path(folder)):
                found[name] = train(model)
                print(f"{found[name]['weights']}  {name}", flush=True)
    return found


def differences(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    """A line for every case that is not the same in both."""
    lines = []
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            lines.append(f"{name}: only {'before' if name in before else 'after'}")
        elif before[name] != after[name]:
            step = next((i for i, (one, other) in enumerate(zip(before[name]["losses"], after[name]["losses"]))
                         if one != other), None)
            where = "the weights after the last step" if step is None else f"the losses of step {step}"
            lines.append(f"{name}: other from {where} on")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", default="", metavar="FILE", help="write the record here")
    parser.add_argument("--compare", default="", metavar="FILE", help="compare with this earlier record")
    parser.add_argument("--package", default=str(ROOT), metavar="FOLDER", help="checkout to measure (default: this)")
    args = parser.parse_args()
    if not args.record and not args.compare:
        parser.error("give --record FILE, --compare FILE, or both")
    sys.path[:0] = [args.package, str(Path(args.package) / "tests")]
    import torch

    torch.set_num_threads(1)
    found = record()
    if args.record:
        Path(args.record).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.compare:
        return 0
    before = json.loads(Path(args.compare).read_text(encoding="utf-8"))
    lines = differences(before, found)
    print("\n".join(lines) if lines else f"equal to the last bit: {len(found)} cases of {STEPS} steps")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
