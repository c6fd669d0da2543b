"""Tiny configs, teachers and batches that several tests share: ``from helpers import tiny_cfg``."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, distributed, nn

from qmimic_d2.config import add_qmimic_config

NUM_CLASSES = 3
NUM_KEYPOINTS = 2

# Faster R-CNN on a VGG-11 of 2, 4, 8, 16, 16 channels; conv5 has stride 8.
_TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": False,
    "MODEL.PIXEL_MEAN": [127.5, 127.5, 127.5],
    "MODEL.PIXEL_STD": [64.0, 64.0, 64.0],
    "MODEL.BACKBONE.NAME": "build_vgg_backbone",
    "MODEL.VGG.DEPTH": 11,
    "MODEL.VGG.WIDTH_DIVISOR": 32,
    "MODEL.VGG.NORM": "BN",
    "MODEL.VGG.STAGE_STRIDES": [2, 2, 2, 1, 1],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.RPN.IN_FEATURES": ["conv5"],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 12,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 12,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["conv5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "MODEL.QMIMIC.MIMIC.POOLER_RESOLUTION": 3,
    "MODEL.QMIMIC.QUANTIZER.STRIDE": 0.25,
    "SOLVER.IMS_PER_BATCH": 2,
    "SEED": 1,
}

# KEY VALUE pairs that put an FPN (p3 to p5 and p6, 8 channels) on a ResNet-18 of 4, 8, 16, 32 channels.
RESNET_FPN = (
    *("MODEL.BACKBONE.NAME", "build_divided_resnet_fpn_backbone"),
    *("MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.WIDTH_DIVISOR", 16),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]]),
    *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]),
    *("MODEL.QMIMIC.QUANTIZER.SIGNED", True),
)

# KEY VALUE pairs that make a ResNet-18 of one map, res4 at stride 8, with 16 channels.
RESNET_C4 = (
    *("MODEL.BACKBONE.NAME", "build_divided_resnet_backbone"),
    *("MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.WIDTH_DIVISOR", 16),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STAGE_STRIDES", [1, 2, 1, 1]),
    *("MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.RPN.IN_FEATURES", ["res4"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
)

MASK_HEAD = (
    *("MODEL.MASK_ON", True),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 4),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
)

KEYPOINT_HEAD = (
    *("MODEL.KEYPOINT_ON", True),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 1),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (4,)),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", NUM_KEYPOINTS),
    *("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 4),
    # else a batch whose sampled proposals hold no visible keypoint stops the training
    *("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", False),
)

RFCN = (
    *("MODEL.ROI_HEADS.NAME", "RFCNROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    *("MODEL.RFCN.NUM_BINS", 3),
    *("MODEL.RFCN.CONV_DIM", 8),
)

CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)

# KEY VALUE pairs of the one-stage detectors, by the name that "Quant" or "QuantMimic" stands in front of. They read
# conv5 of the VGG; ONE_STAGE_FPN has four levels. Their students need another ROI_SOURCE than the default.
ONE_STAGE = {
    name: (
        *(f"MODEL.{name.upper()}.IN_FEATURES", ["conv5"]),
        *(f"MODEL.{name.upper()}.NUM_CLASSES", NUM_CLASSES),
        *(f"MODEL.{name.upper()}.NUM_CONVS", 1),
        *("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["ground_truth"]),
    )
    for name in ("RetinaNet", "FCOS")
}
ONE_STAGE_FPN = {
    name: (*RESNET_FPN, *options, f"MODEL.{name.upper()}.IN_FEATURES", ["p3", "p4", "p5", "p6"])
    for name, options in ONE_STAGE.items()
}


def tiny_cfg(*options: Any, meta_architecture: str = "GeneralizedRCNN") -> CfgNode:
    """A config of a tiny Faster R-CNN on the CPU, not frozen, with KEY VALUE pairs put over it."""
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.merge_from_list([each for pair in _TINY.items() for each in pair])
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.merge_from_list(list(options))
    return cfg


def seeded_model(cfg: CfgNode, seed: int = 1) -> nn.Module:
    """The model of a config with the initial weights of a seed."""
    torch.manual_seed(seed)
    return build_model(cfg)


def randomize(model: nn.Module, seed: int = 3) -> nn.Module:
    """Statistics and affine parameters as after a training: initial ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(std=0.2, generator=generator)
    return model


@dataclass
class WrittenTeacher:
    """A teacher on disk: its config, its model as saved, and where both were written."""

    cfg: CfgNode
    model: nn.Module
    config_file: str
    weights: str

    @property
    def options(self) -> List[Any]:
        """KEY VALUE pairs that name it in a student's config."""
        node = "MODEL.QMIMIC.TEACHER"
        return [f"{node}.CONFIG_FILE", self.config_file, f"{node}.WEIGHTS", self.weights]


def write_teacher(folder: Path, *options: Any, name: str = "teacher", seed: int = 11) -> WrittenTeacher:
    """
    Saves the YAML and the weights of a tiny detector, by default a VGG-11 of 4, 8, 16, 32, 32 channels.

    Args:
        folder: where ``<name>.yaml`` and ``<name>.pth`` are written.
        options: KEY VALUE pairs over :func:`tiny_cfg`.
    """
    cfg = tiny_cfg("MODEL.VGG.WIDTH_DIVISOR", 16, *options)
    model = randomize(seeded_model(cfg, seed))
    config_file, weights = folder / f"{name}.yaml", folder / f"{name}.pth"
    config_file.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return WrittenTeacher(cfg, model, str(config_file), str(weights))


def image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Random pixels, uint8, shape (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def batch(
    *sizes: Tuple[int, int],
    seed: int = 0,
    num_boxes: Sequence[int] = (2, 3),
    num_classes: int = NUM_CLASSES,
) -> List[Dict[str, Any]]:
    """
    Dicts as Detectron2's mapper makes them, with boxes, masks and keypoints.

    Args:
        sizes: (height, width) of every image, in pixels; two of 64 x 64 when left out.
        num_boxes: annotations of each image, repeated as needed.
    """
    generator = torch.Generator().manual_seed(seed)
    dicts = []
    for index, size in enumerate(sizes or ((64, 64), (64, 64))):
        count = num_boxes[index % len(num_boxes)]
        limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
        corner = torch.rand(count, 2, generator=generator) * limit * 0.5
        extent = (0.25 + 0.25 * torch.rand(count, 2, generator=generator)) * limit
        boxes = torch.cat([corner, corner + extent], dim=1)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, num_classes, (count,), generator=generator)
        instances.gt_masks = BitMasks(_filled(boxes, size))
        centers = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None].expand(-1, NUM_KEYPOINTS, -1)
        visible = torch.full((count, NUM_KEYPOINTS, 1), 2.0)
        instances.gt_keypoints = Keypoints(torch.cat([centers, visible], dim=2))
        pixels = image(*size, seed=seed + index)
        dicts.append({"image": pixels, "height": size[0], "width": size[1], "instances": instances})
    return dicts


def _filled(boxes: Tensor, size: Tuple[int, int]) -> Tensor:
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])[None]
    masks = [
        (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1) for x0, y0, x1, y1 in boxes.tolist()
    ]
    return torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)


@dataclass
class Step:
    """What one training step gave: losses by name, gradients by parameter, and the event storage."""

    losses: Dict[str, Tensor]
    gradients: Dict[str, Tensor]
    storage: EventStorage


def training_step(
    model: nn.Module, inputs: List[Dict[str, Any]], *, seed: int = 5, iteration: int = 0
) -> Step:
    """One seeded forward and backward pass in training mode; gradients are taken, not kept."""
    model.train()
    torch.manual_seed(seed)
    with EventStorage(iteration) as storage:
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return Step({name: loss.detach() for name, loss in losses.items()}, gradients, storage)


def run_two_processes(work: Callable[..., None], folder: Any, *args: Any) -> None:
    """``work(rank, folder, *args)`` in two processes of one gloo group, with one thread each."""
    torch.multiprocessing.spawn(_in_group, args=(work, str(folder), args), nprocs=2)


def _in_group(rank: int, work: Callable[..., None], folder: str, args: Tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    work(rank, folder, *args)
    # gloo's threads must not race with the end of the process
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def maps_of_teacher(model):
    """The maps that the teacher of a model in training gives of two fixed images."""
    return model.mimic.teacher.features(batch(seed=90))


def calls_of_mimic_loss(model):
    """A list that fills with the arguments of every comparison, as a dict."""
    calls, pairs = [], model.mimic.pairs

    def record(maps, teacher_maps, boxes):
        calls.append({"maps": maps, "teacher_maps": teacher_maps, "boxes": boxes})
        return pairs(maps, teacher_maps, boxes)

    model.mimic.pairs = record
    return calls
