"""Models and their parts; importing it registers them with Detectron2."""

from qmimic_d2.modeling import backbone  # noqa: F401  (registers the backbones)
from qmimic_d2.modeling.mimic import RoIMimicLoss
from qmimic_d2.modeling.quant_fcos import QuantFCOS
from qmimic_d2.modeling.quant_mimic_one_stage import QuantMimicFCOS, QuantMimicRetinaNet
from qmimic_d2.modeling.quant_mimic_rcnn import QuantMimicRCNN
from qmimic_d2.modeling.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.quant_retinanet import QuantRetinaNet
from qmimic_d2.modeling.quantizer import (
    QUANTIZER_REGISTRY,
    ClampQuantizer,
    CodeQuantizer,
    PowerOfTwoQuantizer,
    UniformQuantizer,
    build_quantizer,
)
from qmimic_d2.modeling.quantizer_hook import attach_quantizer
from qmimic_d2.modeling.roi_heads import RFCNROIHeads
from qmimic_d2.modeling.teacher import FrozenTeacher

__all__ = [
    "QUANTIZER_REGISTRY",
    "ClampQuantizer",
    "CodeQuantizer",
    "FrozenTeacher",
    "PowerOfTwoQuantizer",
    "QuantFCOS",
    "QuantMimicFCOS",
    "QuantMimicRCNN",
    "QuantMimicRetinaNet",
    "QuantRCNN",
    "QuantRetinaNet",
    "RFCNROIHeads",
    "RoIMimicLoss",
    "UniformQuantizer",
    "attach_quantizer",
    "build_quantizer",
]
