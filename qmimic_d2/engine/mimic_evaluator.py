"""Compares student and teacher on held-out images, inside the annotated boxes, at each evaluation of a training."""

import contextlib
import functools
import logging
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from qmimic_d2.analysis.calibration import evenly_spaced
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.mapper import ImageMapper
from qmimic_d2.diagnostics.feature_comparison import FeatureComparison, histogram_codes
from qmimic_d2.engine.hooks import unwrapped
from qmimic_d2.modeling.attach import attached_mimic, takes_a_teacher, warn_of_unused_teacher
from qmimic_d2.modeling.quantizer import CodeQuantizer
from qmimic_d2.randomness import own_randomness
from qmimic_d2.run_folder import MIMIC, write_mimic

__all__ = ["MimicEvaluator", "add_mimic_hook", "annotated_mapper", "has_box"]

Comparisons = Dict[str, FeatureComparison]


class MimicEvaluator:
    """
    Measures how alike student and teacher are on images that neither is trained on.

    Called with a model, it compares what the mimic loss compares: r of the student's map before its quantizer, and
    the teacher's map, inside the annotated boxes. Images are read as an evaluation reads them. The student is in eval
    mode. Every variant of a student is measured on the same dictionary, one without quantizers too. The model, its
    modes and all random generators stay as they were.
    """

    @configurable
    def __init__(
        self,
        *,
        dataset_name: str,
        num_images: int,
        mapper: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]],
        output_dir: str = "",
    ):
        """
        Args:
            dataset_name: a registered data set with boxes; "" for none: nothing is measured.
            num_images: most images, at equal distances in the data set, of those with a box; 0 = off.
            mapper: turns a dict of the data set into one with "image" and, in pixels of that image,
                "instances" with ``gt_boxes``. Of a config it is :class:`ImageMapper`, which enlarges an image
                as an evaluation does.
            output_dir: where ``mimic.json`` is written; "" = nowhere.

        Raises:
            ValueError: ``num_images`` is negative.
        """
        if num_images < 0:
            raise ValueError(
                f"MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES is {num_images}; give a number of images >= 0 (0 = never)"
            )
        self._dataset_name = dataset_name
        self._num_images = num_images
        self._mapper = mapper
        self._output_dir = output_dir

    @classmethod
    def from_config(cls, cfg: CfgNode):
        mapper = None
        if cfg.DATASETS.TEST and cfg.MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES:
            mapper = annotated_mapper(cfg)
        return {
            "dataset_name": cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "",
            "num_images": cfg.MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES,
            "mapper": mapper,
            "output_dir": cfg.OUTPUT_DIR,
        }

    @property
    def _is_on(self) -> bool:
        return bool(self._dataset_name) and self._num_images > 0

    def measures(self, model: nn.Module) -> bool:
        """Whether a call with this model measures something, once it has its teacher."""
        mimic = attached_mimic(unwrapped(model))
        return self._is_on and mimic is not None and mimic.code_quantizer is not None

    def __call__(self, model: nn.Module) -> Dict[str, Dict[str, float]]:
        """
        Measures, writes ``mimic.json``, and returns the figures as Detectron2's evaluations do.

        With several processes each takes its share of the images, and all have to call it.

        Args:
            model: in training or not, wrapped in a DDP or not.

        Returns:
            ``{"qmimic": {"heldout_<figure>": value}}``, with "_<level>" after the name where several levels are
            compared. A level without a region is left out. Empty in every process but the first, and where nothing is
            measured: the model has no mimic, its teacher is not loaded, or the data set has no box.
        """
        model = unwrapped(model)
        if self._is_on and takes_a_teacher(model) and model.mimic.teacher is None:
            logging.getLogger(__name__).info(
                "Student and teacher are not compared: only a training loads the teacher. Its own last comparison is "
                "in %s of its OUTPUT_DIR",
                MIMIC,
            )
            return {}
        if not self.measures(model):
            return {}
        images = self._images
        own = images[comm.get_rank() :: comm.get_world_size()]
        with own_randomness(0), _eval_mode(model):
            inputs = map(self._mapper, own)
            share = _sum_by_level([model.mimic.compare_on([each], [each["instances"].gt_boxes]) for each in inputs])
        comparisons = _sum_by_level(comm.gather(share))
        if not comm.is_main_process():
            return {}
        if not comparisons:
            logging.getLogger(__name__).warning(
                "Student and teacher are not compared: %r, the first of DATASETS.TEST, has no annotated box. Set "
                "MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES 0, or name a set with annotations first",
                self._dataset_name,
            )
            return {}
        self._write(comparisons, len(images), model.mimic.code_quantizer)
        scalars = _scalars(comparisons)
        logging.getLogger(__name__).info(
            "Student and teacher inside the boxes of %d images of %s: %s",
            len(images),
            self._dataset_name,
            ", ".join(f"{name} {value:.3f}" for name, value in scalars.items()),
        )
        return {"qmimic": scalars}

    @functools.cached_property
    def _images(self) -> List[Dict[str, Any]]:
        annotated = [each for each in load_dataset(self._dataset_name) if has_box(each)]
        return evenly_spaced(annotated, self._num_images)

    def _write(self, comparisons: Comparisons, num_images: int, quantizer: CodeQuantizer) -> None:
        if not self._output_dir:
            return
        content = {
            "dataset": self._dataset_name,
            "num_images": num_images,
            "num_rois": sum(each.num_rois for each in comparisons.values()),
            "iteration": get_event_storage().iter if has_event_storage() else -1,
            "quantizer": repr(quantizer),
            "levels": {name: _level_content(each, quantizer) for name, each in comparisons.items()},
        }
        write_mimic(self._output_dir, content)


def add_mimic_hook(built: Sequence[Optional[HookBase]], cfg: CfgNode, model: nn.Module) -> List[Optional[HookBase]]:
    """
    Makes a trainer call a :class:`MimicEvaluator` after each of its evaluations and at the end.

    Args:
        built: hooks of a :class:`DefaultTrainer`, as its ``build_hooks`` makes them.
        cfg: of the training.
        model: that is trained.

    Returns:
        The hooks with one more after the last ``EvalHook``, in every process, or the same ones where
        there is nothing to measure.

    Raises:
        ValueError: a wrong MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES, or no ``EvalHook``.
    """
    built = list(built)
    warn_of_unused_teacher(cfg, unwrapped(model))
    evaluator = MimicEvaluator(cfg)
    if not evaluator.measures(model):
        return built
    places = [index for index, hook in enumerate(built) if isinstance(hook, hooks.EvalHook)]
    if not places:
        raise ValueError("add_mimic_hook takes the hooks of a trainer that evaluates, and none of these is an EvalHook")
    hook = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, lambda: evaluator(model))
    return [*built[: places[-1] + 1], hook, *built[places[-1] + 1 :]]


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode in the block; after it every module is back in its own mode, not all of them in the model's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def annotated_mapper(cfg: CfgNode) -> ImageMapper:
    """Reads images as an evaluation does, and keeps their annotations as boxes of the resized image."""
    mapper = ImageMapper(cfg, is_train=False, use_instance_mask=False, use_keypoint=False)
    mapper.is_train = True  # all that it still decides is whether annotations stay
    return mapper


def has_box(image: Dict[str, Any]) -> bool:
    """A region of a crowd is no object; Detectron2's mapper leaves it out."""
    return any(each.get("iscrowd", 0) == 0 for each in image.get("annotations", ()))


def _sum_by_level(comparisons: Iterable[Comparisons]) -> Comparisons:
    total: Comparisons = {}
    for each in comparisons:
        for name, comparison in each.items():
            total[name] = total[name] + comparison if name in total else comparison
    return total


def _scalars(comparisons: Comparisons) -> Dict[str, float]:
    return {
        f"heldout_{name}" + (f"_{level}" if len(comparisons) > 1 else ""): value
        for level, comparison in comparisons.items()
        if comparison.num_rois
        for name, value in comparison.figures().items()
    }


def _level_content(comparison: FeatureComparison, quantizer: CodeQuantizer) -> Dict[str, Any]:
    histogram = {
        "codes": histogram_codes(quantizer),
        "student": comparison.student_histogram.tolist(),
        "teacher": comparison.teacher_histogram.tolist(),
    }
    return {**comparison.figures(), "code_histogram": histogram}
