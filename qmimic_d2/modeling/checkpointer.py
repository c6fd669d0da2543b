"""The checkpointer of this project's models."""

import functools

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from qmimic_d2.checkpoint.checkpointer import SafeCheckpointer
from qmimic_d2.checkpoint.training_entries import TRAINING_ONLY
from qmimic_d2.modeling.backbone.imagenet_names import convert_torchvision_names

__all__ = ["build_checkpointer"]


def build_checkpointer(model: nn.Module, save_dir: str, **checkpointables) -> SafeCheckpointer:
    """
    Renames torchvision's ImageNet weights on the fly, and passes over an adapter that an evaluation model lacks.

    Args:
        model: in a DDP or not.
        save_dir: of checkpoints; "" for none.
        checkpointables: as Detectron2's ``DetectionCheckpointer`` takes them.
    """
    detector = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    backbone = getattr(detector, "backbone", detector)
    network = getattr(backbone, "bottom_up", backbone)
    rename = functools.partial(convert_torchvision_names, model_keys=list(network.state_dict()))
    return SafeCheckpointer(
        model, save_dir, name_converters=(rename,), ignored_prefixes=TRAINING_ONLY, **checkpointables
    )
