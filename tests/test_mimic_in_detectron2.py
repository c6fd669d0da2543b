"""How Detectron2 trains a student: other heads, mixed precision, hooks, two processes."""

import itertools
import os

import pytest
import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_context
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from helpers import (
    CASCADE,
    RESNET_FPN,
    batch,
    calls_of_mimic_loss,
    maps_of_teacher,
    run_two_processes,
    seeded_model,
    training_step,
)
from mimic_models import NAME, PERIOD, PLAIN, QMIMIC, ROI_SOURCE, assert_equal, detections_of, mimic_cfg, mimic_model
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.modeling.checkpointer import build_checkpointer


def test_a_cascade_trains_too(vgg_teacher):
    model = mimic_model(*vgg_teacher.options, *CASCADE)
    calls = calls_of_mimic_loss(model)
    sampled = []
    model.roi_heads.register_forward_hook(lambda module, args, output: sampled.extend(output[0]))
    step = training_step(model, batch())
    assert {"loss_cls_stage0", "loss_cls_stage2", "loss_mimic"} <= set(step.losses)
    assert_equal([each.tensor for each in calls[0]["boxes"]], [each.proposal_boxes.tensor for each in sampled])


@pytest.mark.parametrize("options", [(), PLAIN, CASCADE, (NAME, "PowerOfTwo")])
def test_mixed_precision(vgg_teacher, options):
    model = mimic_model(*vgg_teacher.options, *options).train()
    full = training_step(model, batch())
    torch.manual_seed(5)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch((64, 64), (80, 64)))
        same = model(batch())["loss_mimic"]
    sum(losses.values()).backward()
    assert losses["loss_mimic"].dtype == torch.float32
    assert same.item() == pytest.approx(full.losses["loss_mimic"].item(), rel=0.3)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())


def test_detectron2s_trainer_and_hooks(vgg_teacher, tmp_path):
    cfg = mimic_cfg(*vgg_teacher.options, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 2, PERIOD, 2)
    model = seeded_model(cfg)
    assert model.mimic.teacher is None
    optimizer = build_optimizer(cfg, model)
    data = [batch(seed=seed) for seed in range(2)]
    trainer = SimpleTrainer(model, itertools.cycle(data), optimizer)
    assert model.mimic.teacher is not None  # the trainer calls train(): mistakes show before the first iteration
    checkpointer = build_checkpointer(model, str(tmp_path))
    evaluated = []

    def evaluate():
        with inference_context(model):
            evaluated.append(len(detections_of(model, batch())))
        return {}

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            hooks.PreciseBN(4, model, itertools.cycle(data), 2),
            hooks.PeriodicCheckpointer(checkpointer, 2, max_iter=4),
            hooks.EvalHook(2, evaluate),
        ]
    )
    before = maps_of_teacher(model)
    trainer.train(0, 4)
    assert evaluated == [2, 2]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
    ]
    history = trainer.storage.histories()
    assert len(history["loss_mimic"].values()) == 4 and len(history["qmimic/match_ratio"].values()) == 2
    assert not any(name.startswith("qmimic/") and "loss" in name for name in history)
    assert_equal(maps_of_teacher(model), before)


def ddp_worker(rank: int, folder: str, options: list) -> None:
    """One of two processes; the second one's images have no annotation."""
    results = {}
    for name, (own_options, iteration) in options.items():
        model = DistributedDataParallel(mimic_model(*own_options).train(), broadcast_buffers=False)
        step = training_step(model, ddp_batch(rank), iteration=iteration)
        results[name] = (step.losses, step.gradients, maps_of_teacher(model.module))
    torch.save(results, os.path.join(folder, f"rank{rank}.pth"))


def ddp_batch(rank):
    return batch(seed=rank, num_boxes=(2,) if rank == 0 else (0,))


@pytest.mark.ddp
def test_two_processes_one_without_regions(vgg_teacher, fpn_teacher, tmp_path):
    warm_up = (f"{QMIMIC}.MIMIC.SCHEDULE", "warmup", f"{QMIMIC}.MIMIC.WARMUP_ITERS", 10)
    source = (ROI_SOURCE, ["ground_truth"])
    # gradients are the mean of the two processes' own, in every process
    runs = {
        "ground truth": ([*vgg_teacher.options, *source], 0),
        "warm-up": ([*vgg_teacher.options, *source, *warm_up], 0),
        "sampled": ([*vgg_teacher.options, *PLAIN], 0),
        "levels": ([*RESNET_FPN, *fpn_teacher.options, *source], 0),
    }
    run_two_processes(ddp_worker, tmp_path, runs)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    for name, (options, iteration) in runs.items():
        alone = [training_step(mimic_model(*options), ddp_batch(rank), iteration=iteration) for rank in range(2)]
        (losses_0, gradients_0, teacher_0), (losses_1, gradients_1, teacher_1) = (each[name] for each in ranks)
        assert_equal(gradients_0, gradients_1)
        assert_equal(teacher_0, teacher_1)
        assert all(torch.isfinite(gradient).all() for gradient in gradients_0.values())
        mean = {
            f"module.{key}": (gradient + alone[1].gradients[key]) / 2
            for key, gradient in alone[0].gradients.items()
        }
        torch.testing.assert_close(gradients_0, mean)
        torch.testing.assert_close(losses_0, alone[0].losses)
        torch.testing.assert_close(losses_1, alone[1].losses)
        assert not any("teacher" in key for key in gradients_0)
    assert ranks[0]["ground truth"][0]["loss_mimic"].item() > 0.0
    assert ranks[1]["ground truth"][0]["loss_mimic"].item() == 0.0
