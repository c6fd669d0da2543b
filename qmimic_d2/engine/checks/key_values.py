"""Which values the keys of Detectron2 may have, as far as a table can say it."""

import math
from typing import Any, Dict, Iterator, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg

from qmimic_d2.config import add_qmimic_config

__all__ = ["check_values", "default_config", "flat_keys"]


class _Interval(NamedTuple):
    """Numbers from ``low`` to ``high``, both of them included unless ``is_open``."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if self.is_open:
            return self.low < value and (value < self.high or self.high == math.inf)
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.is_open else '>='} {self.low}"
        return f"{'between' if self.is_open else 'from'} {self.low} {'and' if self.is_open else 'to'} {self.high}"


_SHARE = _Interval(0.0, 1.0)
_POSITIVE = _Interval(0.0, is_open=True)
_NATURAL = _Interval(0)
_COUNT = _Interval(1)
# More is a slip of the hand that takes all memory.
_WIDTH = _Interval(1, 2**16)

# Every number of a value, however deep in lists, must lie in its key's interval.
_KEYS_OF_INTERVALS = {
    _COUNT: """
        SOLVER.CHECKPOINT_PERIOD SOLVER.MAX_ITER SOLVER.NUM_DECAYS TEST.DETECTIONS_PER_IMAGE TEST.PRECISE_BN.NUM_ITER
        INPUT.MIN_SIZE_TRAIN INPUT.MAX_SIZE_TRAIN INPUT.MAX_SIZE_TEST
        DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        MODEL.RPN.BATCH_SIZE_PER_IMAGE MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.PRE_NMS_TOPK_TEST
        MODEL.RPN.POST_NMS_TOPK_TRAIN MODEL.RPN.POST_NMS_TOPK_TEST
        MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE MODEL.RETINANET.TOPK_CANDIDATES_TEST MODEL.FCOS.TOPK_CANDIDATES_TEST
    """,
    _WIDTH: """
        MODEL.FPN.OUT_CHANNELS MODEL.RESNETS.NUM_GROUPS MODEL.RESNETS.WIDTH_PER_GROUP
        MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.RESNETS.RES2_OUT_CHANNELS
        MODEL.ROI_HEADS.NUM_CLASSES MODEL.RETINANET.NUM_CLASSES MODEL.FCOS.NUM_CLASSES
        MODEL.ROI_BOX_HEAD.FC_DIM MODEL.ROI_BOX_HEAD.CONV_DIM MODEL.ROI_MASK_HEAD.CONV_DIM
        MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    """,
    _Interval(0, 2**16): "SOLVER.IMS_PER_BATCH MODEL.RFCN.CONV_DIM",
    _Interval(0, 100): """
        MODEL.ROI_BOX_HEAD.NUM_FC MODEL.ROI_BOX_HEAD.NUM_CONV MODEL.ROI_MASK_HEAD.NUM_CONV
        MODEL.RETINANET.NUM_CONVS MODEL.FCOS.NUM_CONVS
    """,
    _Interval(1, 128): """
        MODEL.QMIMIC.MIMIC.POOLER_RESOLUTION MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION
    """,
    _Interval(0, 64): """
        MODEL.QMIMIC.MIMIC.POOLER_SAMPLING_RATIO MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO
        MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO
    """,
    # a process each
    _Interval(0, 1024): "DATALOADER.NUM_WORKERS",
    _NATURAL: """
        SOLVER.WARMUP_ITERS SOLVER.STEPS SOLVER.BASE_LR SOLVER.BASE_LR_END SOLVER.GAMMA SOLVER.WEIGHT_DECAY
        SOLVER.WEIGHT_DECAY_NORM SOLVER.WEIGHT_DECAY_BIAS SOLVER.BIAS_LR_FACTOR
        TEST.EVAL_PERIOD VIS_PERIOD INPUT.MIN_SIZE_TEST DATALOADER.REPEAT_THRESHOLD
        MODEL.BACKBONE.FREEZE_AT MODEL.PROPOSAL_GENERATOR.MIN_SIZE
        MODEL.RPN.SMOOTH_L1_BETA MODEL.RPN.LOSS_WEIGHT MODEL.RPN.BBOX_REG_LOSS_WEIGHT
        MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT
        MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        MODEL.RETINANET.SMOOTH_L1_LOSS_BETA MODEL.RETINANET.FOCAL_LOSS_GAMMA
        MODEL.FCOS.FOCAL_LOSS_GAMMA MODEL.SEM_SEG_HEAD.LOSS_WEIGHT MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT
    """,
    _SHARE: """
        SOLVER.MOMENTUM SOLVER.WARMUP_FACTOR
        MODEL.RPN.POSITIVE_FRACTION MODEL.RPN.NMS_THRESH MODEL.RPN.IOU_THRESHOLDS
        MODEL.ROI_HEADS.POSITIVE_FRACTION MODEL.ROI_HEADS.IOU_THRESHOLDS MODEL.ROI_HEADS.SCORE_THRESH_TEST
        MODEL.ROI_HEADS.NMS_THRESH_TEST MODEL.ROI_BOX_CASCADE_HEAD.IOUS
        MODEL.RETINANET.IOU_THRESHOLDS MODEL.RETINANET.SCORE_THRESH_TEST MODEL.RETINANET.NMS_THRESH_TEST
        MODEL.FCOS.SCORE_THRESH_TEST MODEL.FCOS.NMS_THRESH_TEST
    """,
    _Interval(0.0, 1.0, is_open=True): "MODEL.RETINANET.PRIOR_PROB MODEL.FCOS.PRIOR_PROB",
    _POSITIVE: """
        MODEL.PIXEL_STD MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
        MODEL.RPN.BBOX_REG_WEIGHTS MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS MODEL.RETINANET.BBOX_REG_WEIGHTS
        MODEL.FCOS.CENTER_SAMPLING_RADIUS INPUT.CROP.SIZE
        SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.CLIP_GRADIENTS.NORM_TYPE
    """,
    # a label of -1 is ignored, and an alpha below 0 weighs nothing
    _Interval(-1, 1): """
        MODEL.RPN.IOU_LABELS MODEL.ROI_HEADS.IOU_LABELS MODEL.RETINANET.IOU_LABELS
        MODEL.RETINANET.FOCAL_LOSS_ALPHA MODEL.FCOS.FOCAL_LOSS_ALPHA
    """,
}
_INTERVALS = {key: interval for interval, keys in _KEYS_OF_INTERVALS.items() for key in keys.split()}

_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_CHOICES: Dict[str, Sequence[Any]] = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    # a saved config.yaml of another version is converted when it is read, or refused
    "VERSION": (2,),
}

# Numbers of entries that each innermost list may have; rotated boxes have one more.
_LENGTHS = {
    "INPUT.CROP.SIZE": (2,),
    "MODEL.RPN.BBOX_REG_WEIGHTS": (4, 5),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (4, 5),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": (4,),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (4,),
}

_NOT_EMPTY = (
    "INPUT.MIN_SIZE_TRAIN",
    "MODEL.PIXEL_MEAN",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
)

# Nodes with IOU_THRESHOLDS that cut the overlaps into classes, and IOU_LABELS, one for each class.
_MATCHERS = ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET")

# Keys for which an infinite number means something.
_MAY_BE_INFINITE = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)

# NumPy's generator takes seeds below; every process adds its rank.
_SEED_END = 2**32


def default_config() -> CfgNode:
    """Detectron2's defaults with the keys of this package."""
    cfg = get_cfg()
    add_qmimic_config(cfg)
    return cfg


def flat_keys(node: CfgNode, prefix: str = "") -> Dict[str, Any]:
    """Every value of a config by its full key, such as "SOLVER.BASE_LR"."""
    found: Dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found.update(flat_keys(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def check_values(cfg: CfgNode, num_processes: int = 1) -> None:
    """
    Raises where a value is wrong whatever the others are.

    Args:
        cfg: with any further keys, which are left alone.
        num_processes: of the whole run.

    Raises:
        ValueError: names the key, its value and what it may be.
    """
    values, defaults = flat_keys(cfg), flat_keys(default_config())
    for key, value in values.items():
        if key in defaults:
            _check_entries(key, value, defaults[key])
            _check_key(key, value)
    for node in _MATCHERS:
        _check_matcher(f"{node}.", values)
    _check_pixels(values)
    _check_sizes(values)
    _check_box_head(values)
    _check_expected_results(values["TEST.EXPECTED_RESULTS"], values["DATASETS.TEST"])
    if not -_SEED_END < values["SEED"] <= _SEED_END - num_processes:
        raise _refusal("SEED", values["SEED"], f"a number up to {_SEED_END - num_processes}, or -1 to draw one")
    if values["TEST.AUG.ENABLED"]:
        raise _refusal("TEST.AUG.ENABLED", True, "False: the evaluation here uses no test-time augmentation")


def _refusal(key: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{key} is {value!r}; give {wanted}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _innermost(value: Any) -> Iterator[Sequence[Any]]:
    if _is_flat(value):
        yield value
    else:
        for each in value:
            yield from _innermost(each)


def _is_flat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not any(isinstance(each, (list, tuple)) for each in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_entries(key: str, value: Any, default: Any) -> None:
    """Numbers are finite, and lists hold what the default's list holds. yacs looks at the outermost type alone."""
    numbers = [each for each in _leaves(value) if isinstance(each, float)]
    if any(math.isnan(each) for each in numbers):
        raise _refusal(key, value, "numbers")
    if key not in _MAY_BE_INFINITE and any(math.isinf(each) for each in numbers):
        raise _refusal(key, value, "finite numbers")
    if _is_flat(default) and default and not _is_flat(value):
        raise _refusal(key, value, f"one list without lists in it, as in {default!r}")
    wanted = list(_leaves(default)) if isinstance(default, (list, tuple)) else []
    for kind, fits in (("numbers", _is_number), ("strings", lambda each: isinstance(each, str))):
        if wanted and all(map(fits, wanted)) and not all(map(fits, _leaves(value))):
            raise _refusal(key, value, f"{kind}, as in {default!r}")


def _check_key(key: str, value: Any) -> None:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ValueError(f"{key} is {value!r}; choose one of {list(_CHOICES[key])}")
    if key in _INTERVALS:
        interval = _INTERVALS[key]
        numbers = [each for each in _leaves(value) if each is not None]  # some default to None
        if not all(_is_number(each) and each in interval for each in numbers):
            few = "numbers" if isinstance(value, (list, tuple)) else "a number"
            raise _refusal(key, value, f"{few} {interval}{_meaning_of_zero(key)}")
    if key in _NOT_EMPTY and not all(len(each) for each in _innermost(value)):
        raise _refusal(key, value, "at least one entry in each list")
    if key in _LENGTHS and any(len(each) not in _LENGTHS[key] for each in _innermost(value)):
        raise _refusal(key, value, f"{_LENGTHS[key][0]} numbers in each list")


def _meaning_of_zero(key: str) -> str:
    return " (0 = never)" if key in ("TEST.EVAL_PERIOD", "VIS_PERIOD") else ""


def _check_matcher(node: str, values: Dict[str, Any]) -> None:
    thresholds, labels = values[f"{node}IOU_THRESHOLDS"], values[f"{node}IOU_LABELS"]
    if list(thresholds) != sorted(thresholds) or not thresholds:
        raise _refusal(f"{node}IOU_THRESHOLDS", thresholds, "overlaps in rising order")
    if len(labels) != len(thresholds) + 1:
        raise ValueError(
            f"{node}IOU_LABELS is {labels} and {node}IOU_THRESHOLDS is {thresholds}; give one label more than "
            "thresholds"
        )


def _check_pixels(values: Dict[str, Any]) -> None:
    mean, std = values["MODEL.PIXEL_MEAN"], values["MODEL.PIXEL_STD"]
    if len(mean) != len(std):
        raise ValueError(
            f"MODEL.PIXEL_MEAN is {mean} and MODEL.PIXEL_STD is {std}; give both one number for each "
            "channel of an image"
        )


def _check_box_head(values: Dict[str, Any]) -> None:
    node = "MODEL.ROI_BOX_HEAD."
    if values[f"{node}NAME"] == "FastRCNNConvFCHead" and values[f"{node}NUM_FC"] + values[f"{node}NUM_CONV"] == 0:
        raise ValueError(f"{node}NUM_FC and {node}NUM_CONV are 0; give the box head {node}NAME one layer at least")


def _check_sizes(values: Dict[str, Any]) -> None:
    sizes = values["INPUT.MIN_SIZE_TRAIN"]
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range' and INPUT.MIN_SIZE_TRAIN is {sizes}; give a "
            "smallest and a largest size"
        )
    if values["INPUT.CROP.ENABLED"] and values["INPUT.CROP.TYPE"].startswith("relative"):
        if any(each > 1.0 for each in values["INPUT.CROP.SIZE"]):
            raise ValueError(
                f"INPUT.CROP.SIZE is {values['INPUT.CROP.SIZE']} and INPUT.CROP.TYPE is "
                f"{values['INPUT.CROP.TYPE']!r}; give shares of the image's sides up to 1.0, or INPUT.CROP.TYPE "
                "'absolute' for pixels"
            )


def _check_expected_results(expected: Sequence[Any], test_sets: Tuple[str, ...]) -> None:
    for each in expected:
        is_row = isinstance(each, (list, tuple)) and len(each) == 4
        if not (is_row and all(isinstance(name, str) for name in each[:2]) and all(map(_is_number, each[2:]))):
            raise _refusal("TEST.EXPECTED_RESULTS", expected, "rows such as ['bbox', 'AP', 38.5, 0.2]")
        if each[2] - each[3] > 100.0:
            raise _refusal("TEST.EXPECTED_RESULTS", expected, "figures that can be reached: an AP is at most 100")
    if expected and not test_sets:
        raise _refusal("TEST.EXPECTED_RESULTS", expected, "[], or name a data set in DATASETS.TEST to evaluate on")
