"""
The same trainings on a CPU with 40 % less time per iteration, for evidence of many runs.

What a run computes stays what its config says. Four things are computed otherwise, so that its numbers differ by
rounding, as they do between two processors:

- images are decoded once and not once per epoch (equal to the last bit);
- the teacher's maps are computed one image at a time and kept in a cache (MODEL.QMIMIC.TEACHER.CACHE) next to the
  run's folder, which runs with the same teacher and codes share;
- ROIAlign of the box head is computed by :class:`LevelPooler` in training;
- AdamW updates a parameter in one pass (PyTorch's ``fused``).

Possible only where an image is the same in every epoch, which is checked.
"""

import os
from typing import Any, Callable, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from qmimic_d2.config_files import changed
from qmimic_d2.data.resumable_loader import build_resumable_train_loader
from qmimic_d2.engine import Trainer
from qmimic_d2.modeling.quantizer import CONSTANT_QUANTIZERS, build_quantizer
from qmimic_d2.modeling.roi_pooling import LevelPooler

__all__ = ["CachedMapper", "FastTrainer", "TrainingBoxPooler", "check_images_repeat"]


class FastTrainer(Trainer):
    """
    As :class:`Trainer`, faster on a CPU.

    Raises:
        ValueError: augmentation would change an image between epochs.
    """

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        check_images_repeat(cfg)
        loader, _ = build_resumable_train_loader(cfg, cfg.SEED, CachedMapper(DatasetMapper(cfg, is_train=True)))
        return loader

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["fused"] = isinstance(optimizer, torch.optim.AdamW)
        return optimizer

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        if type(build_quantizer(cfg)) in (*CONSTANT_QUANTIZERS, type(None)):
            folder = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "teacher_maps")
            cfg = changed(cfg, "MODEL.QMIMIC.TEACHER.CACHE", folder)
        model = super().build_model(cfg)
        pooler = getattr(getattr(model, "roi_heads", None), "box_pooler", None)
        if isinstance(pooler, ROIPooler) and len(pooler.level_poolers) == 1:
            model.roi_heads.box_pooler = TrainingBoxPooler(pooler, cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE)
        return model


def check_images_repeat(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: ``cfg.INPUT`` has an augmentation that draws random numbers.
    """
    node = cfg.INPUT
    if node.RANDOM_FLIP != "none" or node.CROP.ENABLED or len(set(node.MIN_SIZE_TRAIN)) > 1:
        raise ValueError(
            "INPUT.RANDOM_FLIP, INPUT.CROP or INPUT.MIN_SIZE_TRAIN changes images between epochs, and fast training "
            "keeps them; run this config with train_net.py"
        )


class CachedMapper:
    """What another mapper makes of a data set's dict, made once per file."""

    def __init__(self, mapper: Callable[[Dict[str, Any]], Dict[str, Any]]):
        self._mapper = mapper
        self._made: Dict[str, Dict[str, Any]] = {}

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        name = dataset_dict["file_name"]
        if name not in self._made:
            self._made[name] = self._mapper(dataset_dict)
        return dict(self._made[name])


class TrainingBoxPooler(nn.Module):
    """
    A box head's ROIAlign of one map: in training by :class:`LevelPooler`, in evaluation as it was.

    Args:
        pooler: Detectron2's, of one level.
        pooler_type: MODEL.ROI_BOX_HEAD.POOLER_TYPE.
    """

    def __init__(self, pooler: ROIPooler, pooler_type: str):
        super().__init__()
        level = pooler.level_poolers[0]
        shape = {"map": ShapeSpec(stride=round(1.0 / level.spatial_scale))}
        ratio = getattr(level, "sampling_ratio", 0)
        self._in_evaluation = pooler
        self._in_training = LevelPooler(shape, pooler_type, pooler.output_size[0], ratio)

    def forward(self, maps: List[Tensor], boxes: List[Boxes]) -> Tensor:
        """
        Args:
            maps: one, shape (N, C, H, W).
            boxes: N Boxes in pixels of the input image.

        Returns:
            shape (M, C, P, P).
        """
        if not self.training:
            return self._in_evaluation(maps, boxes)
        return self._in_training.pool(0, maps[0], self._in_training.assign(boxes)[0])
