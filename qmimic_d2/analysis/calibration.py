"""
Which stride suits a teacher: the distribution of its features, and the effect of a dictionary on them.

A stride means nothing by itself. It is relative to the scale of the features, which differs by orders of
magnitude between a network with BatchNorm and one without.
"""

import math
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_context
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qmimic_d2.analysis.feature_statistics import (
    CodeStatistics,
    CodeUse,
    FeatureDistribution,
    FeatureStatistics,
)
from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.data.mapper import FileNamingMapper, ImageMapper
from qmimic_d2.modeling.quantizer import CodeQuantizer, Quantizer
from qmimic_d2.modeling.quantizer_hook import attach_quantizer, attached_quantizer, check_features
from qmimic_d2.orphans import tie_worker
from qmimic_d2.progress import track

__all__ = [
    "LEAST_AP",
    "MAX_RELATIVE_STRIDE",
    "build_calibration_loader",
    "build_image_loader",
    "default_strides",
    "evenly_spaced",
    "is_signed",
    "measure_ap",
    "measure_codes",
    "measure_features",
    "recommend_stride",
]

Item = TypeVar("Item")

# A teacher with less AP, in percent, is not trained: its loss by quantization says nothing.
LEAST_AP = 1.0

# Stride in units of the features' rms up to which a student that is rounded too learns as well as without rounding.
# 0.56 and 0.65 cost nothing, 1.12 cost 6 AP and 2.24 cost 38, where the teacher lost 0.2, 0.3, 0.8 and 2.9
# (docs/evidence.md, "The stride"): the teacher's AP alone does not show it.
MAX_RELATIVE_STRIDE = 0.75


def evenly_spaced(items: Sequence[Item], count: int) -> List[Item]:
    """At most ``count`` items at equal distances, beginning with the first; the same ones every time."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def build_calibration_loader(
    cfg: CfgNode, dataset_names: Sequence[str], num_images: int
) -> Tuple[DataLoader, int]:
    """
    Images to calibrate on, read as an evaluation reads them: resized, not augmented, one at a time.

    Args:
        cfg: of the model, for its preprocessing.
        dataset_names: registered data sets, taken one after the other.
        num_images: at most so many, evenly spaced over these sets.

    Returns:
        A loader that can be iterated over again, and the number of images of the sets.

    Raises:
        KeyError: a data set is not registered.
        ValueError: ``num_images`` is not positive, or the sets hold no image.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; calibrate on one image or more")
    dicts = load_dataset_dicts(list(dataset_names), filter_empty=False)
    if not dicts:
        raise ValueError(f"the data sets {list(dataset_names)} hold no image to calibrate on")
    return build_image_loader(cfg, evenly_spaced(dicts, num_images)), len(dicts)


def build_image_loader(
    cfg: CfgNode, dicts: List[Dict[str, Any]], mapper: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None
) -> DataLoader:
    """
    Images of a data set, one at a time.

    Args:
        cfg: of the model, for its preprocessing.
        dicts: of the data set.
        mapper: from such a dict to a model's input; that of an evaluation when left out.
    """
    loader = build_detection_test_loader(
        dataset=dicts,
        mapper=FileNamingMapper(mapper or ImageMapper(cfg, is_train=False)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = tie_worker
    return loader


def measure_features(
    model: nn.Module, loader: Iterable[List[dict]], features: Sequence[str]
) -> Dict[str, FeatureStatistics]:
    """
    Args:
        model: a Detectron2 R-CNN. A quantizer on its backbone is off meanwhile.
        loader: gives batches as the model takes them.
        features: names among the backbone's outputs.

    Returns:
        By feature. Cells in the padding of an image do not count.

    Raises:
        ValueError: an unknown feature, NaN or infinite values, or no image.
    """
    distributions = {name: FeatureDistribution() for name in features}
    for name, values in _maps(model, loader, features):
        distributions[name].add(values)
    return {name: distribution.result() for name, distribution in distributions.items()}


def measure_codes(
    model: nn.Module,
    loader: Iterable[List[dict]],
    features: Sequence[str],
    quantizers: Sequence[CodeQuantizer],
) -> Dict[str, List[CodeStatistics]]:
    """
    The effect of each quantizer on the features; arguments and errors as :func:`measure_features`.

    Returns:
        By feature, in the order of the quantizers.
    """
    uses = {name: [CodeUse(quantizer) for quantizer in quantizers] for name in features}
    for name, values in _maps(model, loader, features):
        for use in uses[name]:
            use.add(values)
    return {name: [use.result() for use in each] for name, each in uses.items()}


def measure_ap(
    model: nn.Module,
    features: Sequence[str],
    quantizers: Sequence[Optional[Quantizer]],
    evaluate: Callable[[nn.Module], float],
) -> List[float]:
    """
    The AP of a detector with each quantizer on its features in turn; heads and weights stay as they are.

    Args:
        model: a Detectron2 R-CNN; its own quantizer, if any, is in force again afterwards.
        features: names of the backbone's outputs that are quantized.
        quantizers: None stands for full precision.
        evaluate: gives a model's AP.

    Returns:
        One AP per quantizer.
    """
    aps = []
    for quantizer in quantizers:
        with _quantized_by(model.backbone, quantizer, features):
            aps.append(float(evaluate(model)))
    return aps


def is_signed(statistics: FeatureStatistics) -> bool:
    """Whether the feature has negative values, which an unsigned dictionary would erase."""
    return statistics.negative_share > 0.0


def default_strides(statistics: Mapping[str, FeatureStatistics]) -> List[float]:
    """
    Strides worth trying: 1/32, 1/16, ... 1, 2 times the features' rms, rounded to two digits.

    Args:
        statistics: by feature. One dictionary serves all features, so the rms is that of all their values.

    Raises:
        ValueError: the features are 0 everywhere.
    """
    num_values = sum(each.num_values for each in statistics.values())
    squares = math.fsum(each.num_values * each.rms**2 for each in statistics.values())
    if not squares > 0.0:
        raise ValueError(
            f"the features {sorted(statistics)} are 0 everywhere, and no stride suits them; see whether the "
            "weights belong to this config"
        )
    rms = math.sqrt(squares / num_values)
    return [float(f"{rms * 2.0**power:.2g}") for power in range(-5, 2)]


def recommend_stride(
    strides: Sequence[float],
    aps: Sequence[float],
    full_precision_ap: float,
    max_ap_loss: float,
    max_stride: float = math.inf,
) -> Optional[float]:
    """
    The largest stride up to ``max_stride`` that costs at most ``max_ap_loss``.

    Args:
        strides: in any order.
        aps: AP of the quantized teacher with each stride, in the unit of ``max_ap_loss``; NaN (an evaluation without
            detections) does not qualify.
        full_precision_ap: AP of the teacher before quantization.
        max_ap_loss: how much lower the AP may be.
        max_stride: another bound, for the student (:data:`MAX_RELATIVE_STRIDE`).

    Returns:
        None if no stride qualifies, or if the full-precision AP is below :data:`LEAST_AP`.
    """
    if not full_precision_ap >= LEAST_AP:
        return None
    rounding = 1e-9  # 64.4 - 63.9 is a little more than 0.5
    qualified = [
        stride
        for stride, ap in zip(strides, aps)
        if full_precision_ap - ap <= max_ap_loss + rounding and stride <= max_stride
    ]
    return max(qualified, default=None)


@contextmanager
def _quantized_by(
    backbone: Backbone, quantizer: Optional[Quantizer], features: Sequence[str]
) -> Iterator[None]:
    """Within the block the backbone has this quantizer, or none, instead of its own."""
    own = attached_quantizer(backbone)
    hook = None
    if quantizer is not None:
        hook = attach_quantizer(backbone, quantizer, features)
    elif own is not None:
        own.remove()
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        if own is not None:
            attach_quantizer(backbone, own.quantizer, own.features)


def _maps(
    model: nn.Module, loader: Iterable[List[dict]], features: Sequence[str]
) -> Iterator[Tuple[str, Tensor]]:
    """Name and values of each feature of each image; values flat, in float32, on the CPU."""
    shapes = model.backbone.output_shape()
    check_features(features, shapes, "features")
    num_images = 0
    with inference_context(model), torch.no_grad(), _quantized_by(model.backbone, None, features):
        for batch in track(loader, "measuring features"):
            images = model.preprocess_image(batch)
            maps = model.backbone(images.tensor)
            for index, size in enumerate(images.image_sizes):
                num_images += 1
                for name in features:
                    rows, columns = (math.ceil(length / shapes[name].stride) for length in size)
                    values = maps[name][index, :, :rows, :columns].float().cpu().flatten()
                    if not torch.isfinite(values).all():
                        raise ValueError(
                            f"feature {name!r} has NaN or infinite values; see whether the weights are whole"
                        )
                    yield name, values
    if not num_images:
        raise ValueError("there is no image to measure features on")
