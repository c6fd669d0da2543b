"""Student against teacher on held-out images: what is compared, what is written, and what stays untouched."""

import json
import logging
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import RESNET_FPN, batch, run_two_processes, seeded_model, write_teacher
from tiny_training import BUILTIN_DATASET, Recorder, Run, registered_data, training_cfg, write_builtin_data, write_coco
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.diagnostics.feature_comparison import FIGURES
from qmimic_d2.engine import MimicEvaluator, MimicSummary, Trainer, add_mimic_hook
from qmimic_d2.engine.hooks import TeacherCacheSummary

DATASET = "tiny_heldout"
IMAGES = "MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES"
PERIOD = "MODEL.QMIMIC.DIAGNOSTICS.PERIOD"
NAME = "MODEL.QMIMIC.QUANTIZER.NAME"
HELDOUT = {f"heldout_{name}" for name in FIGURES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heldout")


@pytest.fixture(scope="module", autouse=True)
def data(folder):
    with registered_data(folder / "data", DATASET, count=7) as name:
        yield name


@pytest.fixture(scope="module")
def teacher(folder):
    return write_teacher(folder)


def heldout_cfg(output_dir, teacher, *options):
    return training_cfg(output_dir, DATASET, *options, teacher=teacher, evaluate=True)


def trained_model(cfg):
    """A student with BatchNorm statistics of its own, and its teacher."""
    model = seeded_model(cfg).train()
    with EventStorage():
        for seed in range(2):
            model(batch(seed=seed))
    return model


def content_of(folder):
    return json.loads((Path(folder) / "mimic.json").read_text())


# ----------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("quantizer", ["Uniform", "PowerOfTwo", "Clamp", ""])
def test_it_compares_inside_the_annotated_boxes_of_images_as_an_evaluation_reads_them(tmp_path, teacher, quantizer):
    # images of 64 x 48 and 48 x 64 are doubled: shortest side 96
    sizes = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 200)
    cfg = heldout_cfg(tmp_path, teacher, *sizes, NAME, quantizer)
    model = trained_model(cfg)
    found = MimicEvaluator(cfg)(model)
    model.eval()
    loader = Trainer.build_test_loader(cfg, DATASET)
    boxes = Boxes(2.0 * torch.tensor([[4.0, 6.0, 28.0, 36.0], [20.0, 12.0, 46.0, 40.0]]))
    total = None
    for index, (inputs,) in enumerate(loader):
        assert inputs["image"].shape[1:] == ((128, 96) if index % 3 == 0 else (96, 128))
        comparison = model.mimic.compare_on([inputs], [boxes])["conv5"]
        total = comparison if total is None else total + comparison
    assert index == 6 and total.num_rois == 14
    expected = {f"heldout_{name}": value for name, value in total.figures().items()}
    assert found == {"qmimic": pytest.approx(expected, rel=1e-5, nan_ok=True)}


def test_a_student_that_equals_its_teacher_matches_everywhere(tmp_path):
    fixed = ("MODEL.VGG.WIDTH_DIVISOR", 32)
    written = write_teacher(tmp_path, *fixed)
    cfg = heldout_cfg(tmp_path, written, *fixed, "MODEL.QMIMIC.MIMIC.ADAPTER", "", NAME, "")
    model = seeded_model(cfg).train()
    model.load_state_dict(written.model.state_dict())
    found = MimicEvaluator(cfg)(model)["qmimic"]
    # with the statistics of its BatchNorm: those of one image's batch would give other features
    assert found["heldout_match_ratio"] == found["heldout_match_ratio_nonzero"] == 1.0
    assert found["heldout_relative_error"] == pytest.approx(0.0, abs=1e-5)


def test_every_variant_is_measured_on_the_same_dictionary(tmp_path, teacher):
    repr_of = {}
    for quantizer in ("Uniform", "Clamp", ""):
        cfg = heldout_cfg(tmp_path, teacher, NAME, quantizer)
        MimicEvaluator(cfg)(trained_model(cfg))
        repr_of[quantizer] = content_of(tmp_path)["quantizer"]
    assert set(repr_of.values()) == {"UniformQuantizer(stride=0.25, num_codes=0, signed=False)"}


def test_crowds_and_images_without_boxes_do_not_count(tmp_path, teacher):
    write_coco(tmp_path / "annotations.json", tmp_path / "images", 4)
    content = json.loads((tmp_path / "annotations.json").read_text())
    for each in content["annotations"][:3]:  # both of the first image, one of the second
        each["iscrowd"] = 1
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 2]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with registered_data(tmp_path, "tiny_crowd", is_written=True) as name:
        cfg = heldout_cfg(tmp_path, teacher, "DATASETS.TEST", (name, DATASET))
        MimicEvaluator(cfg)(trained_model(cfg))
    written = content_of(tmp_path)
    assert (written["dataset"], written["num_images"], written["num_rois"]) == ("tiny_crowd", 2, 3)


def test_at_most_so_many_images_at_equal_distances(tmp_path, teacher):
    seen = []

    def mapper(image):
        seen.append(image["image_id"])
        return batch()[0]

    cfg = heldout_cfg(tmp_path, teacher, IMAGES, 3)
    evaluator = MimicEvaluator(cfg, mapper=mapper)
    for _ in range(2):
        evaluator(trained_model(cfg))
    assert seen == [0, 2, 4] * 2
    assert content_of(tmp_path)["num_images"] == 3


def test_the_data_set_is_read_once(tmp_path, teacher, monkeypatch):
    reads = []
    get = DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: reads.append(name) or get(name))
    cfg = heldout_cfg(tmp_path, teacher, IMAGES, 1)
    evaluator, model = MimicEvaluator(cfg), trained_model(cfg)
    assert evaluator(model) == evaluator(model)
    assert reads == [DATASET]


# ------------------------------------------------------------------------------------------ what is written


def test_the_file_and_the_log(tmp_path, teacher, caplog):
    cfg = heldout_cfg(tmp_path, teacher, "MODEL.QMIMIC.QUANTIZER.NUM_CODES", 4)
    with EventStorage(17), caplog.at_level(logging.INFO, "qmimic_d2"):
        found = MimicEvaluator(cfg)(trained_model(cfg))["qmimic"]
    line = f"boxes of 7 images of {DATASET}: heldout_match_ratio {found['heldout_match_ratio']:.3f}, "
    assert line in caplog.text
    written = content_of(tmp_path)
    assert list(written) == ["dataset", "num_images", "num_rois", "iteration", "quantizer", "levels"]
    levels = written.pop("levels")
    assert written == {
        "dataset": DATASET,
        "num_images": 7,
        "num_rois": 14,
        "iteration": 17,
        "quantizer": "UniformQuantizer(stride=0.25, num_codes=4, signed=False)",
    }
    assert list(levels) == ["conv5"] and list(levels["conv5"]) == [*FIGURES, "code_histogram"]
    assert {f"heldout_{name}": levels["conv5"][name] for name in FIGURES} == found
    histogram = levels["conv5"]["code_histogram"]
    assert histogram["codes"] == [0.0, 0.25, 0.5, 0.75]
    entries = 14 * 32 * 3 * 3
    for side in ("student", "teacher"):
        assert sum(histogram[side]) == entries
        assert histogram[side][0] / entries == pytest.approx(found[f"heldout_{side}_sparsity"])
        assert histogram[side][3] / entries == pytest.approx(found[f"heldout_{side}_saturation"])


def test_several_levels(tmp_path):
    written = write_teacher(tmp_path, *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 12)
    cfg = heldout_cfg(tmp_path, written, *RESNET_FPN, IMAGES, 2)
    found = MimicEvaluator(cfg)(seeded_model(cfg).train())["qmimic"]
    # no box of these images is large enough for p4 and p5
    assert set(found) == {f"{name}_p3" for name in HELDOUT}
    levels = content_of(tmp_path)["levels"]
    assert list(levels) == ["p3", "p4", "p5"] and content_of(tmp_path)["num_rois"] == 4
    assert levels["p4"]["match_ratio"] is None and sum(levels["p4"]["code_histogram"]["teacher"]) == 0
    assert len(levels["p3"]["code_histogram"]["codes"]) == 65


def test_a_diverged_student_is_written_as_null(tmp_path, teacher):
    cfg = heldout_cfg(tmp_path, teacher, IMAGES, 1)
    model = trained_model(cfg)
    torch.nn.init.constant_(model.mimic.adapters["conv5"].bias, math.nan)
    assert all(math.isnan(each) for each in MimicEvaluator(cfg)(model)["qmimic"].values())
    level = content_of(tmp_path)["levels"]["conv5"]
    assert level["cosine"] is None and set(level["code_histogram"]["student"]) == {None}


def test_without_output_folder_and_without_training_it_only_returns(tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = MimicEvaluator(dataset_name=DATASET, num_images=1, mapper=lambda image: batch()[0])
    cfg = heldout_cfg(tmp_path, teacher, IMAGES, 1)
    assert set(own(trained_model(cfg))["qmimic"]) == HELDOUT
    assert not (tmp_path / "mimic.json").exists()
    MimicEvaluator(cfg)(trained_model(cfg))
    assert content_of(tmp_path)["iteration"] == -1


# -------------------------------------------------------------------------------------- what stays untouched


def test_model_modes_and_random_numbers_stay(tmp_path, teacher):
    cfg = heldout_cfg(tmp_path, teacher, IMAGES, 2)
    model = trained_model(cfg)
    model.backbone.conv1.eval()  # a part that its owner keeps in eval mode
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {False, True}
    with EventStorage():
        sum(model(batch()).values()).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    MimicEvaluator(cfg)(model)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == generators
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), gradients))
    assert model.mimic.record.maps == {}


def test_modes_and_random_numbers_stay_after_an_error(tmp_path, teacher):
    def mapper(image):
        random.random()
        raise OSError("the disk is gone")

    cfg = heldout_cfg(tmp_path, teacher)
    model, generator = trained_model(cfg), random.getstate()
    with pytest.raises(OSError, match="the disk"):
        MimicEvaluator(cfg, mapper=mapper)(model)
    assert model.training and random.getstate() == generator


def run_training(cfg, trainer_class=Trainer):
    torch.manual_seed(0)
    trainer, recorder = trainer_class(cfg), Recorder()
    trainer._hooks.insert(0, recorder)
    recorder.trainer = trainer._hooks[1].trainer
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, recorder.losses


def test_a_training_measures_at_each_evaluation_and_is_the_same_without(tmp_path, teacher):
    period = ("TEST.EVAL_PERIOD", 2)
    trainer, losses = run_training(heldout_cfg(tmp_path / "on", teacher, *period))
    off = (PERIOD, 0, IMAGES, 0)
    plain, expected = run_training(heldout_cfg(tmp_path / "off", teacher, *period, *off))
    assert losses == expected and sorted(losses) == list(range(6))
    state = plain.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
    measured = {name for name in plain.storage.histories() if name.startswith("qmimic/")}
    assert not any(f"qmimic/{name}" in measured for name in (*FIGURES, *HELDOUT))
    assert not (tmp_path / "off" / "mimic.json").exists()

    history = trainer.storage.histories()
    assert [iteration for _, iteration in history["qmimic/heldout_match_ratio"].values()] == [1, 3, 6]
    assert [iteration for _, iteration in history["qmimic/match_ratio"].values()] == [0, 2, 4]
    assert content_of(tmp_path / "on")["iteration"] == 6
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.json").read_text().splitlines()]
    assert {f"qmimic/{name}" for name in HELDOUT} <= set(rows[-1])
    assert rows[-1]["qmimic/heldout_match_ratio"] == content_of(tmp_path / "on")["levels"]["conv5"]["match_ratio"]
    assert "qmimic" not in json.loads((tmp_path / "on" / "evaluation.json").read_text())["results"]
    # the writer stands behind the evaluations, so that metrics.json has what was measured in an iteration
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds.count(hooks.EvalHook) == 2
    assert kinds[-3:] == [hooks.PeriodicWriter, MimicSummary, TeacherCacheSummary]


def test_tensorboard_shows_scalars_and_histograms(tmp_path, teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(heldout_cfg(tmp_path, teacher))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {f"qmimic/{name}" for name in (*FIGURES, *HELDOUT)} <= set(tags["scalars"])
    assert set(tags["histograms"]) == {"qmimic/student_codes", "qmimic/teacher_codes"}
    entries = 2 * 8 * 32 * 3 * 3  # images, sampled regions, channels, bins
    assert events.Histograms("qmimic/teacher_codes")[-1].histogram_value.num == entries


def test_a_default_trainer_measures_by_the_line_of_the_docs(tmp_path, teacher):
    class Own(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return COCOEvaluator(dataset_name, output_dir=str(tmp_path / "inference"))

        def build_hooks(self):
            return add_mimic_hook(super().build_hooks(), self.cfg, self.model)

    trainer, _ = run_training(heldout_cfg(tmp_path, teacher, "SOLVER.MAX_ITER", 2), Own)
    assert content_of(tmp_path)["num_images"] == 7
    assert "qmimic/heldout_cosine" in (tmp_path / "metrics.json").read_text()


# -------------------------------------------------------------------------------------- when it does not measure


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "QuantRCNN", "ProposalNetwork"])
def test_a_model_without_mimic_is_not_measured(tmp_path, teacher, architecture, caplog):
    cfg = heldout_cfg(tmp_path, teacher, "MODEL.META_ARCHITECTURE", architecture)
    evaluator, model = MimicEvaluator(cfg), seeded_model(cfg)
    assert not evaluator.measures(model) and evaluator(model) == {}
    built = [None, hooks.EvalHook(0, dict)]
    assert add_mimic_hook(built, cfg, model) == built
    # a script of one's own, which calls no check_run, hears of it as well
    assert f"which nothing uses: MODEL.META_ARCHITECTURE is {architecture!r}" in caplog.text
    assert not (tmp_path / "mimic.json").exists()


@pytest.mark.parametrize(
    "options", [(IMAGES, 0), ("DATASETS.TEST", ()), ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", "")], ids=str
)
def test_switched_off(tmp_path, teacher, options):
    cfg = heldout_cfg(tmp_path, teacher, *options)
    assert MimicEvaluator(cfg)(seeded_model(cfg).train()) == {}


def test_an_evaluation_alone_says_why_it_does_not_compare(tmp_path, teacher, caplog):
    cfg = heldout_cfg(tmp_path, teacher)
    model = seeded_model(cfg).eval()
    with caplog.at_level(logging.INFO, "qmimic_d2"):
        assert MimicEvaluator(cfg)(model) == {}
    assert "only a training loads the teacher" in caplog.text and model.mimic.teacher is None


def test_a_set_without_boxes_is_a_warning(tmp_path, teacher, caplog):
    write_coco(tmp_path / "annotations.json", tmp_path / "images", 2)
    content = json.loads((tmp_path / "annotations.json").read_text())
    del content["annotations"]
    (tmp_path / "annotations.json").write_text(json.dumps({**content, "annotations": []}))
    with registered_data(tmp_path, "tiny_boxless", is_written=True) as name:
        cfg = heldout_cfg(tmp_path, teacher, "DATASETS.TEST", (name,))
        assert MimicEvaluator(cfg)(seeded_model(cfg).train()) == {}
    assert "'tiny_boxless'" in caplog.text and "no annotated box" in caplog.text
    assert not (tmp_path / "mimic.json").exists()


def test_a_negative_number_of_images_is_refused(tmp_path, teacher):
    with pytest.raises(ValueError, match=rf"{IMAGES} is -1; .*>= 0"):
        MimicEvaluator(heldout_cfg(tmp_path, teacher, IMAGES, -1))


def test_a_trainer_that_does_not_evaluate_is_refused(tmp_path, teacher):
    cfg = heldout_cfg(tmp_path, teacher)
    with pytest.raises(ValueError, match="EvalHook"):
        add_mimic_hook([HookBase()], cfg, seeded_model(cfg))


@pytest.mark.slow
def test_train_net_evaluates_alone_without_comparing(tmp_path):
    write_builtin_data(tmp_path / "datasets")
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    written = write_teacher(tmp_path)
    cfg = training_cfg(tmp_path / "output", BUILTIN_DATASET, *classes, teacher=written, evaluate=True)
    (tmp_path / "mimic.yaml").write_text(cfg.dump())
    student = seeded_model(cfg)
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
    arguments = ("--config-file", "mimic.yaml", "--eval-only", "MODEL.WEIGHTS", tmp_path / "student.pth")
    with Run(*arguments, cwd=tmp_path, datasets=tmp_path / "datasets") as process:
        assert process.finish() == 0, process.texts()
        text = "".join(process.texts())
    assert "Student and teacher are not compared: only a training loads the teacher" in text
    assert (tmp_path / "output" / "evaluation.json").exists()
    assert not (tmp_path / "output" / "mimic.json").exists()


# --------------------------------------------------------------------------------------- several processes


def process_worker(rank, folder, cfg):
    with registered_data(Path(folder) / "data", DATASET, is_written=True):
        model = DistributedDataParallel(trained_model(cfg), broadcast_buffers=False)
        results = [MimicEvaluator(cfg)(model)]
        one = cfg.clone()
        one.defrost()
        one.MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES = 1  # nothing is left for the second process
        one.OUTPUT_DIR = ""
        results.append(MimicEvaluator(one)(model))
    torch.save(results, os.path.join(folder, f"rank{rank}.pth"))


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_share_the_images_and_sum_their_counts(folder, teacher):
    cfg = heldout_cfg(folder / "processes", teacher)
    (folder / "processes").mkdir()
    run_two_processes(process_worker, folder, cfg)
    shared = content_of(folder / "processes")
    ranks = [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]
    assert ranks[1] == [{}, {}]
    alone = MimicEvaluator(cfg)(trained_model(cfg))
    assert ranks[0][0] == {"qmimic": pytest.approx(alone["qmimic"])}
    expected = content_of(folder / "processes")
    assert shared["levels"]["conv5"]["code_histogram"] == expected["levels"]["conv5"]["code_histogram"]
    assert (shared["num_images"], shared["num_rois"]) == (7, 14)
    assert set(ranks[0][1]["qmimic"]) == HELDOUT
