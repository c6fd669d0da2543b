"""
A rehearsal of a run: its first images, two training steps and one evaluated image, before anything is written.

The run's own code runs here once, on the CPU, on a few small images and in a temporary folder. An error is explained
by the key that causes it.
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from typing import Any, Callable, Dict, Iterator, List, Sequence, Type

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from qmimic_d2.analysis.calibration import evenly_spaced
from qmimic_d2.config_files import changed
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.engine.checks.culprit import explained
from qmimic_d2.engine.mimic_evaluator import MimicEvaluator
from qmimic_d2.engine.trainer import Trainer
from qmimic_d2.randomness import own_randomness

__all__ = ["Rehearsal", "without_a_trace"]

# Images of each data set, images in a batch, training steps, and pixels of the shorter and the longer side of an image.
_NUM_IMAGES = 4
_BATCH_SIZE = 2
_NUM_STEPS = 2
_SHORTER_SIDE = 256
_LONGER_SIDE = 512

# Nodes that the parts read.
_LOADING = ["INPUT.", "DATALOADER.", "DATASETS.", "SOLVER.IMS_PER_BATCH"]
_LOADING += ["MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "MODEL.ROI_KEYPOINT_HEAD."]
_BUILDING = ["MODEL.", "TEST.", "INPUT.FORMAT", "VIS_PERIOD", "GLOBAL."]
_OPTIMIZING = ["SOLVER."]
_STEPPING = [*_BUILDING, *_OPTIMIZING, "INPUT.", "DATALOADER.", "DATASETS."]


class Rehearsal:
    """
    Does the parts of a run one by one.

    Args:
        cfg: frozen, as the processes of the run get it.
        num_processes: of the whole run.
        trainer: class of the run's trainer, whose ``build_`` methods are called.
    """

    def __init__(self, cfg: CfgNode, num_processes: int, trainer: Type[Trainer]):
        self._cfg = cfg
        self._num_processes = num_processes
        self._trainer = trainer

    def build(self) -> nn.Module:
        """
        The model of the config on the CPU, with its initial weights.

        Raises:
            ValueError, KeyError, OSError: names the key.
        """
        return self._part("building the model", self._build, _BUILDING)

    def optimize(self, model: nn.Module) -> None:
        """
        Builds the optimizer, and follows the learning rate's schedule from end to end.

        Raises:
            ValueError: names the key.
        """
        self._part(
            "building the optimizer and its schedule",
            lambda cfg: _walk_schedule(cfg, self._trainer, model),
            _OPTIMIZING,
        )

    def train(self, model: nn.Module) -> None:
        """
        Loads a batch as it is, then trains the model on a small one.

        Args:
            model: of :meth:`build`, in training mode, with the weights that the run begins with, which change.

        Raises:
            ValueError, KeyError, OSError: names the key, or the image.
        """
        with self._few_images("DATASETS.TRAIN", self._cfg.DATASETS.TRAIN):
            self._part("loading the first training images", self._load_batch, _LOADING)
            self._part(
                "the beginning of the training",
                lambda cfg: self._train_few_steps(cfg, self._build(cfg).train()),
                _STEPPING,
                first=lambda: self._train_few_steps(self._cpu_config(self._cfg), model),
            )

    def evaluate(self, model: nn.Module) -> None:
        """
        Evaluates the model on one image of each test set. Its mode becomes eval.

        Raises:
            ValueError, KeyError, OSError: names the key, or the image.
        """
        self._part("preparing the comparison with the teacher", MimicEvaluator, [*_BUILDING, "INPUT."])
        for name in self._cfg.DATASETS.TEST:
            with self._few_images("DATASETS.TEST", [name]):
                self._part(
                    f"the evaluation on {name!r}",
                    lambda cfg, name=name: self._evaluate_one(cfg, self._build(cfg), name),
                    _STEPPING,
                    first=lambda name=name: self._evaluate_one(self._cfg, model, name),
                )

    def _part(
        self, name: str, attempt: Callable[[CfgNode], Any], nodes: List[str], first: Callable[[], Any] = None
    ) -> Any:
        try:
            return first() if first else attempt(self._cfg)
        except Exception as error:  # whatever a wrong value makes Detectron2, PyTorch or Pillow raise
            if self._may_need_its_device(error):
                logging.getLogger(__name__).debug("%s was not rehearsed: %s", name, error)
                return None
            raised = explained(error, self._cfg, name, attempt, nodes)
            if raised is error:
                raise
            raise raised from error

    def _may_need_its_device(self, error: Exception) -> bool:
        """Some operators of a GPU training have no version for the CPU."""
        if self._cfg.MODEL.DEVICE.startswith("cpu"):
            return False
        return isinstance(error, NotImplementedError) or bool(re.search(r"cuda|gpu|cpu", str(error), re.IGNORECASE))

    def _build(self, cfg: CfgNode) -> nn.Module:
        return build_model(self._cpu_config(cfg))

    def _cpu_config(self, cfg: CfgNode) -> CfgNode:
        size = max(1, min(cfg.SOLVER.IMS_PER_BATCH // self._num_processes, _BATCH_SIZE))
        return changed(cfg, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", size)

    def _load_batch(self, cfg: CfgNode) -> List[Dict[str, Any]]:
        return next(iter(self._trainer.build_train_loader(self._cpu_config(cfg))))

    def _train_few_steps(self, cfg: CfgNode, model: nn.Module) -> None:
        batches = iter(self._trainer.build_train_loader(_with_small_images(cfg)))
        optimizer = self._trainer.build_optimizer(cfg, model)
        scheduler = self._trainer.build_lr_scheduler(cfg, optimizer)
        with EventStorage(0) as storage:
            for iteration in range(min(_NUM_STEPS, cfg.SOLVER.MAX_ITER)):
                storage.iter = iteration
                losses = model(next(batches))
                losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
                for name, loss in losses.items():
                    if not torch.isfinite(loss).all():
                        raise FloatingPointError(f"{name} is {loss.sum().item()} in iteration {iteration}")
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                scheduler.step()
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(f"{name} is not finite after {_NUM_STEPS} iterations")

    def _evaluate_one(self, cfg: CfgNode, model: nn.Module, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            cfg = changed(_with_small_images(self._cpu_config(cfg)), "OUTPUT_DIR", folder)
            inputs = next(iter(self._trainer.build_test_loader(cfg, name)))
            evaluator = self._trainer.build_evaluator(cfg, name)
            evaluator.reset()
            evaluator.process(inputs, model.eval()(inputs))
            if type(evaluator).evaluate is COCOEvaluator.evaluate:  # another one may not take img_ids
                results = evaluator.evaluate(img_ids=[each["image_id"] for each in inputs])
                if len(cfg.DATASETS.TEST) == 1:
                    _check_expected_names(cfg.TEST.EXPECTED_RESULTS, results)

    @contextlib.contextmanager
    def _few_images(self, key: str, names: Sequence[str]) -> Iterator[None]:
        """In the block, data sets are a few of their images."""
        originals = {name: DatasetCatalog[name] for name in names}
        few = {name: self._choose(_read_list(key, name)) for name in names}
        try:
            DatasetCatalog.data.update({name: lambda own=own: list(map(dict, own)) for name, own in few.items()})
            yield
        finally:
            DatasetCatalog.data.update(originals)

    def _choose(self, images: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
        fewest = self._cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if self._cfg.MODEL.KEYPOINT_ON else 0

        def is_trained_on(image: Dict[str, Any]) -> bool:
            objects = [each for each in image.get("annotations", ()) if not each.get("iscrowd", 0)]
            visible = sum(flag > 0 for each in objects for flag in each.get("keypoints", ())[2::3])
            return bool(objects) and visible >= fewest

        return evenly_spaced([each for each in images if is_trained_on(each)] or list(images), _NUM_IMAGES)


def _check_expected_names(expected: Sequence[Sequence[Any]], results: Dict[str, Dict[str, float]]) -> None:
    for task, metric, *_ in expected:
        if metric not in results.get(task, ()):
            known = {name: list(figures) for name, figures in results.items()}
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has the figure {metric!r} of {task!r}; an evaluation gives {known}, name "
                "one of them"
            )


def _read_list(key: str, name: str) -> Sequence[Dict[str, Any]]:
    try:
        images = load_dataset(name)
    except Exception as error:  # a function of the user's
        raise ValueError(
            f"{key} names {name!r}, whose list of images cannot be made: {type(error).__name__}: {error}. Correct the "
            "data set, or the function that is registered for it"
        ) from error
    if not len(images):
        raise ValueError(f"{key} names {name!r}, which has no image; name a data set that has some")
    return images


def _with_small_images(cfg: CfgNode) -> CfgNode:
    node = cfg.INPUT
    return changed(
        cfg,
        *("INPUT.MIN_SIZE_TRAIN", tuple(min(each, _SHORTER_SIDE) for each in node.MIN_SIZE_TRAIN)),
        *("INPUT.MAX_SIZE_TRAIN", min(node.MAX_SIZE_TRAIN, _LONGER_SIDE)),
        *("INPUT.MIN_SIZE_TEST", min(node.MIN_SIZE_TEST, _SHORTER_SIDE)),
        *("INPUT.MAX_SIZE_TEST", min(node.MAX_SIZE_TEST, _LONGER_SIDE)),
    )


def _walk_schedule(cfg: CfgNode, trainer: Type[Trainer], model: nn.Module) -> None:
    optimizer = trainer.build_optimizer(cfg, model)
    scheduler = trainer.build_lr_scheduler(cfg, optimizer)
    node = cfg.SOLVER
    # The end is after the last step, where fvcore's schedule of NUM_DECAYS steps has no value.
    places = {0, 1, node.WARMUP_ITERS, *node.STEPS, node.MAX_ITER - 1, node.MAX_ITER}
    for place in sorted(each for each in places if 0 < each <= node.MAX_ITER):
        scheduler.last_epoch = place - 1
        scheduler.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        if not all(0.0 <= each < float("inf") for each in rates):
            raise FloatingPointError(f"the learning rate of iteration {place} is {rates[0]}")


@contextlib.contextmanager
def without_a_trace() -> Iterator[None]:
    """
    In the block nothing is shown. After it, random generators, warnings and Detectron2's counts of what it logs once
    are as before.
    """
    level = logging.root.manager.disable
    counter = getattr(detectron2_logger, "_LOG_COUNTER", {})
    counts = dict(counter)
    logging.disable(logging.CRITICAL)
    try:
        with own_randomness(0), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        counter.clear()
        counter.update(counts)
