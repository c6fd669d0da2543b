"""Models and their parts; importing it registers them with Detectron2."""

from qmimic_d2.modeling import backbone  # noqa: F401  (registers the backbones)
from qmimic_d2.modeling.attach import attach_mimic, attach_quantizer
from qmimic_d2.modeling.meta_arch.quant_fcos import QuantFCOS
from qmimic_d2.modeling.meta_arch.quant_mimic import QuantMimic, QuantMimicFCOS, QuantMimicRCNN, QuantMimicRetinaNet
from qmimic_d2.modeling.meta_arch.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.meta_arch.quant_retinanet import QuantRetinaNet
from qmimic_d2.modeling.mimic.loss import Pair, RoIMimicLoss
from qmimic_d2.modeling.mimic.mimic import Mimic
from qmimic_d2.modeling.mimic.region_sources import ROI_SOURCE_REGISTRY, TrainingRegions
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher
from qmimic_d2.modeling.quantizer import (
    QUANTIZER_REGISTRY,
    ClampQuantizer,
    CodeQuantizer,
    PowerOfTwoQuantizer,
    UniformQuantizer,
    build_quantizer,
)
from qmimic_d2.modeling.roi_heads import RFCNROIHeads

__all__ = [
    "QUANTIZER_REGISTRY",
    "ROI_SOURCE_REGISTRY",
    "ClampQuantizer",
    "CodeQuantizer",
    "FrozenTeacher",
    "Mimic",
    "Pair",
    "PowerOfTwoQuantizer",
    "QuantFCOS",
    "QuantMimic",
    "QuantMimicFCOS",
    "QuantMimicRCNN",
    "QuantMimicRetinaNet",
    "QuantRCNN",
    "QuantRetinaNet",
    "RFCNROIHeads",
    "RoIMimicLoss",
    "TrainingRegions",
    "UniformQuantizer",
    "attach_mimic",
    "attach_quantizer",
    "build_quantizer",
]
