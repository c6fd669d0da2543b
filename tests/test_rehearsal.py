"""What only shows when the run's own code runs: a rehearsal refuses it by key, and changes nothing."""

import logging
import pickle
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import ONE_STAGE, RESNET_C4, RESNET_FPN, write_teacher
from refusals import check, refusal
from tiny_training import Recorder, registered_data, training_cfg

from qmimic_d2.config_files import changed
from qmimic_d2.engine import Trainer, check_run, load_config
from qmimic_d2.engine.checks.rehearsal import Rehearsal, without_a_trace

pytestmark = pytest.mark.slow

MIMIC = "MODEL.QMIMIC.MIMIC"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module", autouse=True)
def dataset(folder):
    with registered_data(folder / "data", "tiny_rehearsal") as name:
        yield name


@pytest.fixture(scope="module")
def teacher(folder):
    return write_teacher(folder)


@pytest.fixture(scope="module")
def student(folder, teacher, dataset):
    """A good student's YAML."""
    path = folder / "student.yaml"
    path.write_text(training_cfg(folder / "output", dataset, teacher=teacher, evaluate=True).dump())
    return str(path)


CROP = ("INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[0.2, 0.2]")
PLAIN = ("MODEL.META_ARCHITECTURE", "QuantRCNN")

# KEY VALUE pairs, and the key that the message must name.
WRONG = [
    (("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "Foo"), "MODEL.ROI_BOX_HEAD.POOLER_TYPE"),
    (("MODEL.ROI_HEADS.NAME", "foo"), "MODEL.ROI_HEADS.NAME"),
    (("MODEL.BACKBONE.NAME", "''"), "MODEL.BACKBONE.NAME"),
    (("MODEL.ROI_BOX_HEAD.NAME", "''"), "MODEL.ROI_BOX_HEAD.NAME"),
    (("MODEL.RPN.HEAD_NAME", "foo"), "MODEL.RPN.HEAD_NAME"),
    (("MODEL.RPN.IN_FEATURES", "['foo']"), "MODEL.RPN.IN_FEATURES"),
    (("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"), "MODEL.ANCHOR_GENERATOR.NAME"),
    (("MODEL.ANCHOR_GENERATOR.OFFSET", "1.5"), "MODEL.ANCHOR_GENERATOR.OFFSET"),
    (("MODEL.PROPOSAL_GENERATOR.NAME", "foo"), "MODEL.PROPOSAL_GENERATOR.NAME"),
    (("MODEL.MASK_ON", "True"), "MODEL.MASK_ON"),
    (("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON"),
    (("MODEL.RPN.LOSS_WEIGHT", "1e38"), "MODEL.RPN.LOSS_WEIGHT"),
    (("SOLVER.BASE_LR", "0.0", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"), "SOLVER.BASE_LR"),
    (("SOLVER.WEIGHT_DECAY_NORM", "1e30"), "SOLVER.WEIGHT_DECAY_NORM"),
    (("SOLVER.BASE_LR", "1e36"), "SOLVER.BASE_LR"),
    (("SOLVER.LR_SCHEDULER_NAME", "Cosine"), "SOLVER.LR_SCHEDULER_NAME"),
    (("INPUT.FORMAT", "XYZ", *PLAIN), "INPUT.FORMAT"),
    (("INPUT.FORMAT", "CMYK", *PLAIN), "INPUT.FORMAT"),
    (CROP, "INPUT.CROP."),
    (("MODEL.LOAD_PROPOSALS", "True"), "DATASETS.PROPOSAL_FILES_TRAIN"),
    (("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "MODEL.LOAD_PROPOSALS"),
    (("MODEL.DEVICE", "foo"), "MODEL.DEVICE"),
    (("MODEL.DEVICE", "meta"), "MODEL.DEVICE"),
    (("TEST.EXPECTED_RESULTS", "[['bbox', 'AQ', 1.0, 1.0]]"), "TEST.EXPECTED_RESULTS"),
    (("OUTPUT_DIR", "''"), "OUTPUT_DIR"),
]


@pytest.mark.parametrize("opts, key", WRONG, ids=[f"{opts[0]}={opts[1]}" for opts, _ in WRONG])
def test_a_wrong_value_is_refused_by_key(student, opts, key):
    message = refusal(student, *opts)
    assert key in message
    if key not in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"):  # named in the middle, as the cause
        assert message.startswith((f"ValueError: {key}", f"KeyError: {key}"))


def test_a_value_that_only_an_evaluation_reads(student, folder, dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no evaluation today")

    monkeypatch.setattr("detectron2.evaluation.COCOEvaluator.process", refuse)
    monkeypatch.setattr("qmimic_d2.engine.checks.culprit._SECONDS", 0.0)  # no key is to blame
    message = refusal(student)
    assert f"the evaluation on {dataset!r} fails: RuntimeError: no evaluation today" in message


def test_a_loss_that_is_not_finite(student, monkeypatch):
    monkeypatch.setattr(
        "detectron2.modeling.proposal_generator.RPN.losses", lambda *args: {"loss_rpn": torch.tensor(float("nan"))}
    )
    monkeypatch.setattr("qmimic_d2.engine.checks.culprit._SECONDS", 0.0)  # no key is to blame
    assert "FloatingPointError: loss_rpn is nan in iteration 0" in refusal(student)


def test_batch_norm_of_gpus_in_processes_on_the_cpu(student):
    message = refusal(student, "MODEL.VGG.NORM", "SyncBN", num_processes=2)
    assert "MODEL.VGG.NORM is 'SyncBN'" in message and "set it to 'BN'" in message


@pytest.mark.parametrize("family", ONE_STAGE)
def test_one_stage_students(student, family):
    options = ("MODEL.META_ARCHITECTURE", f"QuantMimic{family}", *ONE_STAGE[family])
    check(student, *options)
    key = f"MODEL.{family.upper()}.IN_FEATURES"
    assert key in refusal(student, *options, key, "['conv7']")


class TestModelsThatCannotTrain:
    """Built without an error by Detectron2, they crash in the first iteration."""

    def test_res5_heads_on_a_divided_resnet(self, student):
        heads = (*PLAIN, *RESNET_C4, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
        message = refusal(student, *heads)
        assert "MODEL.ROI_HEADS.NAME is 'Res5ROIHeads'" in message and "1024 channels" in message
        assert "MODEL.RESNETS.WIDTH_DIVISOR" in message and "'StandardROIHeads'" in message

    def test_rotated_boxes(self, student):
        rotated = (
            *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
            *("MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0, 1.0)"),
        )
        message = refusal(student, *rotated)
        assert "MODEL.PROPOSAL_GENERATOR.NAME" in message and "rotated boxes (RRPN" in message and "'RPN'" in message

    @pytest.mark.parametrize("backbone", ["build_resnet_fpn_backbone", "build_divided_resnet_fpn_backbone"])
    def test_trunk_adapters_on_some_of_the_levels(self, student, folder, backbone):
        wide = write_teacher(folder, *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 16, name="wide")
        fpn = (*RESNET_FPN, "MODEL.BACKBONE.NAME", backbone, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, *wide.options)
        trunk = (*fpn, f"{MIMIC}.ADAPTER_PLACEMENT", "trunk")
        message = refusal(student, *trunk)
        assert f"{MIMIC}.ADAPTER_PLACEMENT is 'trunk'" in message and "'p6': 8" in message
        assert f"set {MIMIC}.IN_FEATURES ['p3', 'p4', 'p5', 'p6']" in message
        check(student, *trunk, f"{MIMIC}.IN_FEATURES", "['p3', 'p4', 'p5', 'p6']")


class TestPrecomputedProposals:
    """Fast R-CNN: the proposals come from a file."""

    def options(self, path):
        return (
            *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "MODEL.LOAD_PROPOSALS", "True"),
            *("DATASETS.PROPOSAL_FILES_TRAIN", f"('{path}',)", "DATASETS.PROPOSAL_FILES_TEST", f"('{path}',)"),
        )

    def write(self, path, **others):
        boxes = np.array([[2, 2, 30, 30], [20, 10, 46, 40], [0, 0, 20, 20]], dtype=np.float32)
        proposals = {"ids": list(range(9)), "boxes": [boxes] * 9, "bbox_mode": 0}
        proposals["objectness_logits"] = [np.array([1, 2, 3], dtype=np.float32)] * 9
        path.write_bytes(pickle.dumps({**proposals, **others}))
        return path

    @pytest.mark.parametrize("source", ["sampled", "proposals", "ground_truth"])
    def test_a_student_trains(self, student, tmp_path, source):
        options = self.options(self.write(tmp_path / "proposals.pkl"))
        output = ("OUTPUT_DIR", str(tmp_path / "output"), "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()")
        cfg = load_config(student, [*options, *output, f"{MIMIC}.ROI_SOURCE", repr([source])])
        check_run(cfg, 1)
        trainer = Trainer(cfg)
        recorder = Recorder()
        trainer.register_hooks([recorder])
        trainer.train()
        assert set(recorder.losses) == {0, 1}
        assert recorder.losses[1]["loss_mimic"] > 0.0 and "loss_rpn_cls" not in recorder.losses[1]

    def test_heads_of_the_teacher(self, student, tmp_path):
        options = self.options(self.write(tmp_path / "proposals.pkl"))
        trunk = (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.INIT_HEADS_FROM_TEACHER", "True")
        check(student, *options, *trunk)

    def test_the_file_is_not_there(self, student, tmp_path):
        message = refusal(student, *self.options(tmp_path / "nowhere.pkl"))
        assert "DATASETS.PROPOSAL_FILES_TRAIN" in message and "nowhere.pkl' does not exist" in message

    def test_the_file_would_run_code(self, student, tmp_path):
        class Touch:
            def __reduce__(self):
                return type(tmp_path).touch, (tmp_path / "code_ran",)

        message = refusal(student, *self.options(self.write(tmp_path / "evil.pkl", more=Touch())))
        assert "DATASETS.PROPOSAL_FILES_TRAIN" in message and "evil.pkl" in message
        assert not (tmp_path / "code_ran").exists()

    def test_the_file_holds_something_else(self, student, tmp_path):
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": {}}))
        message = refusal(student, *self.options(tmp_path / "weights.pkl"))
        assert "DATASETS.PROPOSAL_FILES_TRAIN" in message and "holds ['model']" in message


class TestDataOfTheUser:
    @pytest.mark.parametrize("evaluated", [False, True])
    def test_a_function_that_fails(self, student, evaluated):
        def load():
            raise LookupError("no list today")

        DatasetCatalog.register("tiny_failing", load)
        try:
            key = "DATASETS.TEST" if evaluated else "DATASETS.TRAIN"
            options = {"DATASETS.TRAIN": "('tiny_failing',)"}
            if evaluated:
                MetadataCatalog.get("tiny_failing").evaluator_type = "coco"
                options = {"DATASETS.TEST": "('tiny_failing',)"}
            message = refusal(student, *[each for pair in options.items() for each in pair])
            assert key in message and "'tiny_failing'" in message and "no list today" in message
        finally:
            DatasetCatalog.remove("tiny_failing")
            MetadataCatalog.pop("tiny_failing", None)

    def test_another_trainer_brings_its_own_loader(self, student):
        calls = []

        class Own(Trainer):
            @classmethod
            def build_train_loader(cls, cfg):
                calls.append(cfg.SOLVER.IMS_PER_BATCH)
                return super().build_train_loader(cfg)

        check_run(load_config(student), 1, trainer=Own)
        assert calls


class TestNoTrace:
    def test_losses_of_the_training_are_the_same_to_the_last_bit(self, student, tmp_path):
        losses = []
        for name in ("without", "with"):
            options = ("OUTPUT_DIR", str(tmp_path / name), "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()")
            cfg = load_config(student, options)
            if name == "with":
                check_run(cfg, 1)
            torch.manual_seed(cfg.SEED)
            trainer = Trainer(cfg)
            recorder = Recorder()
            trainer.register_hooks([recorder])
            trainer.train()
            losses.append(recorder.losses)
        assert losses[0] == losses[1] and set(losses[0]) == {0, 1, 2}

    def test_random_numbers_and_data_sets_are_as_before(self, student, dataset):
        original = DatasetCatalog[dataset]
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        check(student)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
        assert DatasetCatalog[dataset] is original
        refusal(student, *CROP)
        assert DatasetCatalog[dataset] is original
        assert len(DatasetCatalog.get(dataset)) == 9

    def test_nothing_is_shown(self, caplog, capsys):
        with without_a_trace():
            logging.getLogger("detectron2").error("not shown")
            warnings.warn("not shown", stacklevel=1)
            print("not shown")
        logging.getLogger("detectron2").error("shown")
        assert "not shown" not in caplog.text + "".join(capsys.readouterr())
        assert logging.root.manager.disable == 0

    def test_what_detectron2_logs_once_is_still_logged(self, student, caplog, monkeypatch):
        """The table of classes would be missing from log.txt if the rehearsal counted as its first time."""
        monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
        check(student)
        with caplog.at_level(logging.INFO):
            Trainer.build_train_loader(load_config(student))
        assert "Distribution of instances" in caplog.text

    def test_it_is_one_batch_of_small_images(self, student, monkeypatch):
        sizes = []
        original = Trainer.build_train_loader.__func__

        def build(cls, cfg):
            sizes.append((max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS))
            return original(cls, cfg)

        monkeypatch.setattr(Trainer, "build_train_loader", classmethod(build))
        check(student, "INPUT.MIN_SIZE_TRAIN", "(800,)", "SOLVER.IMS_PER_BATCH", 16, "DATALOADER.NUM_WORKERS", 4)
        assert sizes == [(800, 2, 0), (256, 2, 0)]

    def test_an_operator_that_only_a_gpu_has_is_no_mistake(self, student, monkeypatch):
        def refuse(cfg):
            raise NotImplementedError("Deformable Conv is not supported on CPUs!")

        monkeypatch.setattr("qmimic_d2.engine.checks.rehearsal.build_model", refuse)
        cfg = load_config(student)
        assert Rehearsal(changed(cfg, "MODEL.DEVICE", "cuda"), 1, Trainer).build() is None
        with pytest.raises(ValueError, match="not supported on CPUs"):
            Rehearsal(changed(cfg, "MODEL.DEVICE", "cpu"), 1, Trainer).build()
