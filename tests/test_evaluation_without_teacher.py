"""An evaluation reads nothing of the teacher's, whatever became of its files."""

import os

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import ONE_STAGE, batch, randomize, seeded_model, tiny_cfg, write_teacher

from qmimic_d2.analysis import measure_cost
from qmimic_d2.engine import load_config
from qmimic_d2.export import build_student
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.modeling.trunk_adapter import trained_trunk_channels, without_teacher

MIMIC, TEACHER = "MODEL.QMIMIC.MIMIC", "MODEL.QMIMIC.TEACHER"
TRUNK = (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.ADAPTER", "conv1x1_relu")
PLACEMENTS = {"branch": (), "trunk": TRUNK, "linear trunk": (*TRUNK[:2], f"{MIMIC}.ADAPTER", "conv1x1")}

# What may have become of the teacher's config since the training.
CHANGES = {
    "gone": None,
    "no YAML": "MODEL: [",
    "code": "MODEL: {WEIGHTS: !!python/object/apply:os.system ['touch MARK']}\n",
    "a loop": "_BASE_: teacher.yaml\n",
    "a project's backbone": "MODEL: {BACKBONE: {NAME: build_backbone_of_another_project}}\n",
    "another width": None,
}


def spoil(teacher, change):
    path = teacher.config_file
    if change == "another width":
        with open(path, "w", encoding="utf-8") as file:
            file.write(tiny_cfg("MODEL.VGG.WIDTH_DIVISOR", 8).dump())
    elif CHANGES[change] is None:
        os.remove(path)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(CHANGES[change])


@pytest.fixture(params=PLACEMENTS)
def trained(request, tmp_path, monkeypatch):
    """A student's config as its user wrote it, its checkpoint, its teacher, and what it detects."""
    monkeypatch.chdir(tmp_path)
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*PLACEMENTS[request.param], *teacher.options, meta_architecture="QuantMimicRCNN")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = randomize(seeded_model(cfg, 2)).eval()
    cfg.MODEL.WEIGHTS = str(tmp_path / "student.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "student.yaml").write_text(cfg.dump())
    with torch.no_grad():
        expected = model(batch())[0]["instances"]
    assert len(expected)
    return cfg, teacher, expected


def assert_same(instances, expected):
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.scores, expected.scores)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_of_the_config_evaluates(trained, change, tmp_path):
    cfg, teacher, expected = trained
    spoil(teacher, change)
    by_reader = load_config(str(tmp_path / "student.yaml"), eval_only=True)
    assert by_reader.MODEL.QMIMIC.TEACHER.CONFIG_FILE == ""
    for each in (by_reader, without_teacher(cfg)):
        model = build_model(each).eval()
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        with torch.no_grad():
            assert_same(model(batch())[0]["instances"], expected)
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("change", [each for each in CHANGES if each != "another width"])
def test_a_users_own_script_evaluates(trained, change, tmp_path):
    cfg, teacher, expected = trained
    spoil(teacher, change)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        assert_same(model.eval()(batch())[0]["instances"], expected)
    # and a training says what is wrong
    with pytest.raises((FileNotFoundError, ValueError), match=f"{TEACHER}.CONFIG_FILE"):
        build_model(cfg).train()
    assert not (tmp_path / "MARK").exists()


def test_a_teacher_of_another_width_leaves_a_branch_alone(tmp_path):
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*teacher.options, meta_architecture="QuantMimicRCNN")
    torch.save({"model": seeded_model(cfg, 2).state_dict()}, tmp_path / "student.pth")
    spoil(teacher, "another width")
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "student.pth"))
    own, saved = model.state_dict(), torch.load(tmp_path / "student.pth")["model"]
    assert all(torch.equal(own[name], saved[name]) for name in saved if not name.startswith("mimic."))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["no YAML", "another width"])
def test_what_ships_and_what_is_measured(trained, change):
    cfg, teacher, _ = trained
    spoil(teacher, change)
    image = np.full((64, 64, 3), 90, np.uint8)
    predictor = Predictor(cfg)
    assert len(predictor(image))
    assert set(build_student(cfg).state_dict()) == set(predictor.model.state_dict())
    assert measure_cost(cfg, 64, 64).parameters > 0


@pytest.mark.parametrize("family", ONE_STAGE)
def test_one_stage_widths_come_from_the_checkpoint(tmp_path, family):
    teacher = write_teacher(tmp_path)
    options = (*ONE_STAGE[family], *TRUNK, f"{MIMIC}.ROI_SOURCE", ["neighbourhood"])
    cfg = tiny_cfg(*options, *teacher.options, meta_architecture=f"QuantMimic{family}")
    torch.save({"model": seeded_model(cfg, 2).state_dict()}, tmp_path / "student.pth")
    spoil(teacher, "no YAML")
    assert trained_trunk_channels(cfg, str(tmp_path / "student.pth")) == [32]


def test_resuming_takes_the_last_checkpoint(tmp_path):
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*TRUNK, *teacher.options, "OUTPUT_DIR", str(tmp_path / "out"), meta_architecture="QuantMimicRCNN")
    (tmp_path / "out").mkdir()
    (tmp_path / "student.yaml").write_text(cfg.dump())
    torch.save({"model": seeded_model(cfg, 2).state_dict()}, tmp_path / "out" / "model_0000001.pth")
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    spoil(teacher, "another width")
    read = load_config(str(tmp_path / "student.yaml"), eval_only=True, resume=True)
    assert read.MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS == [32]


def test_without_weights_the_teachers_yaml_is_the_last_resort(tmp_path):
    teacher = write_teacher(tmp_path)
    cfg = tiny_cfg(*TRUNK, *teacher.options, meta_architecture="QuantMimicRCNN")
    (tmp_path / "student.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "student.yaml"), eval_only=True).MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS == [32]
    spoil(teacher, "no YAML")
    with pytest.raises(ValueError, match=f"{MIMIC}.TRUNK_CHANNELS is .*give one width for each"):
        load_config(str(tmp_path / "student.yaml"), eval_only=True)
    # a LazyConfig is code, which an evaluation does not run
    (tmp_path / "lazy.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w')\n")
    read = load_config(
        str(tmp_path / "student.yaml"), [f"{TEACHER}.CONFIG_FILE", str(tmp_path / "lazy.py")], eval_only=True
    )
    assert read.MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS == [] and not (tmp_path / "MARK").exists()
