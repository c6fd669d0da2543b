"""
The same trainings on a CPU with 40 % less time per iteration, for evidence of many runs.

What a run computes stays what its config says. Four things are computed otherwise, so that its numbers differ by
rounding, as they do between two processors:

- images are decoded once and not once per epoch (equal to the last bit);
- the teacher's maps of the training images are computed once, one image at a time, and kept in a file that runs with
  the same teacher and codes share;
- ROIAlign of the box head is computed with :func:`dense_roi_align` in training;
- AdamW updates a parameter in one pass (PyTorch's ``fused``).

Possible only where an image is the same in every epoch, which is checked.
"""

import functools
import hashlib
import os
from typing import Any, Callable, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from qmimic_d2.data.resumable_loader import build_resumable_train_loader
from qmimic_d2.engine import Trainer
from qmimic_d2.files import whole_file
from qmimic_d2.modeling import ClampQuantizer, FrozenTeacher, PowerOfTwoQuantizer, UniformQuantizer
from qmimic_d2.modeling.attach import attached_mimic
from qmimic_d2.modeling.mimic.teacher import stack_maps
from qmimic_d2.modeling.roi_pooling import LevelPooler

__all__ = ["CachedMapper", "FastTrainer", "SharedTeacherMaps", "TrainingBoxPooler", "check_images_repeat"]

# Quantizers whose codes do not depend on the iteration, and so can be kept.
_CONSTANT_QUANTIZERS = (UniformQuantizer, PowerOfTwoQuantizer, ClampQuantizer)


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
        model = super().build_model(cfg)
        mimic = attached_mimic(model)
        if mimic is not None:
            mimic.build_teacher = functools.partial(_build_shared_teacher, cfg)
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
    A box head's ROIAlign of one map: in training as matrix products, in evaluation as it was.

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


class SharedTeacherMaps(FrozenTeacher):
    """
    A teacher that reads its maps of known images from a file.

    Maps are computed one image at a time, so what an image gets does not depend on the images beside it, nor on
    whether the file was there. Images that are not in the file go through the backbone as ever.
    """

    _maps: Dict[str, List[Tensor]] = {}
    _row_of: Dict[str, int] = {}

    def remember(self, images: List[Dict[str, Any]], mapper: Callable, mapping: str, folder: str) -> None:
        """
        Reads the maps of a data set's images from the folder, and computes and writes them first where they are
        not there.

        Args:
            images: dicts of the data set.
            mapper: from such a dict to one with "image", the student's input.
            mapping: tells this mapper from others.
            folder: is made; one file per teacher with its codes and preprocessing, images, and mapping.
        """
        names = [each["file_name"] for each in images]
        path = os.path.join(folder, f"{self._key(names, mapping)}.pth")
        if not os.path.isfile(path):
            computed = [super(SharedTeacherMaps, self).features([mapper(each)]) for each in images]
            kept = {name: [maps[name][0].clone() for maps in computed] for name in self._features}
            os.makedirs(folder, exist_ok=True)
            with whole_file(path) as partial:  # another run may be at it, too
                torch.save(kept, partial)
        self._maps = torch.load(path, mmap=True, weights_only=True)
        self._row_of = {name: row for row, name in enumerate(names)}

    def _key(self, names: List[str], mapping: str) -> str:
        """Of everything that the maps depend on, the bytes of the image files included."""
        preprocessing = (self._input_scale, self._flip_channels, self._pixel_mean.tolist(), self._pixel_std.tolist())
        codes = repr(self.quantizer)
        content = hashlib.sha256(repr((self.digest, codes, self._features, preprocessing, mapping)).encode())
        for name in names:
            with open(name, "rb") as file:
                content.update(repr((name, hashlib.sha256(file.read()).hexdigest())).encode())
        return content.hexdigest()[:16]

    @torch.inference_mode()
    def features(self, batched_inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """As :meth:`FrozenTeacher.features`."""
        rows = [self._row_of.get(each.get("file_name"), -1) for each in batched_inputs]
        if min(rows) < 0:
            return super().features(batched_inputs)
        return {name: stack_maps([maps[row] for row in rows]) for name, maps in self._maps.items()}


def _build_shared_teacher(cfg: CfgNode) -> FrozenTeacher:
    teacher = SharedTeacherMaps(cfg)
    if teacher.quantizer is None or type(teacher.quantizer) in _CONSTANT_QUANTIZERS:
        images = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        folder = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "teacher_maps")
        teacher.remember(images, DatasetMapper(cfg, is_train=True), str(cfg.INPUT), folder)
    return teacher
