"""The faster training of the evidence computes what train_net.py's computes, to rounding, and reuses what it keeps."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import tiny_cfg, write_teacher
from tiny_training import registered_data

import evidence_lib.prototypes  # noqa: F401  (registers LateUniform)
from evidence_lib.fast_training import CachedMapper, FastTrainer, check_images_repeat
from qmimic_d2.engine import Trainer
from qmimic_d2.modeling import FrozenTeacher
from qmimic_d2.modeling.mimic.cached_teacher import CachedTeacher

FIXED_IMAGES = ("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96)


@pytest.fixture
def student(tmp_path):
    """Config of a mimic student on nine images."""
    with registered_data(tmp_path / "data") as name:
        teacher = write_teacher(tmp_path)
        yield tiny_cfg(
            *teacher.options,
            *FIXED_IMAGES,
            *("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", 0, "MODEL.QMIMIC.MIMIC.NORMALIZE_BY", "element"),
            *("OUTPUT_DIR", str(tmp_path / "runs" / "student")),
            meta_architecture="QuantMimicRCNN",
        )


def losses_of(trainer_class, cfg, steps=6):
    """Of as many steps as pass over all nine images, by name."""
    torch.manual_seed(3)
    trainer = trainer_class(cfg)
    found = []
    with EventStorage(0) as storage:
        for trainer.iter in range(steps):
            torch.manual_seed(trainer.iter)
            trainer.run_step()
            found.append({key: value[0] for key, value in storage.latest().items() if key.startswith("loss")})
            storage.step()
    return found, trainer.model


def test_losses_are_those_of_the_trainer(student):
    (theirs, _), (ours, model) = losses_of(Trainer, student), losses_of(FastTrainer, student)
    assert [step.keys() for step in ours] == [step.keys() for step in theirs] and "loss_mimic" in ours[0]
    for our_step, their_step in zip(ours, theirs):
        assert our_step == pytest.approx(their_step, rel=2e-3, abs=1e-5)
    assert type(model.mimic.teacher) is CachedTeacher


def test_evaluation_is_the_stock_one(student):
    # with a stock pooler in its place the boxes are the same to the last bit
    model = FastTrainer.build_model(student).eval()
    torch.manual_seed(0)
    maps, boxes = [torch.rand(1, 4, 8, 8)], [Boxes(torch.tensor([[3.0, 5.0, 40.0, 31.0]]))]
    stock = build_model(student).roi_heads.box_pooler
    assert torch.equal(model.roi_heads.box_pooler(maps, boxes), stock(maps, boxes))
    trained = model.train().roi_heads.box_pooler([maps[0].requires_grad_()], boxes)
    torch.testing.assert_close(trained, stock(maps, boxes), rtol=1e-5, atol=1e-6)


def test_runs_with_the_same_teacher_share_its_maps(student, tmp_path):
    _, first = losses_of(FastTrainer, student)
    assert first.mimic.teacher.is_loaded and (tmp_path / "runs" / "teacher_maps").is_dir()
    student.merge_from_list(["OUTPUT_DIR", str(tmp_path / "runs" / "another"), "SOLVER.BASE_LR", 0.5])
    _, second = losses_of(FastTrainer, student)
    assert not second.mimic.teacher.is_loaded


def test_codes_that_change_are_computed(student, tmp_path):
    student.merge_from_list(["MODEL.QMIMIC.QUANTIZER.NAME", "LateUniform"])
    _, model = losses_of(FastTrainer, student, steps=1)
    assert type(model.mimic.teacher) is FrozenTeacher
    assert not (tmp_path / "runs" / "teacher_maps").exists()


def test_a_mapper_is_asked_once_per_file():
    asked = []
    mapper = CachedMapper(lambda each: asked.append(each["file_name"]) or {"image": each["file_name"].upper()})
    first = mapper({"file_name": "a"})
    first["more"] = 1  # what a caller adds stays with the caller
    assert mapper({"file_name": "a"}) == {"image": "A"} and mapper({"file_name": "b"}) == {"image": "B"}
    assert asked == ["a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        ("INPUT.RANDOM_FLIP", "horizontal"),
        ("INPUT.CROP.ENABLED", True),
        ("INPUT.MIN_SIZE_TRAIN", (48, 64)),
    ],
)
def test_images_that_change_are_refused(options):
    check_images_repeat(tiny_cfg(*FIXED_IMAGES))
    with pytest.raises(ValueError, match="INPUT.*train_net.py"):
        check_images_repeat(tiny_cfg(*FIXED_IMAGES, *options))
