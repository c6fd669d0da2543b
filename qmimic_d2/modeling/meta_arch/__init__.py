"""The registered meta-architectures: Detectron2's, with quantizer and mimic attached."""

from qmimic_d2.modeling.meta_arch.quant_fcos import QuantFCOS
from qmimic_d2.modeling.meta_arch.quant_mimic import QuantMimic, QuantMimicFCOS, QuantMimicRCNN, QuantMimicRetinaNet
from qmimic_d2.modeling.meta_arch.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.meta_arch.quant_retinanet import QuantRetinaNet

__all__ = [
    "QuantFCOS",
    "QuantMimic",
    "QuantMimicFCOS",
    "QuantMimicRCNN",
    "QuantMimicRetinaNet",
    "QuantRCNN",
    "QuantRetinaNet",
]
