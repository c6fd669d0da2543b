"""Training, resuming, checks, calibration, prediction and cost of one-stage detectors."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from helpers import ONE_STAGE, ONE_STAGE_FPN, tiny_cfg, write_teacher
from tiny_training import Recorder, registered_data, training_cfg

from qmimic_d2.__main__ import main
from qmimic_d2.analysis import measure_cost
from qmimic_d2.engine import Trainer, check_run, load_config
from qmimic_d2.engine.hooks import ResumableLossNormalizer
from qmimic_d2.inference.dataset_categories import dataset_categories
from qmimic_d2.inference.prediction import Predictor

FAMILIES = list(ONE_STAGE)
META = "MODEL.META_ARCHITECTURE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("one_stage")


@pytest.fixture(scope="module", autouse=True)
def data(folder):
    with registered_data(folder / "data", "tiny_one_stage") as name:
        yield name


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(folder):
    """An R-CNN: it teaches both families."""
    return write_teacher(folder)


def student_cfg(output, data, family, teacher, *options, **kwargs):
    pairs = (*ONE_STAGE[family], META, f"QuantMimic{family}", *options)
    return training_cfg(output, data, *pairs, teacher=teacher, **kwargs)


def train(cfg, resume=False, seed=0):
    torch.manual_seed(seed)
    recorder, trainer = Recorder(), Trainer(cfg)
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, recorder.losses


@pytest.mark.slow
def test_a_training_is_evaluated_and_resumes_exactly(folder, data, family, teacher):
    options = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.STEPS", (4,))
    small = ("MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", 0.01)
    cfg = student_cfg(folder / f"whole_{family}", data, family, teacher, *options, *small, evaluate=True)
    check_run(cfg, 1)
    train(cfg)  # TorchScript's first runs of the focal loss differ in the last bit
    whole, expected = train(cfg)
    assert sorted(expected) == list(range(6)) and all(losses["loss_mimic"] > 0.0 for losses in expected.values())
    output = folder / f"whole_{family}"
    assert "bbox" in json.loads((output / "evaluation.json").read_text())["results"]
    assert json.loads((output / "mimic.json").read_text())["levels"].keys() == {"conv5"}

    (output / "last_checkpoint").write_text("model_0000002.pth")
    resumed, losses = train(cfg, resume=True, seed=9)
    assert losses == {iteration: expected[iteration] for iteration in (3, 4, 5)}
    assert resumed.model.loss_normalizer == whole.model.loss_normalizer
    check_run(cfg, 1, resume=True)


def test_the_mean_is_saved_where_there_is_one():
    model = torch.nn.Linear(1, 1)
    hook = ResumableLossNormalizer(model)
    assert hook.state_dict() == {}
    hook.load_state_dict({"loss_normalizer": 7.5})
    assert model.loss_normalizer == 7.5 and hook.state_dict() == {"loss_normalizer": 7.5}


def test_the_default_regions_are_refused_before_training(folder, data, family, teacher):
    source = ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["sampled"])
    cfg = student_cfg(folder / "refused", data, family, teacher, *source)
    with pytest.raises(ValueError, match="ROI_SOURCE is \\['sampled'\\]; give a list .*'ground_truth'.*'whole_map'"):
        check_run(cfg, 1)


def test_a_teacher_that_nothing_uses(folder, data, family, teacher, caplog):
    check_run(student_cfg(folder / "unused", data, family, teacher), 1)
    assert "nothing uses" not in caplog.text
    check_run(student_cfg(folder / "unused", data, family, teacher, META, f"Quant{family}"), 1)
    assert f"which nothing uses: MODEL.META_ARCHITECTURE is 'Quant{family}'" in caplog.text


def test_the_widths_of_a_trunk_are_written_down(tmp_path, family, teacher):
    trunk = ("MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT", "trunk")
    cfg = tiny_cfg(*ONE_STAGE[family], *teacher.options, *trunk, meta_architecture=f"QuantMimic{family}")
    (tmp_path / "student.yaml").write_text(cfg.dump())
    cfg = load_config(str(tmp_path / "student.yaml"), eval_only=True)
    assert cfg.MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS == [32]


# ----------------------------------------------------------------------------------- calibrate and predict


@pytest.fixture(scope="module")
def detector(folder, family, data):
    low = (f"MODEL.{family.upper()}.SCORE_THRESH_TEST", 0.9)
    sets = ("DATASETS.TRAIN", (data,), "DATASETS.TEST", (data,))
    written = write_teacher(folder, *ONE_STAGE[family], META, f"Quant{family}", *low, *sets, name=f"detector_{family}")
    return written


def test_categories_are_those_of_the_head(detector, family):
    cfg = detector.cfg.clone()
    assert [each.name for each in dataset_categories(cfg)] == ["class 0", "class 1", "class 2"]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL[family.upper()].NUM_CLASSES = 2
    assert [each.name for each in dataset_categories(cfg)] == ["0", "1"]
    assert len(MetadataCatalog.get("tiny_one_stage").thing_classes) == 3


def test_the_score_threshold_of_predict_replaces_the_configs(detector, folder, tmp_path):
    image = str(folder / "data" / "images" / "0.png")
    arguments = ["predict", "--config-file", detector.config_file, "--weights", detector.weights, "--input", image]
    counts = []
    for threshold in ("0.001", "0.99"):
        output = tmp_path / threshold
        assert main([*arguments, "--output", str(output), "--score-threshold", threshold]) == 0
        counts.append(len(json.loads((output / "predictions.json").read_text())["annotations"]))
    assert counts[0] > 0 == counts[1]


def test_a_student_predicts_without_its_teacher(detector, family):
    cfg = detector.cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = f"QuantMimic{family}", detector.weights
    cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE = "nowhere.yaml"
    cfg.MODEL[family.upper()].SCORE_THRESH_TEST = 0.001
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert len(Predictor(cfg)(pixels)) > 0


# ---------------------------------------------------------------------------------------------------- cost


def test_cost_by_hand(family):
    cells, channels, classes = 8 * 8, 16, 3
    anchors = {"RetinaNet": 2, "FCOS": 1}[family]  # of each cell
    outputs = anchors * (classes + 4) + (1 if family == "FCOS" else 0)  # and the centerness
    cost = measure_cost(tiny_cfg(*ONE_STAGE[family], "MODEL.FCOS.NORM", "", meta_architecture=f"Quant{family}"), 64, 64)
    assert list(cost.parts) == ["backbone", "head", "other"]
    # a convolution in each of two branches, then the outputs, all 3 x 3
    assert cost.parts["head"].flops == cells * channels * 9 * (2 * channels + outputs)
    assert cost.parts["head"].parameters == (channels * 9 + 1) * (2 * channels + outputs)
    assert cost.parts["other"].parameters == cost.parts["other"].flops == 0
    assert cost.num_proposals is None


@pytest.mark.slow
def test_teacher_and_adapter_cost_nothing(family, teacher):
    cfg = tiny_cfg(*ONE_STAGE_FPN[family], meta_architecture=f"Quant{family}")
    student = tiny_cfg(*ONE_STAGE_FPN[family], *teacher.options, meta_architecture=f"QuantMimic{family}")
    assert measure_cost(student, 64, 64).parts == measure_cost(cfg, 64, 64).parts
