"""Values of Detectron2's keys that are wrong whatever the others are: the message names key, value and fix."""

from pathlib import Path

import pytest
import yaml
from helpers import tiny_cfg

from qmimic_d2.config import default_config
from qmimic_d2.engine import load_config
from qmimic_d2.engine.checks.key_values import check_values
from qmimic_d2.yaml.config import flat_keys

CONFIGS = sorted(Path(__file__).resolve().parent.parent.glob("configs/**/*.yaml"))

# KEY VALUE pairs, the key that the message names first, and other words of it.
WRONG = [
    (("SOLVER.CHECKPOINT_PERIOD", 0), ">= 1"),
    (("SOLVER.CHECKPOINT_PERIOD", -5), ">= 1"),
    (("SOLVER.BASE_LR", float("nan")), "numbers"),
    (("SOLVER.BASE_LR", float("inf")), "finite"),
    (("SOLVER.BASE_LR", -0.1), ">= 0"),
    (("SOLVER.MOMENTUM", 2.0), "from 0.0 to 1.0"),
    (("SOLVER.WARMUP_FACTOR", -1.0), "from 0.0 to 1.0"),
    (("SOLVER.WARMUP_METHOD", "foo"), "'linear'"),
    (("SOLVER.WEIGHT_DECAY_BIAS", -1.0), ">= 0"),
    (("SOLVER.WEIGHT_DECAY_BIAS", "foo"), ">= 0"),
    (("SOLVER.IMS_PER_BATCH", 10**6), "65536"),
    (("INPUT.CROP.SIZE", [[0.5, 0.5]]), "without lists"),
    (("SOLVER.STEPS", (-1,)), ">= 0"),
    (("SOLVER.STEPS", ("a",)), "numbers"),
    (("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0), "> 0.0"),
    (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "both"), "'norm'"),
    (("TEST.EVAL_PERIOD", -3), "0 = never"),
    (("TEST.DETECTIONS_PER_IMAGE", 0), ">= 1"),
    (("TEST.PRECISE_BN.NUM_ITER", 0), ">= 1"),
    (("TEST.AUG.ENABLED", True), "False"),
    (("TEST.EXPECTED_RESULTS", [[1]]), "rows such as"),
    (("TEST.EXPECTED_RESULTS", [["bbox", "AP", 1.0, 1.0]], "DATASETS.TEST", ()), "DATASETS.TEST"),
    (("TEST.EXPECTED_RESULTS", [["bbox", "AP", 300.0, 1.0]], "DATASETS.TEST", ("a",)), "at most 100"),
    (("VIS_PERIOD", -1), "0 = never"),
    (("VERSION", 3), "[2]"),
    (("SEED", 2**32), "4294967295"),
    (("DATALOADER.NUM_WORKERS", -1), "from 0 to 1024"),
    (("DATALOADER.NUM_WORKERS", 1000000), "from 0 to 1024"),
    (("DATALOADER.REPEAT_THRESHOLD", -1.0), ">= 0"),
    (("INPUT.MIN_SIZE_TRAIN", ()), "at least"),
    (("INPUT.MIN_SIZE_TRAIN", (0,)), ">= 1"),
    (("INPUT.MIN_SIZE_TRAIN", ("a",)), "numbers"),
    (("INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo"), "'choice'"),
    (("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (64,)), "a largest size"),
    (("INPUT.MAX_SIZE_TRAIN", 0), ">= 1"),
    (("INPUT.MIN_SIZE_TEST", -1), ">= 0"),
    (("INPUT.MAX_SIZE_TEST", 0), ">= 1"),
    (("INPUT.RANDOM_FLIP", "diagonal"), "'horizontal'"),
    (("INPUT.CROP.TYPE", "foo"), "'relative_range'"),
    (("INPUT.CROP.SIZE", [0.0, 0.5]), "> 0.0"),
    (("INPUT.CROP.SIZE", [0.5]), "2 numbers"),
    (("INPUT.CROP.SIZE", [5.0, 5.0], "INPUT.CROP.ENABLED", True), "up to 1.0"),
    (("INPUT.MASK_FORMAT", "rle"), "'polygon'"),
    (("MODEL.PIXEL_STD", [0.0, 1.0, 1.0]), "> 0.0"),
    (("MODEL.PIXEL_STD", [1.0]), "MODEL.PIXEL_MEAN"),
    (("MODEL.PIXEL_MEAN", [1.0, 2.0]), "MODEL.PIXEL_STD"),
    (("MODEL.PIXEL_MEAN", []), "at least"),
    (("MODEL.ANCHOR_GENERATOR.SIZES", [[]]), "at least"),
    (("MODEL.ANCHOR_GENERATOR.SIZES", [[0]]), "> 0.0"),
    (("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.0]]), "> 0.0"),
    (("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0), ">= 1"),
    (("MODEL.RPN.POSITIVE_FRACTION", 2.0), "from 0.0 to 1.0"),
    (("MODEL.RPN.NMS_THRESH", float("nan")), "numbers"),
    (("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 0), ">= 1"),
    (("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]), "rising"),
    (("MODEL.RPN.IOU_LABELS", [0]), "one label more"),
    (("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0,)), "4 numbers"),
    (("MODEL.RPN.BBOX_REG_LOSS_TYPE", "foo"), "'giou'"),
    (("MODEL.ROI_HEADS.NUM_CLASSES", 0), "from 1 to 65536"),
    (("MODEL.ROI_HEADS.NUM_CLASSES", 10**9), "65536"),
    (("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.5), "from 0.0 to 1.0"),
    (("MODEL.ROI_HEADS.IOU_LABELS", [0, 2]), "from -1 to 1"),
    (("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0), "from 1 to 128"),
    (("MODEL.ROI_BOX_HEAD.NUM_FC", 0), "one layer at least"),
    (("MODEL.ROI_BOX_HEAD.NUM_FC", 10**6), "from 0 to 100"),
    (("MODEL.RETINANET.PRIOR_PROB", 1.0), "between 0.0 and 1.0"),
]


@pytest.mark.parametrize("pairs, words", WRONG, ids=[f"{pairs[0]}={pairs[1]}" for pairs, _ in WRONG])
def test_a_wrong_value(pairs, words):
    cfg = tiny_cfg()
    for key, value in zip(pairs[::2], pairs[1::2]):
        node = cfg
        for name in key.split(".")[:-1]:
            node = node[name]
        node[key.split(".")[-1]] = value
    with pytest.raises(ValueError) as refused:
        check_values(cfg)
    message = str(refused.value)
    assert pairs[0] in message and words in message
    assert repr(pairs[1]) in message


def test_the_seed_leaves_room_for_the_ranks():
    cfg = tiny_cfg("SEED", 2**32 - 2)
    check_values(cfg, num_processes=2)
    with pytest.raises(ValueError, match="SEED is 4294967294; give a number up to 4294967293"):
        check_values(cfg, num_processes=3)


def test_defaults_pass():
    check_values(default_config())


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configs_of_the_project_pass(path):
    check_values(load_config(str(path), eval_only="TRUNK" not in path.read_text()))


def test_values_that_look_odd_and_are_right():
    check_values(tiny_cfg("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf")))  # the largest entry
    check_values(tiny_cfg("MODEL.RETINANET.FOCAL_LOSS_ALPHA", -1.0))
    check_values(tiny_cfg("MODEL.ANCHOR_GENERATOR.SIZES", [[8.5], [16]]))
    check_values(tiny_cfg("INPUT.MIN_SIZE_TEST", 0))  # images as they are
    check_values(tiny_cfg("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0, 1.0)))  # rotated boxes


def test_a_saved_config_passes(tmp_path):
    """It has lists where the defaults have tuples."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg().dump())
    assert isinstance(yaml.safe_load(path.read_text())["INPUT"]["MIN_SIZE_TRAIN"], list)
    check_values(load_config(str(path)))


def test_keys_of_other_projects_are_left_alone():
    cfg = tiny_cfg()
    cfg.MODEL.OTHER = type(cfg)({"SCALE": float("inf"), "SIZES": []})
    check_values(cfg)
    assert flat_keys(cfg)["MODEL.OTHER.SIZES"] == []
