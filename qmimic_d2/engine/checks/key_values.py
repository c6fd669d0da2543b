"""Which values the keys of Detectron2 may have, as far as a table can say it."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

from detectron2.config import CfgNode

from qmimic_d2.config import default_config
from qmimic_d2.yaml.config import flat_keys

__all__ = ["check_values"]


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


_COUNT = _Interval(1)

# Every number of a value, however deep in lists, must lie in its key's interval. "*" stands for any node.
_KEYS_OF_INTERVALS = {
    _COUNT: """
        SOLVER.CHECKPOINT_PERIOD SOLVER.MAX_ITER SOLVER.NUM_DECAYS TEST.DETECTIONS_PER_IMAGE TEST.PRECISE_BN.NUM_ITER
        INPUT.MIN_SIZE_TRAIN INPUT.MAX_SIZE_TRAIN INPUT.MAX_SIZE_TEST
        DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TRAIN
        MODEL.RPN.POST_NMS_TOPK_TEST *.BATCH_SIZE_PER_IMAGE *.TOPK_CANDIDATES_TEST
    """,
    # more is a slip of the hand that takes all memory
    _Interval(1, 2**16): """
        MODEL.FPN.OUT_CHANNELS MODEL.RESNETS.NUM_GROUPS MODEL.RESNETS.WIDTH_PER_GROUP
        MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.RESNETS.RES2_OUT_CHANNELS *.NUM_CLASSES
        MODEL.ROI_BOX_HEAD.FC_DIM MODEL.ROI_BOX_HEAD.CONV_DIM MODEL.ROI_MASK_HEAD.CONV_DIM
        MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    """,
    _Interval(0, 2**16): "SOLVER.IMS_PER_BATCH MODEL.RFCN.CONV_DIM",
    _Interval(0, 100): "MODEL.ROI_BOX_HEAD.NUM_FC *.NUM_CONV *.NUM_CONVS",
    _Interval(1, 128): "*.POOLER_RESOLUTION",
    _Interval(0, 64): "*.POOLER_SAMPLING_RATIO",
    # a process each
    _Interval(0, 1024): "DATALOADER.NUM_WORKERS",
    _Interval(0): """
        SOLVER.WARMUP_ITERS SOLVER.STEPS SOLVER.BASE_LR SOLVER.BASE_LR_END SOLVER.GAMMA SOLVER.WEIGHT_DECAY
        SOLVER.WEIGHT_DECAY_NORM SOLVER.WEIGHT_DECAY_BIAS SOLVER.BIAS_LR_FACTOR
        TEST.EVAL_PERIOD VIS_PERIOD INPUT.MIN_SIZE_TEST DATALOADER.REPEAT_THRESHOLD
        MODEL.BACKBONE.FREEZE_AT MODEL.PROPOSAL_GENERATOR.MIN_SIZE MODEL.RPN.LOSS_WEIGHT
        MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        MODEL.SEM_SEG_HEAD.LOSS_WEIGHT MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT
        *.SMOOTH_L1_BETA *.SMOOTH_L1_LOSS_BETA *.BBOX_REG_LOSS_WEIGHT *.FOCAL_LOSS_GAMMA
    """,
    _Interval(0.0, 1.0): """
        SOLVER.MOMENTUM SOLVER.WARMUP_FACTOR MODEL.RPN.NMS_THRESH MODEL.ROI_BOX_CASCADE_HEAD.IOUS
        *.POSITIVE_FRACTION *.IOU_THRESHOLDS *.SCORE_THRESH_TEST *.NMS_THRESH_TEST
    """,
    _Interval(0.0, 1.0, is_open=True): "*.PRIOR_PROB",
    _Interval(0.0, is_open=True): """
        MODEL.PIXEL_STD MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS INPUT.CROP.SIZE
        MODEL.FCOS.CENTER_SAMPLING_RADIUS SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.CLIP_GRADIENTS.NORM_TYPE
        *.BBOX_REG_WEIGHTS
    """,
    # a label of -1 is ignored, and an alpha below 0 weighs nothing
    _Interval(-1, 1): "*.IOU_LABELS *.FOCAL_LOSS_ALPHA",
}
_INTERVALS = {key: interval for interval, keys in _KEYS_OF_INTERVALS.items() for key in keys.split()}

_CHOICES: Dict[str, Sequence[Any]] = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "*.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    # a saved config.yaml of another version is converted when it is read, or refused
    "VERSION": (2,),
}

# Numbers of entries of each innermost list; rotated boxes have one more.
_LENGTHS = {
    "INPUT.CROP.SIZE": _Interval(2, 2),
    "*.BBOX_REG_WEIGHTS": _Interval(4, 4),
    "MODEL.RPN.BBOX_REG_WEIGHTS": _Interval(4, 5),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _Interval(4, 5),
    "INPUT.MIN_SIZE_TRAIN": _COUNT,
    "MODEL.PIXEL_MEAN": _COUNT,
    "MODEL.ANCHOR_GENERATOR.SIZES": _COUNT,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _COUNT,
}

# Nodes with IOU_THRESHOLDS that cut the overlaps into classes, and IOU_LABELS, one for each class.
_MATCHERS = ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET")

# NumPy's generator takes seeds below; every process adds its rank.
_SEED_END = 2**32


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
            wanted = _wanted_alone(key, value, defaults[key])
            if wanted:
                _refuse(values, key, wanted)
    _check_together(values)
    if not -_SEED_END < values["SEED"] <= _SEED_END - num_processes:
        _refuse(values, "SEED", f"a number up to {_SEED_END - num_processes}, or -1 to draw one")
    if values["TEST.AUG.ENABLED"]:
        _refuse(values, "TEST.AUG.ENABLED", "False: the evaluation here uses no test-time augmentation")


def _refuse(values: Dict[str, Any], keys: str, wanted: str) -> None:
    raise ValueError(f"{' and '.join(f'{key} is {values[key]!r}' for key in keys.split())}; give {wanted}")


def _wanted_alone(key: str, value: Any, default: Any) -> str:
    """What to give in place of a value that is wrong by itself; "" for one that is not. yacs looks at types alone."""
    leaves, wanted = list(_leaves(value)), list(_leaves(default))
    # the largest entry of a gradient is a norm, too
    if key != "SOLVER.CLIP_GRADIENTS.NORM_TYPE" and any(isinstance(x, float) and not math.isfinite(x) for x in leaves):
        return "finite numbers"
    if isinstance(default, (list, tuple)) and wanted:
        if _lists(default) == [default] and _lists(value) != [value]:
            return f"one list without lists in it, as in {default!r}"
        for kind, fits in (("numbers", _is_number), ("strings", lambda each: isinstance(each, str))):
            if all(map(fits, wanted)) and not all(map(fits, leaves)):
                return f"{kind}, as in {default!r}"
    choices, interval, length = (_of_key(table, key) for table in (_CHOICES, _INTERVALS, _LENGTHS))
    if choices and value not in choices:
        return f"one of {list(choices)}"
    # some keys default to None
    if interval and not all(each is None or _is_number(each) and each in interval for each in leaves):
        few = "numbers" if isinstance(value, (list, tuple)) else "a number"
        return f"{few} {interval}{' (0 = never)' if key in ('TEST.EVAL_PERIOD', 'VIS_PERIOD') else ''}"
    if length and not all(len(each) in length for each in _lists(value)):
        return f"{length.low} numbers in each list{' at least' if length is _COUNT else ''}"
    return ""


def _of_key(table: Dict[str, Any], key: str) -> Any:
    return table.get(key) or table.get(f"*.{key.rpartition('.')[2]}")


def _leaves(value: Any) -> Iterator[Any]:
    for each in value if isinstance(value, (list, tuple)) else ():
        yield from _leaves(each)
    if not isinstance(value, (list, tuple)):
        yield value


def _lists(value: Any) -> List[Any]:
    """The innermost lists of a list; a value that is no list stands for itself."""
    if not isinstance(value, (list, tuple)) or not any(isinstance(each, (list, tuple)) for each in value):
        return [value]
    return [found for each in value for found in _lists(each)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_together(values: Dict[str, Any]) -> None:
    """Refuses values that do not fit each other."""
    for node in _MATCHERS:
        thresholds = values[f"{node}.IOU_THRESHOLDS"]
        if list(thresholds) != sorted(thresholds) or not thresholds:
            _refuse(values, f"{node}.IOU_THRESHOLDS", "overlaps in rising order")
        if len(values[f"{node}.IOU_LABELS"]) != len(thresholds) + 1:
            _refuse(values, f"{node}.IOU_LABELS {node}.IOU_THRESHOLDS", "one label more than thresholds")
    if len(values["MODEL.PIXEL_MEAN"]) != len(values["MODEL.PIXEL_STD"]):
        _refuse(values, "MODEL.PIXEL_MEAN MODEL.PIXEL_STD", "both one number for each channel of an image")
    head = "MODEL.ROI_BOX_HEAD."
    if values[f"{head}NAME"] == "FastRCNNConvFCHead" and values[f"{head}NUM_FC"] + values[f"{head}NUM_CONV"] == 0:
        _refuse(values, f"{head}NUM_FC {head}NUM_CONV {head}NAME", "the box head one layer at least")
    sizes = values["INPUT.MIN_SIZE_TRAIN"]
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        _refuse(values, "INPUT.MIN_SIZE_TRAIN_SAMPLING INPUT.MIN_SIZE_TRAIN", "a smallest and a largest size")
    if values["INPUT.CROP.ENABLED"] and values["INPUT.CROP.TYPE"].startswith("relative"):
        if max(values["INPUT.CROP.SIZE"]) > 1.0:
            wanted = "shares of the image's sides up to 1.0, or INPUT.CROP.TYPE 'absolute' for pixels"
            _refuse(values, "INPUT.CROP.SIZE INPUT.CROP.TYPE", wanted)
    expected = values["TEST.EXPECTED_RESULTS"]
    if not all(map(_is_expected_row, expected)):
        _refuse(values, "TEST.EXPECTED_RESULTS", "rows such as ['bbox', 'AP', 38.5, 0.2]")
    if any(result - tolerance > 100.0 for _, _, result, tolerance in expected):
        _refuse(values, "TEST.EXPECTED_RESULTS", "figures that can be reached: an AP is at most 100")
    if expected and not values["DATASETS.TEST"]:
        _refuse(values, "TEST.EXPECTED_RESULTS", "[], or name a data set in DATASETS.TEST to evaluate on")


def _is_expected_row(row: Any) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != 4:
        return False
    return all(isinstance(name, str) for name in row[:2]) and all(map(_is_number, row[2:]))
