"""The AP of a model on a test set, or on a part of it, as one number."""

import contextlib
import functools
import io
import tempfile
from typing import Any, Callable, Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset
from torch import nn

from qmimic_d2.analysis.calibration import build_image_loader, evenly_spaced
from qmimic_d2.config_files import changed
from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.engine.checks.data import check_evaluated_classes
from qmimic_d2.engine.trainer import build_evaluator
from qmimic_d2.progress import track

__all__ = ["APEvaluation"]


class APEvaluation:
    """
    Evaluates models one after the other on the same images: ``ap = evaluation(model)``.

    What the evaluator writes goes to a temporary folder, so that the results of a training in
    ``OUTPUT_DIR`` stay; what COCO's API prints is dropped.

    Attributes:
        dataset_name: of the test set.
        num_images: evaluated on.
        num_images_in_dataset: in the whole test set.
    """

    def __init__(
        self,
        cfg: CfgNode,
        dataset_name: str,
        max_images: int = 0,
        mapper: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None,
    ):
        """
        Args:
            cfg: of the models, for their preprocessing.
            dataset_name: registered, with an evaluator that reports "bbox" "AP".
            max_images: evaluate on so many images only, evenly spaced over the set; 0 = all.
            mapper: from a data set's dict to a model's input; that of an evaluation when left out.

        Raises:
            KeyError: the data set is not registered.
            ValueError: there is no evaluator for it, or none that can evaluate a part of it; the data cannot be
                used, or have other classes than ``cfg.DATASETS.TRAIN``.
        """
        dicts = load_dataset_dicts(dataset_name, filter_empty=False)
        check_evaluated_classes(cfg, dataset_name)
        chosen = evenly_spaced(dicts, max_images or len(dicts))
        self.dataset_name = dataset_name
        self.num_images = len(chosen)
        self.num_images_in_dataset = len(dicts)
        self._folder = tempfile.TemporaryDirectory(prefix="qmimic_d2_")
        self._evaluator = build_evaluator(changed(cfg, "OUTPUT_DIR", self._folder.name), dataset_name)
        if self.is_subset:
            _restrict(self._evaluator, dataset_name, [each["image_id"] for each in chosen])
        self._loader = build_image_loader(cfg, chosen, mapper)

    @property
    def is_subset(self) -> bool:
        """Whether a part of the test set stands for it."""
        return self.num_images < self.num_images_in_dataset

    def __call__(self, model: nn.Module, title: str = "") -> float:
        """
        Args:
            model: in evaluation mode.
            title: of its progress.

        Returns:
            AP in points, 0 to 100; NaN where the model detects nothing at all.

        Raises:
            ValueError: the evaluator reports no box AP.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            loader = track(self._loader, title or f"evaluating on {self.dataset_name}")
            results = inference_on_dataset(model, loader, self._evaluator)
        try:
            return float(results["bbox"]["AP"])
        except KeyError:
            raise ValueError(
                f"DATASETS.TEST names {self.dataset_name!r}, whose evaluator reports no AP of boxes; it "
                f"reports {sorted(results)}"
            ) from None


def _restrict(evaluator: DatasetEvaluator, dataset_name: str, image_ids: List[int]) -> None:
    """Makes a COCO evaluator take other images than these for none."""
    if not isinstance(evaluator, COCOEvaluator):
        raise ValueError(
            f"{type(evaluator).__name__}, the evaluator of {dataset_name!r}, takes the whole test set only; "
            "evaluate on all of its images"
        )
    evaluator.evaluate = functools.partial(evaluator.evaluate, img_ids=image_ids)
