"""
Settings that follow from the data, each with its reason.

The rules are simple on purpose: whoever reads the written YAML sees why a number stands there, and may change it.
"""

import statistics
from dataclasses import dataclass
from typing import Any, List, Tuple

from qmimic_d2.distill.data_statistics import DataStatistics

__all__ = ["STUDENTS", "Choice", "Settings", "choose_settings"]

# Longer sides of the input that are considered, in pixels, and the largest one by the kind of device.
_LONG_SIDES = (160, 192, 224, 256, 320, 384, 448, 512, 640, 800)
_LARGEST = {"cpu": 320, "cuda": 800}
_NAMES = {"cpu": "CPU", "cuda": "GPU"}
# Share of the boxes that may be smaller than so many pixels, and pixels that a usual object of every class needs.
_SMALL_SHARE, _SMALL_PIXELS, _CLASS_PIXELS = 0.25, 24.0, 16.0
# Below this many pixels (the lower quarter of the boxes) a cell of 16 pixels is too coarse.
_FINE_PIXELS = 48.0
# Images that a training sees, as passes over the data, and bounds of its iterations.
_PASSES = 40
_ITERATIONS = (800, 20000)

# By name: the config that builds it, and the divisor of its channels.
STUDENTS = {"vgg-1-16": 16, "vgg-1-32": 32, "vgg-1-8": 8}
_TEACHER_DIVISOR = {"cpu": 4, "cuda": 1}


@dataclass(frozen=True)
class Choice:
    """A key of the config, its value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        shared: of every model.
        teacher: of the teacher alone.
        student: of every student.
        iterations: length of a training.
        batch: images of an iteration.
        input_size: (height, width) in pixels of a usual image as the network sees it.
        why_size: the reason for it.
    """

    shared: Tuple[Choice, ...]
    teacher: Tuple[Choice, ...]
    student: Tuple[Choice, ...]
    iterations: int
    batch: int
    input_size: Tuple[int, int]
    why_size: str


def choose_settings(
    data: DataStatistics, student: str = "vgg-1-16", device: str = "cpu", iterations: int = 0
) -> Settings:
    """
    Args:
        data: of the training set.
        student: a key of :data:`STUDENTS`.
        device: "cpu" or "cuda".
        iterations: of every training; 0 = by the size of the data.
    """
    long_side, why_size = _long_side(data, device)
    short_side = _multiple(long_side * data.aspect, 16)
    batch = 8 if device == "cpu" else 16
    length = iterations or _iterations(data.num_images, batch)
    small = data.relative_size(_SMALL_SHARE) * long_side
    stride = 8 if small < _FINE_PIXELS else 16
    sizes = _anchor_sizes(data, long_side)
    ratios = _anchor_ratios(data)
    why_length = "as given" if iterations else f"{_PASSES} passes over {data.num_images:,} images"
    shared = [
        Choice("MODEL.ROI_HEADS.NUM_CLASSES", len(data.classes), f"the classes {_few(data.classes)}"),
        Choice("INPUT.MIN_SIZE_TEST", short_side, why_size),
        Choice("INPUT.MAX_SIZE_TEST", long_side, "the same"),
        Choice(
            "INPUT.MIN_SIZE_TRAIN",
            [_multiple(short_side * scale, 16) for scale in (0.8, 1.0, 1.2)],
            "a little smaller and larger, so that the size of an object tells less",
        ),
        Choice("INPUT.MAX_SIZE_TRAIN", _multiple(long_side * 1.2, 16), "the same"),
        Choice(
            "MODEL.VGG.STAGE_STRIDES",
            [2, 1, 2, 2, 1] if stride == 8 else [2, 2, 2, 2, 1],
            f"cells of {stride} pixels: a quarter of the boxes is smaller than {small:.0f} pixels at this size",
        ),
        Choice(
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [sizes],
            "sqrt(width x height) of the boxes, the classes alike: the middles of the lower, middle and upper third",
        ),
        Choice("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [ratios], "height / width of the boxes, likewise"),
        Choice("TEST.DETECTIONS_PER_IMAGE", max(30, min(300, 2 * data.most_boxes)), f"up to {data.most_boxes} objects"),
        Choice("SOLVER.IMS_PER_BATCH", batch, f"usual on a {_NAMES[device]}"),
        Choice("SOLVER.MAX_ITER", length, why_length),
        Choice("SOLVER.WARMUP_ITERS", max(20, min(200, length // 16)), "a sixteenth of it"),
        Choice("SOLVER.CHECKPOINT_PERIOD", max(50, length // 8), "an eighth of it: what a power cut may cost"),
        Choice("TEST.EVAL_PERIOD", max(50, length // 4), "four evaluations, the last at the end"),
    ]
    divisor = _TEACHER_DIVISOR[device]
    teacher = [
        Choice(
            "MODEL.VGG.WIDTH_DIVISOR",
            divisor,
            "the channels of a VGG by this: what trains in reasonable time here"
            if device == "cpu"
            else "the full VGG",
        )
    ]
    own = [Choice("MODEL.VGG.WIDTH_DIVISOR", STUDENTS[student], f"--student {student}")]
    return Settings(tuple(shared), tuple(teacher), tuple(own), length, batch, (short_side, long_side), why_size)


def _long_side(data: DataStatistics, device: str) -> Tuple[int, str]:
    """The smallest longer side that shows most boxes and every class well, as far as images and device go."""
    medians = {name: statistics.median(sizes) for name, sizes in data.class_sizes.items()}
    name, smallest = min(medians.items(), key=lambda item: item[1])
    needed = max(_SMALL_PIXELS / data.relative_size(_SMALL_SHARE), _CLASS_PIXELS / smallest)
    most = min(_LARGEST[device], max(_LONG_SIDES[0], data.long_side))
    fitting = [side for side in _LONG_SIDES if side <= most]
    side = next((each for each in fitting if each >= needed), fitting[-1])
    reason = (
        f"so a quarter of the boxes is smaller than {data.relative_size(_SMALL_SHARE) * side:.0f} pixels, and a usual "
        f"{name} has {smallest * side:.0f} (sqrt(width x height))"
    )
    if side < needed:
        limit = "the images' own size" if data.long_side < _LARGEST[device] else f"what a {_NAMES[device]} can bear"
        reason += f"; {needed:.0f} would be better, and this is {limit}"
    return side, reason


def _anchor_sizes(data: DataStatistics, long_side: int) -> List[int]:
    sizes: List[int] = []
    for share in (1 / 6, 1 / 2, 5 / 6):
        size = max(8, round(data.balanced_size(share) * long_side))
        sizes.append(max(size, round(sizes[-1] * 1.25)) if sizes else size)  # equal ones would find nothing more
    return sizes


def _anchor_ratios(data: DataStatistics) -> List[float]:
    ratios: List[float] = []
    for share in (1 / 6, 1 / 2, 5 / 6):
        ratio = round(min(max(data.balanced_ratio(share), 0.2), 5.0), 2)
        if not ratios or ratio > 1.2 * ratios[-1]:
            ratios.append(ratio)
    return ratios


def _iterations(num_images: int, batch: int) -> int:
    least, most = _ITERATIONS
    return min(max(_multiple(_PASSES * num_images / batch, 100), least), most)


def _multiple(value: float, step: int) -> int:
    return max(step, round(value / step) * step)


def _few(names: Tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
