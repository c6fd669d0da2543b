"""Every config key of this package. ``docs/config.md`` is generated from the comments here."""

from detectron2.config import CfgNode as CN

from qmimic_d2.modeling.backbone.config import add_backbone_config

__all__ = ["add_qmimic_config"]


def add_qmimic_config(cfg: CN) -> None:
    """
    Adds the keys of this package to a ``get_cfg()``, and changes none of the others.

    Calling it twice is harmless: keys that are there keep their values.

    Args:
        cfg: a Detectron2 config that is not frozen.
    """
    if "QMIMIC" not in cfg.MODEL:
        cfg.MODEL.QMIMIC = _qmimic_node()
        _add_solver_keys(cfg)
    add_backbone_config(cfg)


def _qmimic_node() -> CN:
    node = CN()

    # The frozen teacher that a QuantMimicRCNN imitates.
    node.TEACHER = CN()
    # The teacher's own YAML, or LazyConfig `.py` (which is Python code and runs when it is read). It
    # is looked up beside the student's YAML (train_net.py), from the working directory, and among the
    # configs of this package. "" = no teacher: the mimic is off.
    node.TEACHER.CONFIG_FILE = ""
    # The teacher's checkpoint: a path or URL that Detectron2 can open. "" = MODEL.WEIGHTS of its YAML
    # (train.init_checkpoint of a LazyConfig).
    node.TEACHER.WEIGHTS = ""
    # Further KEY VALUE pairs for the teacher's config (`key=value` strings for a LazyConfig).
    node.TEACHER.OPTS = []
    # Factor by which the student's input image is enlarged (bilinear) for the teacher. 2.0 lets a
    # teacher of stride 16 meet a student of stride 8. 1.0 = the same image.
    node.TEACHER.INPUT_SCALE = 1.0

    # The code dictionary that teacher and student share. This node is the only authority on codes.
    node.QUANTIZER = CN()
    # "Uniform" {0, s, 2s, ...}, "PowerOfTwo" {0, s, 2s, 4s, ...}, "Clamp" (the ReLU without rounding:
    # the control), or "" for none.
    node.QUANTIZER.NAME = "Uniform"
    # s > 0, in units of the feature: distance between codes (power of two: the first nonzero code).
    # It is relative to the scale of the features; `python -m qmimic_d2 calibrate` recommends one.
    node.QUANTIZER.STRIDE = 1.0
    # Size of the dictionary, zero included; values above the last code saturate. 0 = unbounded.
    node.QUANTIZER.NUM_CODES = 0
    # Mirrored dictionary for maps that no ReLU ends, such as FPN outputs: L codes become 2L - 1.
    node.QUANTIZER.SIGNED = False
    # Backbone outputs that the model quantizes; [] = those that the RoI heads read.
    node.QUANTIZER.IN_FEATURES = []
    # Quantize the teacher's features.
    node.QUANTIZER.TEACHER_ON = True
    # Where the model's own features are quantized. "features": by a hook on its backbone, so that its
    # heads read codes in training and in inference (a quantized teacher, too, has this); "mimic":
    # around the adapter inside the mimic loss, Q(r(f_s)). Both, one, or [] for neither.
    node.QUANTIZER.STUDENT_AT = ["features", "mimic"]

    # The RoI mimic loss.
    node.MIMIC = CN()
    # lambda >= 0, the weight of the mimic loss. 0.0 = measure the match, train without it.
    node.MIMIC.LOSS_WEIGHT = 1.0
    # lambda over time: "constant", or "warmup" (linear from 0 to LOSS_WEIGHT in WARMUP_ITERS).
    node.MIMIC.SCHEDULE = "constant"
    # Length of the linear warm-up of lambda, in iterations. Read by SCHEDULE "warmup" alone.
    node.MIMIC.WARMUP_ITERS = 500
    # What the sum of squared differences is divided by. "roi": 2N, the paper's; "element": 2N times
    # the C*h*w entries of an RoI; "target": the sum of squares of the teacher's entries, times 2
    # (dimensionless: a weight found once serves other teachers, strides and resolutions).
    node.MIMIC.NORMALIZE_BY = "roi"
    # Student maps that are compared; [] = those that the RoI heads read.
    node.MIMIC.IN_FEATURES = []
    # Teacher maps they are compared with, in the same order; [] = the same names.
    node.MIMIC.TEACHER_IN_FEATURES = []
    # Regions that are compared. "sampled": the proposals that the RoI heads sampled for their own
    # losses; "proposals": all of the proposal generator's; "ground_truth": the annotated boxes.
    node.MIMIC.ROI_SOURCE = "sampled"
    # Most regions per image, the first ones of the source (sampled proposals stand foreground first,
    # the generator's by falling score). 0 = all.
    node.MIMIC.MAX_ROIS_PER_IMAGE = 0
    # "ROIAlignV2", "ROIAlign" (without the half-pixel offset) or "ROIPool".
    node.MIMIC.POOLER_TYPE = "ROIAlignV2"
    # Height and width, in bins, to which every region is pooled.
    node.MIMIC.POOLER_RESOLUTION = 7
    # Samples per bin and axis of ROIAlign; 0 = as many as the region's size asks for.
    node.MIMIC.POOLER_SAMPLING_RATIO = 0
    # r, which brings the student's channels to the teacher's: "conv1x1" (linear, as in the equation),
    # "conv1x1_relu", or "" for none (the channels must be equal).
    node.MIMIC.ADAPTER = "conv1x1"
    # Iterations between two measurements of the RoI match ratio. 0 = never.
    node.MIMIC.MATCH_PERIOD = 20
    return node


def _add_solver_keys(cfg: CN) -> None:
    # Optimizer of train_net.py: "SGD" (Detectron2's own, with SOLVER.MOMENTUM and NESTEROV) or
    # "AdamW" (with SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY).
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"
