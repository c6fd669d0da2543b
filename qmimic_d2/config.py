"""Every config key of this package. ``docs/config.md`` is generated from the comments here."""

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

__all__ = ["add_qmimic_config", "default_config"]


def default_config() -> CN:
    """Detectron2's defaults with the keys of this package; not frozen."""
    cfg = get_cfg()
    add_qmimic_config(cfg)
    return cfg


def add_qmimic_config(cfg: CN) -> None:
    """
    Adds the keys of this package to a ``get_cfg()``, and changes none of the others.

    Calling it twice is harmless: keys that are there keep their values.

    Args:
        cfg: a Detectron2 config that is not frozen.
    """
    if "QMIMIC" in cfg.MODEL:
        return
    # Teacher, quantizers and mimic loss.
    cfg.MODEL.QMIMIC = _qmimic_node()
    # The VGG backbones of this package.
    cfg.MODEL.VGG = _vgg_node()
    # R-FCN: read by MODEL.ROI_HEADS.NAME "RFCNROIHeads" alone.
    cfg.MODEL.RFCN = _rfcn_node()
    # Another project's node of this name keeps its keys and values.
    others = cfg.MODEL.get("FCOS", CN())
    # FCOS, as QuantFCOS and QuantMimicFCOS read it.
    cfg.MODEL.FCOS = _fcos_node()
    cfg.MODEL.FCOS.update(others)
    _add_resnet_keys(cfg)
    _add_solver_keys(cfg)
    _add_dataset_keys(cfg)
    # Where a training writes its scalars next to metrics.json and TensorBoard; docs/training.md says more.
    cfg.TRACKERS = _trackers_node()
    _refuse_earlier_names(cfg)


def _qmimic_node() -> CN:
    node = CN()

    # The detector that MODEL.META_ARCHITECTURE "QuantMimic" builds: any registered name, such as "PanopticFPN" or a
    # class of your own. It then gets the quantizer and the mimic of this node. "" = none; read by "QuantMimic" alone.
    node.META_ARCHITECTURE = ""

    # The frozen teacher that a QuantMimic, QuantMimicRCNN, QuantMimicRetinaNet or QuantMimicFCOS imitates.
    node.TEACHER = CN()
    # The teacher's own YAML, or LazyConfig `.py`. It is looked up beside the student's YAML (train_net.py),
    # from the working directory, and among the configs of this package. A YAML is data. A `.py` is Python code
    # that a training runs: name only those that you trust. "" = no teacher: the mimic is off.
    node.TEACHER.CONFIG_FILE = ""
    # The function that adds the keys of the teacher's project to a config, for a YAML of PointRend, DeepLab and the
    # like: "package.module:add_xxx_config". A training imports that module, which runs its code and registers what
    # it registers, and calls the function with the teacher's config. "" = none: keys that Detectron2 does not know
    # are taken from the YAML alone.
    node.TEACHER.ADD_CONFIG = ""
    # The teacher's checkpoint: a path or URL that Detectron2 can open. "" = MODEL.WEIGHTS of its YAML
    # (train.init_checkpoint of a LazyConfig).
    node.TEACHER.WEIGHTS = ""
    # Further KEY VALUE pairs for the teacher's config (`key=value` strings for a LazyConfig).
    node.TEACHER.OPTS = []
    # Factor by which the student's input image is enlarged (bilinear) for the teacher. 2.0 lets a
    # teacher of stride 16 meet a student of stride 8. 1.0 = the same image.
    node.TEACHER.INPUT_SCALE = 1.0

    # Folder in which the teacher's maps are kept: each is computed once, and read when the same pixels come again
    # (docs/teacher_cache.md). Trainings, processes and machines may share it. "" = none: the teacher runs every step.
    node.TEACHER.CACHE = ""
    # Largest size of that folder, in gigabytes (10^9 bytes); what was used longest ago makes room.
    node.TEACHER.CACHE_GB = 10.0

    # The code dictionary that teacher and student share. This node is the only authority on codes.
    node.QUANTIZER = CN()
    # "Uniform" {0, s, 2s, ...}, "PowerOfTwo" {0, s, 2s, 4s, ...}, "Clamp" (the ReLU without rounding:
    # the control), or "" for none.
    node.QUANTIZER.NAME = "Uniform"
    # s > 0, in units of the feature: distance between codes (power of two: the first nonzero code).
    # It is relative to the scale of the features; `python -m qmimic_d2 calibrate` recommends one.
    node.QUANTIZER.STRIDE = 1.0
    # Above 0.0, train_net.py sets STRIDE: this many times the root mean square of the teacher's features inside
    # annotated boxes, measured on 100 training images when the training begins. OUTPUT_DIR/config.yaml then holds the
    # number, and 0.0 here. 0.55 cost no AP in the evidence, 1.1 did. 0.0 = STRIDE as it is.
    node.QUANTIZER.RELATIVE_STRIDE = 0.0
    # Size of the dictionary, zero included; values above the last code saturate. 0 = unbounded.
    node.QUANTIZER.NUM_CODES = 0
    # Mirrored dictionary for maps that no ReLU ends, such as FPN outputs: L codes become 2L - 1.
    node.QUANTIZER.SIGNED = False
    # Backbone outputs that the model quantizes; [] = those that the detector's heads read: MODEL.ROI_HEADS.IN_FEATURES,
    # MODEL.RETINANET.IN_FEATURES or MODEL.FCOS.IN_FEATURES.
    node.QUANTIZER.IN_FEATURES = []
    # Quantize the model's own features by a hook on its backbone: its heads read codes, in training and in
    # inference. A quantized teacher has this, too.
    node.QUANTIZER.ON_BACKBONE = True

    # The RoI mimic loss.
    node.MIMIC = CN()
    # lambda >= 0, the weight of the mimic loss. 0.0 = measure the match, train without it.
    node.MIMIC.LOSS_WEIGHT = 1.0
    # lambda over time: "constant"; "warmup", linear from 0 to LOSS_WEIGHT in WARMUP_ITERS; "cosine", from
    # LOSS_WEIGHT to 0 at SOLVER.MAX_ITER; "step", times GAMMA at each of STEPS; or "balanced", which keeps the
    # mimic's share of the gradient at the student's feature map at BALANCE_SHARE.
    node.MIMIC.SCHEDULE = "constant"
    # Length of the linear warm-up of lambda, in iterations. Read by SCHEDULE "warmup" alone.
    node.MIMIC.WARMUP_ITERS = 500
    # Iterations, rising, from which lambda is multiplied by GAMMA once more. Read by SCHEDULE "step" alone.
    node.MIMIC.STEPS = []
    # That factor, above 0.0 and up to 1.0.
    node.MIMIC.GAMMA = 0.1
    # Whatever the schedule, the mimic is off from this iteration on. 0 = never.
    node.MIMIC.STOP_ITER = 0
    # Wanted |mimic| / (|mimic| + |detection|) of the two gradients' norms at the student's compared maps, between
    # 0.0 and 1.0; 0.8 did best on the digits (docs/evidence.md). SCHEDULE "balanced" reads this and the next three
    # keys; LOSS_WEIGHT then only has to be above 0.0.
    node.MIMIC.BALANCE_SHARE = 0.8
    # Iterations between two measurements of the gradients, which cost about a third of a step each.
    node.MIMIC.BALANCE_PERIOD = 10
    # Momentum of the running mean of the norms' ratio, from 0.0 to below 1.0: 0.9 remembers ten measurements.
    node.MIMIC.BALANCE_MOMENTUM = 0.9
    # Smallest and largest balanced lambda.
    node.MIMIC.BALANCE_BOUNDS = [0.0001, 10000.0]
    # What the sum of squared differences is divided by. "roi": 2N, the paper's; "element": 2N times
    # the C*h*w entries of an RoI; "target": the sum of squares of the teacher's entries, times 2
    # (dimensionless: a weight found once serves other teachers, strides and resolutions; not other students).
    node.MIMIC.NORMALIZE_BY = "roi"
    # Student maps that are compared; [] = those that the detector's heads read.
    node.MIMIC.IN_FEATURES = []
    # Teacher maps they are compared with, in the same order; [] = the same names.
    node.MIMIC.TEACHER_IN_FEATURES = []
    # Quantize the student's side of the mimic loss: Q(r(f_s)).
    node.MIMIC.QUANTIZE_STUDENT = True
    # Quantize the teacher's side: Q(f_t).
    node.MIMIC.QUANTIZE_TEACHER = True
    # Sources of the regions that are compared; several give their union. "sampled": the proposals that the RoI heads
    # sampled for their own losses; "proposals": all of the proposal generator's; "teacher_proposals": those of the
    # teacher's, which runs for this alone; "ground_truth": the annotated boxes; "neighbourhood": these and boxes
    # near them. ["whole_map"]: every cell of the map, the plain feature mimic. One-stage students have neither
    # "sampled" nor "proposals", and need another value than the default.
    node.MIMIC.ROI_SOURCE = ["sampled"]
    # How far a neighbour of an annotated box may be shifted, and how much larger or smaller it may be, as a
    # share of the box's sides, from 0.0 to below 1.0. Read by ROI_SOURCE "neighbourhood" alone.
    node.MIMIC.JITTER = 0.25
    # Neighbours of each annotated box. Read by ROI_SOURCE "neighbourhood" alone.
    node.MIMIC.NUM_NEIGHBOURS = 4
    # Most regions per image, the first ones of the source (sampled proposals stand foreground first,
    # a generator's by falling score, neighbours behind the annotated boxes). 0 = all.
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
    # "branch": r is used in the mimic loss alone and dropped after training. "trunk": r is a part of the student,
    # whose heads then read Q(r(f_s)) in the teacher's channels, in training and in inference.
    node.MIMIC.ADAPTER_PLACEMENT = "branch"
    # Width of each map behind its adapter in the trunk; [] = the teacher's. train_net.py writes the number into
    # OUTPUT_DIR/config.yaml, where the shipped student, which has no teacher, finds it.
    node.MIMIC.TRUNK_CHANNELS = []
    # Begin with the teacher's weights in proposal generator and RoI heads (one-stage: in the head), which must be
    # built alike: with ADAPTER_PLACEMENT "trunk", or where student and teacher have equally many channels.
    node.MIMIC.INIT_HEADS_FROM_TEACHER = False

    # What is measured of student and teacher beside the losses, all under `qmimic/` in metrics.json and TensorBoard;
    # docs/diagnostics.md explains the figures.
    node.DIAGNOSTICS = CN()
    # Iterations between two comparisons of student and teacher inside the mimic's regions of the training
    # batch. 0 = never.
    node.DIAGNOSTICS.PERIOD = 20
    # At each evaluation, student and teacher are also compared inside the annotated boxes of this many
    # images of the first test set, at equal distances in it; all of them where there are fewer. 0 = never.
    node.DIAGNOSTICS.EVAL_IMAGES = 100
    # Iterations between two measurements of the mimic's and the detection losses' gradients, at the student's
    # compared maps and at the backbone's parameters. One costs about half a step. 0 = never.
    node.DIAGNOSTICS.GRADIENT_PERIOD = 100
    return node


def _vgg_node() -> CN:
    node = CN()

    # Which VGG, by its count of layers with weights, the three fully connected ones (absent here)
    # included. Options: 11, 13, 16.
    node.DEPTH = 16

    # Every channel count (64, 128, 256, 512, 512) is divided by this: 32 makes VGG-1-32, whose
    # stages are 2, 4, 8, 16 and 16 channels wide. 1 = the full network, which ImageNet weights
    # fit. Must divide 64.
    node.WIDTH_DIVISOR = 1

    # Normalization between each convolution and its ReLU. Options: "" (plain VGG; the convolutions
    # have a bias), "BN", "SyncBN", "FrozenBN", "GN". "GN" has 32 groups as in Detectron2 where
    # the width allows, else as many as leave at least two channels in each. "FrozenBN" normalizes
    # nothing until trained statistics are loaded.
    node.NORM = ""

    # Whether the last convolution of the network carries the norm too. False leaves the scale of
    # the last feature free, as in a VGG without normalization; that convolution then has a bias.
    # No effect with NORM "". With FPN, "last" is the last of the bottom-up network.
    node.LAST_NORM = True

    # Features to return, from "conv1" to "conv5": each stage's output behind its last ReLU and
    # before the next pooling. Stages after the last one named are not built.
    node.OUT_FEATURES = ["conv5"]

    # How much each of the five stages downsamples. The first number is the stride of the very
    # first convolution; each other is kernel and stride of the max pooling before that stage, 1 =
    # no pooling. The stride of a feature, in pixels of the input, is the product up to its stage:
    # the default gives conv5 at 16, [2, 2, 2, 1, 1] gives it at 8.
    node.STAGE_STRIDES = [1, 2, 2, 2, 2]

    # Freeze the first stages: 0 = none, 1 = conv1, 2 = conv1 and conv2, up to 5. Their parameters
    # get no gradient and their BatchNorm becomes FrozenBN. Takes the place of
    # MODEL.BACKBONE.FREEZE_AT, whose default (2) would freeze random weights in a network that is
    # trained from scratch; the VGG does not read that one.
    node.FREEZE_AT = 0

    # Kind of every convolution but the first, for tiny networks of equal cost to compare with: "plain";
    # "group", with CONV_GROUPS groups that nothing mixes; or "depthwise", a depthwise 3x3 convolution
    # and a 1x1 convolution, with norm and ReLU each, as in MobileNet. ImageNet weights fit "plain" only.
    node.CONV = "plain"

    # Groups of CONV "group"; must divide every channel count. No other kind reads it.
    node.CONV_GROUPS = 2
    return node


def _rfcn_node() -> CN:
    node = CN()

    # k: every region is cut into k x k bins, each with score maps of its own, k * k * (classes + 1) for
    # the classes and k * k * 4 for the boxes (times the classes, unless
    # MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is True). 7 is the paper's, for objects of some ten cells;
    # smaller objects want fewer bins.
    node.NUM_BINS = 7

    # "PSROIPool": the paper's, regions rounded to whole cells; "PSROIAlign": bilinear samples, nothing is
    # rounded. Both measure a map from the corner of its first cell, as "ROIAlignV2" does.
    node.POOLER_TYPE = "PSROIPool"

    # Samples per bin and axis of "PSROIAlign", 1 or more.
    node.SAMPLING_RATIO = 2

    # Channels of the convolution with ReLU between the feature and the score maps; the paper's has 1024,
    # on a ResNet-101. 0 = none.
    node.CONV_DIM = 1024

    # Its kernel size: 1, the paper's, or 3.
    node.CONV_KERNEL = 1

    # Its normalization. Options: "", "BN", "SyncBN", "FrozenBN", "GN", as in MODEL.VGG.NORM.
    node.CONV_NORM = ""

    # B, for online hard example mining: every proposal is predicted, and only the B of each image whose
    # loss is highest are trained on. The paper takes 128 of 300. 0 = Detectron2's random sampling;
    # otherwise MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION have no effect.
    node.HARD_EXAMPLES = 0

    # Of two proposals whose IoU is above it, only the one with the higher loss may be a hard example.
    # 1.0 = no such suppression, as in R-FCN; the paper on hard example mining has 0.7.
    node.HARD_EXAMPLE_NMS_THRESH = 1.0
    return node


def _fcos_node() -> CN:
    node = CN()

    # Number of foreground classes.
    node.NUM_CLASSES = 80

    # Backbone outputs that the head reads, finest first. The finest takes the smallest objects and the coarsest the
    # largest; a level in between takes those whose farthest side lies 4 to 8 of its strides from the cell.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]

    # Convolutions of each of the head's two branches before its outputs, 1 or more, as wide as the maps.
    node.NUM_CONVS = 4

    # Normalization behind each of them: "GN" (with fewer than 32 groups where the maps are narrow), "BN" (of each
    # level its own), "SyncBN", "FrozenBN", or "" for none.
    node.NORM = "GN"

    # Classification scores that an untrained head gives every cell.
    node.PRIOR_PROB = 0.01

    # A cell is a positive example only if it lies within this many strides of the object's center.
    node.CENTER_SAMPLING_RADIUS = 1.5

    # alpha of the focal loss on the classes: weight of the positive examples.
    node.FOCAL_LOSS_ALPHA = 0.25
    # Its gamma: how much less well-classified examples count.
    node.FOCAL_LOSS_GAMMA = 2.0

    # At inference, boxes below this score are dropped. A score is the root of class score times centerness.
    node.SCORE_THRESH_TEST = 0.2
    # Best boxes of each level that are kept before NMS.
    node.TOPK_CANDIDATES_TEST = 1000
    # Of two boxes of one class that overlap by more than this IoU, the one that scores less is dropped.
    node.NMS_THRESH_TEST = 0.6
    return node


def _add_resnet_keys(cfg: CN) -> None:
    # The keys below are read by build_divided_resnet_backbone, build_divided_resnet_fpn_backbone and
    # build_divided_retinanet_resnet_fpn_backbone only, never by Detectron2's own build_resnet_backbone.

    # Every channel count is divided by this, the stem's and the bottlenecks' included: DEPTH 18
    # with 16 makes ResNet18-1-16, 4 channels in the stem and 4, 8, 16, 32 in res2 to res5.
    # 1 = the full network. A divided network has no ImageNet weights, so set
    # MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM "BN" to train it from scratch.
    cfg.MODEL.RESNETS.WIDTH_DIVISOR = 1

    # Stride of the first block of res2, res3, res4, res5; the stem before them has stride 4. The
    # default gives res5 at stride 32, [1, 2, 2, 1] at 16. The first must be 1 with DEPTH 18 and
    # 34, whose first block has no projection that could follow a stride. RES5_DILATION 2 sets
    # res5's stride to 1, as it does in Detectron2.
    cfg.MODEL.RESNETS.STAGE_STRIDES = [1, 2, 2, 2]

    # Kind of every 3x3 convolution behind the stem: "plain", "group" or "depthwise", as in
    # MODEL.VGG.CONV. The other two want NUM_GROUPS 1.
    cfg.MODEL.RESNETS.CONV = "plain"

    # Groups of CONV "group"; must divide every channel count. No other kind reads it.
    cfg.MODEL.RESNETS.CONV_GROUPS = 2


def _add_solver_keys(cfg: CN) -> None:
    # Optimizer of train_net.py: "SGD" (Detectron2's own, with SOLVER.MOMENTUM and NESTEROV) or
    # "AdamW" (with SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY).
    cfg.SOLVER.OPTIMIZER = "SGD"


def _add_dataset_keys(cfg: CN) -> None:
    # Data sets of your own, which DATASETS.TRAIN and TEST may name; dicts: {NAME: "cells_train", FORMAT: "coco",
    # PATH: "train.json", IMAGES: "photos"}, {NAME: ..., FORMAT: "voc", PATH: "folder", SPLIT: "train"} or {NAME: ...,
    # FORMAT: "yolo", PATH: "data.yaml", SPLIT: "val"}. CLASSES gives the names of the classes in the order of their
    # labels; without it they come from the data. Paths count from the YAML or the working directory.
    cfg.DATASETS.SOURCES = []


def _trackers_node() -> CN:
    node = CN()

    # Project of Weights & Biases to which a training of train_net.py writes its scalars and its config. "" = off.
    node.WANDB = ""

    # Tracking URI of MLflow for the same: "http://host:5000", "sqlite:///mlflow.db", "databricks". "" = off.
    node.MLFLOW = ""
    return node


def _refuse_earlier_names(cfg: CN) -> None:
    # Whoever merges an earlier name gets a KeyError with the new one.
    node = "MODEL.QMIMIC"
    cfg.register_renamed_key(f"{node}.QUANTIZER.TEACHER_ON", f"{node}.MIMIC.QUANTIZE_TEACHER")
    cfg.register_renamed_key(
        f"{node}.QUANTIZER.STUDENT_AT",
        f"{node}.QUANTIZER.ON_BACKBONE and {node}.MIMIC.QUANTIZE_STUDENT",
        message="The first is True where the list held 'features', the second where it held 'mimic'",
    )
