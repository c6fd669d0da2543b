"""The trainer: a resumed training is the uninterrupted one, and what it writes, evaluates and optimizes."""

import itertools
import json
import math
import os
import signal

import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator
from helpers import write_teacher
from tiny_training import Recorder, registered_data, training_cfg
from torch import nn
from torchvision.models import vgg

from qmimic_d2.data.resumable_loader import build_resumable_train_loader, resumable_sampler
from qmimic_d2.diagnostics.mimic_summary import MimicSummary
from qmimic_d2.engine import Trainer, build_checkpointer, build_evaluator, load_evaluated_weights
from qmimic_d2.engine.hooks import (
    ResumableBestCheckpointer,
    ResumableLossNormalizer,
    SaveOnInterrupt,
    SeedEachIteration,
    TeacherCacheSummary,
)
from qmimic_d2.engine.metrics_file import WriteMetrics
from qmimic_d2.evaluation import PascalVOCEvaluator

VGG_11 = vgg.cfgs["A"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module", autouse=True)
def data(folder):
    with registered_data(folder / "data", "tiny_trainer") as name:
        yield name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For networks as tiny as these, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(folder):
    return write_teacher(folder)


class StopAfter(HookBase):
    """Sends SIGTERM in the step of an iteration."""

    def __init__(self, iteration):
        self._iteration = iteration

    def before_step(self):
        if self.trainer.iter == self._iteration:
            os.kill(os.getpid(), signal.SIGTERM)


def train(cfg, *, resume=False, stop_after=None, seed=0, trainer_class=Trainer):
    """Trains; returns the trainer and the losses of every step."""
    torch.manual_seed(seed)
    recorder = Recorder()
    trainer = trainer_class(cfg)
    # In front of the writers and what saves on a signal, which ends the step's hooks.
    trainer._hooks.insert(0, recorder)
    recorder.trainer = trainer._hooks[1].trainer
    trainer.resume_or_load(resume=resume)
    if stop_after is not None:
        trainer.register_hooks([StopAfter(stop_after)])
        with pytest.raises(SystemExit) as stopped:
            trainer.train()
        assert stopped.value.code == 128 + signal.SIGTERM
    else:
        trainer.train()
    return trainer, recorder.losses


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


VARIANTS = {
    "plain": (),
    "AdamW, clipped, with workers": (
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.004, "DATALOADER.NUM_WORKERS", 2),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "MODEL.QMIMIC.MIMIC.SCHEDULE", "warmup"),
        *("MODEL.QMIMIC.MIMIC.WARMUP_ITERS", 6, "DATALOADER.ASPECT_RATIO_GROUPING", False),
    ),
    "by repeat factor": (
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9),
        *("SOLVER.IMS_PER_BATCH", 3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_training_repeats_the_uninterrupted_one_exactly(variant, tmp_path, data, teacher):
    def cfg(name, *options):
        # an evaluation falls between checkpoint and end, in one of the two runs also in front of it
        period = ("SOLVER.MAX_ITER", 9, "TEST.EVAL_PERIOD", 4)
        return training_cfg(
            tmp_path / name, data, *period, *VARIANTS[variant], *options, teacher=teacher, evaluate=True
        )

    whole, expected = train(cfg("whole"))
    assert sorted(expected) == list(range(9))
    assert all("loss_mimic" in losses for losses in expected.values())
    num_waiting = []
    for stop_after in (0, 2, 3, 7):
        name = f"stopped after {stop_after}"
        train(cfg(name), stop_after=stop_after)
        # other random numbers before, and another number of workers
        resumed, losses = train(cfg(name, "DATALOADER.NUM_WORKERS", 0), resume=True, seed=99)
        assert resumed.start_iter == stop_after + 1
        assert losses == {iteration: expected[iteration] for iteration in range(stop_after + 1, 9)}
        assert_equal(weights(resumed), weights(whole))
        assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
        assert resumed.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]
        positions = [position for _, position in itertools.islice(resumable_sampler(resumed.data_loader), 4)]
        num_waiting.append(sum(after > before + 1 for before, after in zip(positions, positions[1:])))
    assert any(num_waiting) == resumed.cfg.DATALOADER.ASPECT_RATIO_GROUPING  # else nothing was tested of grouping


def test_evaluation_and_mimic_change_nothing_of_what_is_sampled(tmp_path, data, teacher):
    _, plain = train(training_cfg(tmp_path / "plain", data))
    _, evaluated = train(training_cfg(tmp_path / "evaluated", data, "TEST.EVAL_PERIOD", 2, evaluate=True))
    assert evaluated == plain
    # lambda 0: a student beside a teacher takes the steps that it would take alone
    options = ("MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", 0.0, "MODEL.QMIMIC.QUANTIZER.NAME", "")
    _, measured = train(training_cfg(tmp_path / "measured", data, *options, teacher=teacher))
    assert all(losses.pop("loss_mimic") == 0.0 for losses in measured.values())
    assert measured == plain


def test_a_finished_training_goes_on_when_it_may_be_longer(tmp_path, data):
    constant = ("SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 4, "SOLVER.WARMUP_ITERS", 0)
    whole, expected = train(training_cfg(tmp_path / "whole", data, *constant, "SOLVER.MAX_ITER", 6, evaluate=True))
    short, _ = train(training_cfg(tmp_path / "longer", data, *constant, "SOLVER.MAX_ITER", 4, evaluate=True))
    assert short.checkpointer.get_checkpoint_file().endswith("model_best.pth")  # of the last evaluation
    cfg = training_cfg(tmp_path / "longer", data, *constant, "SOLVER.MAX_ITER", 6, evaluate=True)
    longer, losses = train(cfg, resume=True)
    assert losses == {4: expected[4], 5: expected[5]}
    assert_equal(weights(longer), weights(whole))
    # nothing is left to do
    again, losses = train(cfg, resume=True)
    assert losses == {}
    assert_equal(weights(again), weights(whole))


class TestOutputs:
    @pytest.fixture(scope="class")
    def output(self, folder, data, teacher):
        options = ("TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4)
        cfg = training_cfg(folder / "outputs", data, *options, teacher=teacher, evaluate=True)
        trainer, _ = train(cfg)
        return cfg, trainer

    def test_files(self, output, folder):
        names = {path.name.split(".17")[0] for path in (folder / "outputs").iterdir()}
        expected = {"metrics.json", "evaluation.json", "inference", "last_checkpoint"}
        assert expected | {"model_0000003.pth", "model_final.pth", "model_best.pth"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert not any(name.endswith((".part", ".partial")) for name in names)

    def test_a_checkpoint_holds_no_tensor_of_the_teacher(self, output, folder, data):
        content = torch.load(folder / "outputs" / "model_final.pth", weights_only=True)
        student = Trainer.build_model(training_cfg(folder / "none", data)).state_dict()
        extra = set(content["model"]) - set(student)
        assert extra == {"mimic.adapters.conv5.weight", "mimic.adapters.conv5.bias"}
        shapes = {name: tensor.shape for name, tensor in content["model"].items() if name in student}
        assert shapes == {name: tensor.shape for name, tensor in student.items()}
        optimized = content["trainer"]["_trainer"]["optimizer"]["state"]
        assert len(optimized) == sum(1 for _ in output[1].model.parameters())

    def test_metrics(self, output, folder):
        rows = [json.loads(line) for line in (folder / "outputs" / "metrics.json").read_text().splitlines()]
        assert {"total_loss", "loss_mimic", "lr", "time", "bbox/AP", "qmimic/match_ratio"} <= set().union(*rows)

    def test_evaluation_json(self, output, folder, data):
        cfg, trainer = output
        content = json.loads((folder / "outputs" / "evaluation.json").read_text())
        assert content["datasets"] == [data]
        latest = trainer.storage.latest()["bbox/AP"][0]
        assert content["results"]["bbox"]["AP"] == pytest.approx(latest, abs=1e-9)

    def test_an_evaluation_needs_the_students_tensors_alone(self, output, folder, data):
        cfg = training_cfg(folder / "evaluated", data, "MODEL.META_ARCHITECTURE", "QuantMimicRCNN", evaluate=True)
        model = Trainer.build_model(cfg)
        other = cfg.clone()
        other.defrost()
        other.MODEL.WEIGHTS = str(folder / "outputs" / "model_final.pth")
        load_evaluated_weights(model, other)
        own = model.state_dict()
        trained = output[1].model.state_dict()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in own.items())
        other.OUTPUT_DIR, other.MODEL.WEIGHTS = str(folder / "outputs"), ""
        load_evaluated_weights(Trainer.build_model(cfg), other, resume=True)
        with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
            load_evaluated_weights(Trainer.build_model(cfg), other)


def test_the_best_model_outlives_resume(tmp_path, data, monkeypatch):
    figures = iter([20.0, 30.0, 25.0, 10.0])
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {"bbox": {"AP": next(figures)}}))

    def cfg():
        return training_cfg(tmp_path, data, "SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 2, evaluate=True)

    class Stop(HookBase):
        def after_step(self):  # behind the second evaluation, which saved model_best
            if self.trainer.iter == 3:
                raise KeyError("killed")

    trainer = Trainer(cfg())
    trainer.register_hooks([Stop()])
    with pytest.raises(KeyError, match="killed"):
        trainer.train()
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_best.pth")
    resumed, losses = train(cfg(), resume=True)
    assert sorted(losses) == [4, 5, 6, 7]
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 3
    assert best["trainer"]["hooks"]["ResumableBestCheckpointer"] == {"best_metric": 30.0, "best_iter": 3}


class TestHooks:
    def order(self, cfg):
        return [type(hook) for hook in Trainer(cfg)._hooks]

    def test_order(self, tmp_path, data):
        assert self.order(training_cfg(tmp_path, data, "TEST.EVAL_PERIOD", 2, evaluate=True)) == [
            SeedEachIteration,
            ResumableLossNormalizer,
            hooks.IterationTimer,
            hooks.LRScheduler,
            WriteMetrics,
            hooks.PeriodicCheckpointer,
            SaveOnInterrupt,
            hooks.EvalHook,
            ResumableBestCheckpointer,
            WriteMetrics,
            hooks.PeriodicWriter,
            MimicSummary,
            TeacherCacheSummary,
        ]

    def test_without_evaluation_no_best(self, tmp_path, data):
        assert ResumableBestCheckpointer not in self.order(training_cfg(tmp_path, data, evaluate=True))
        assert ResumableBestCheckpointer not in self.order(training_cfg(tmp_path, data, "TEST.EVAL_PERIOD", 2))

    def test_best_of_several_test_sets_is_that_of_the_first(self, tmp_path, data):
        cfg = training_cfg(tmp_path, data, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", (data, "other"))
        best = next(hook for hook in Trainer(cfg)._hooks if isinstance(hook, ResumableBestCheckpointer))
        assert best._val_metric == f"{data}/bbox/AP"

    def test_precise_batch_norm(self, tmp_path, data, teacher):
        options = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3, "TEST.EVAL_PERIOD", 4)
        cfg = training_cfg(tmp_path / "precise", data, *options, teacher=teacher)
        assert hooks.PreciseBN in self.order(cfg)
        precise, losses = train(cfg)
        plain, expected = train(training_cfg(tmp_path / "plain", data, teacher=teacher))
        assert losses == expected  # BatchNorm trains on the statistics of its batch
        name = "backbone.conv1.conv1.norm.running_mean"
        assert not torch.equal(weights(precise)[name], weights(plain)[name])


def test_negative_seed_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="SEED is -1"):
        Trainer(training_cfg(tmp_path, data, "SEED", -1))


def test_a_loader_of_ones_own_trains_and_says_what_resume_cannot(tmp_path, data, caplog):
    class StockOrder(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    class Mapped(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_resumable_train_loader(cfg, cfg.SEED, mapper=DatasetMapper(cfg, True, augmentations=[]))[0]

    cfg = training_cfg(tmp_path / "stock", data)
    train(cfg, stop_after=1, trainer_class=StockOrder)
    assert "order begins anew" not in caplog.text
    train(cfg, resume=True, trainer_class=StockOrder)
    assert "order begins anew" in caplog.text
    whole, expected = train(training_cfg(tmp_path / "whole", data), trainer_class=Mapped)
    cfg = training_cfg(tmp_path / "mapped", data)
    train(cfg, stop_after=1, trainer_class=Mapped)
    resumed, losses = train(cfg, resume=True, trainer_class=Mapped)
    assert losses == {iteration: expected[iteration] for iteration in range(2, 6)}
    assert_equal(weights(resumed), weights(whole))


def test_reference_world_size_scales_as_in_detectron2(tmp_path, data):
    trainer = Trainer(training_cfg(tmp_path, data, "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.BASE_LR", 0.02))
    assert (trainer.cfg.SOLVER.IMS_PER_BATCH, trainer.max_iter, trainer.cfg.SOLVER.BASE_LR) == (1, 12, 0.01)


class TestSolver:
    @pytest.mark.parametrize(
        "options, expected",
        [
            (("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"), [0.02, 0.02, 0.02, 0.02, 0.002, 0.002]),
            (
                ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.NUM_DECAYS", 2),
                [0.01 * (1.0 + math.cos(math.pi * step / 6)) for step in range(6)],
            ),
        ],
    )
    def test_schedule(self, tmp_path, data, options, expected):
        cfg = training_cfg(tmp_path, data, "SOLVER.WARMUP_ITERS", 0, *options)
        trainer, _ = train(cfg)
        assert [rate for rate, _ in trainer.storage.history("lr").values()] == pytest.approx(expected)

    def test_gradients_are_clipped(self, tmp_path, data):
        clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
        options = (*clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01, "SOLVER.MAX_ITER", 1)
        for optimizer in ("SGD", "AdamW"):
            cfg = training_cfg(tmp_path / optimizer, data, *options, "SOLVER.OPTIMIZER", optimizer)
            trainer, _ = train(cfg)
            norms = [parameter.grad.norm().item() for parameter in trainer.model.parameters()]
            assert max(norms) == pytest.approx(0.01, rel=1e-3)

    def test_adamw_has_detectron2s_parameter_groups(self, tmp_path, data):
        options = ("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.01)
        cfg = training_cfg(tmp_path, data, *options, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BIAS_LR_FACTOR", 2.0)
        model = Trainer.build_model(cfg)
        optimizer = Trainer.build_optimizer(cfg, model)
        assert isinstance(optimizer, torch.optim.AdamW)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        conv = model.backbone.conv1.conv1
        bias = model.proposal_generator.rpn_head.conv.bias
        decays = [group_of[id(p)]["weight_decay"] for p in (conv.weight, conv.norm.weight, bias)]
        rates = [group_of[id(p)]["lr"] for p in (conv.weight, conv.norm.weight, bias)]
        assert decays == [0.05, 0.0, 0.01]
        assert rates == [0.02, 0.02, 0.04]
        assert len(group_of) == len(list(model.parameters()))


class TestEvaluators:
    @pytest.fixture
    def named(self):
        yield MetadataCatalog.get("tiny_evaluated")
        MetadataCatalog.remove("tiny_evaluated")

    def test_coco(self, tmp_path, data):
        evaluator = build_evaluator(training_cfg(tmp_path, data), data)
        assert isinstance(evaluator, COCOEvaluator)
        assert evaluator._output_dir == str(tmp_path / "inference")
        assert isinstance(Trainer.build_evaluator(training_cfg(tmp_path, data), data), COCOEvaluator)

    def test_pascal_voc(self, tmp_path, data, named):
        named.set(evaluator_type="pascal_voc", dirname=str(tmp_path), split="test", year=2007, thing_classes=["a"])
        assert isinstance(build_evaluator(training_cfg(tmp_path, data), "tiny_evaluated"), PascalVOCEvaluator)

    def test_unknown(self, tmp_path, data, named):
        expected = "'tiny_evaluated'.*evaluator_type ''.*'coco', 'pascal_voc' or 'wider_face'"
        with pytest.raises(ValueError, match=expected):
            build_evaluator(training_cfg(tmp_path, data), "tiny_evaluated")

    def test_nothing_is_written_where_nothing_was_evaluated(self, tmp_path, data):
        Trainer.test(training_cfg(tmp_path, data), nn.Identity())
        assert not (tmp_path / "evaluation.json").exists()


def test_processes_evaluate_what_the_first_of_them_saves(tmp_path, data, monkeypatch):
    broadcast = []
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: broadcast.append((tensor, source)))
    model = nn.BatchNorm2d(2)
    Trainer.test(training_cfg(tmp_path, data), model)
    assert broadcast == []
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    Trainer.test(training_cfg(tmp_path, data), model)
    assert [source for _, source in broadcast] == [0, 0, 0]
    assert all(shared is own for (shared, _), own in zip(broadcast, model.buffers()))


def torchvision_vgg(seed=0):
    """The convolutions of torchvision's vgg11_bn, with BatchNorms as after a training."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential()
    network.features = vgg.make_layers(VGG_11, batch_norm=True)
    for module in network.features:
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(std=0.2, generator=generator)
    return network.eval()


@pytest.mark.parametrize("is_fpn", [False, True])
def test_imagenet_weights_of_torchvision_fill_the_backbone(tmp_path, data, is_fpn):
    network = torchvision_vgg()
    state = network.features.state_dict(prefix="features.")
    torch.save({**state, "classifier.6.bias": torch.zeros(3)}, tmp_path / "vgg11_bn.pth")
    options = ["MODEL.VGG.WIDTH_DIVISOR", 1, "MODEL.VGG.LAST_NORM", False, "MODEL.VGG.STAGE_STRIDES", [1, 2, 2, 2, 2]]
    if is_fpn:
        options += ["MODEL.BACKBONE.NAME", "build_vgg_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8]
        options += ["MODEL.VGG.OUT_FEATURES", ["conv3", "conv4", "conv5"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16]] * 4]
        options += ["MODEL.FPN.IN_FEATURES", ["conv3", "conv4", "conv5"], "MODEL.RPN.IN_FEATURES"]
        options += [["p2", "p3", "p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]]
    model = Trainer.build_model(training_cfg(tmp_path, data, *options)).eval()
    build_checkpointer(model, "").load(str(tmp_path / "vgg11_bn.pth"))
    backbone = model.backbone.bottom_up if is_fpn else model.backbone
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = backbone(image)["conv5"], network.features[:-1](image)
    assert not hasattr(backbone.conv5.conv2, "norm") or backbone.conv5.conv2.norm is None
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_backbone_can_be_saved_and_read(tmp_path):
    model = nn.Linear(2, 2)
    build_checkpointer(model, str(tmp_path)).save("linear")
    build_checkpointer(nn.Linear(2, 2), str(tmp_path)).load_for_evaluation(str(tmp_path / "linear.pth"))


def test_it_is_a_default_trainer():
    assert issubclass(Trainer, DefaultTrainer)
