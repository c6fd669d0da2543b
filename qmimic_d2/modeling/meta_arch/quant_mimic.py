"""The students in training: registered detectors that imitate a frozen, quantized teacher."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from qmimic_d2.config_files import changed
from qmimic_d2.modeling.attach import attach_parts, mimic_arguments, quantizer_arguments
from qmimic_d2.modeling.family import QUANT_MIMIC, detector_name
from qmimic_d2.modeling.meta_arch.attached import WithMimic
from qmimic_d2.modeling.meta_arch.quant_fcos import QuantFCOS
from qmimic_d2.modeling.meta_arch.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.meta_arch.quant_retinanet import QuantRetinaNet
from qmimic_d2.modeling.trunk_adapter import is_in_trunk

__all__ = ["QuantMimic", "QuantMimicFCOS", "QuantMimicRCNN", "QuantMimicRetinaNet"]


@META_ARCH_REGISTRY.register()
def QuantMimic(cfg: CfgNode) -> nn.Module:
    """
    Any detector as a student: builds the meta-architecture that ``MODEL.QMIMIC.META_ARCHITECTURE`` names, and attaches
    quantizer and mimic.

    Raises:
        ValueError: no such meta-architecture is registered, or ADAPTER_PLACEMENT is "trunk".
    """
    key, name = "MODEL.QMIMIC.META_ARCHITECTURE", detector_name(cfg.MODEL)
    if name == QUANT_MIMIC or name not in META_ARCH_REGISTRY:
        known = sorted(each for each, _ in META_ARCH_REGISTRY if each != QUANT_MIMIC)
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {QUANT_MIMIC!r}, and {key} is {name!r}; name the detector that it builds, one "
            f"of {known}, or import the package that registers it"
        )
    if is_in_trunk(cfg):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {QUANT_MIMIC!r}, whose detector is built for the backbone's own widths; set "
            "MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT 'branch'"
        )
    detector = changed(cfg, "MODEL.META_ARCHITECTURE", name)
    model = META_ARCH_REGISTRY.get(name)(detector)
    attach_parts(model, **quantizer_arguments(detector), **mimic_arguments(detector))
    return model


@META_ARCH_REGISTRY.register()
class QuantMimicRCNN(WithMimic, QuantRCNN):
    """:class:`QuantRCNN` with ``loss_mimic`` among its losses."""


@META_ARCH_REGISTRY.register()
class QuantMimicRetinaNet(WithMimic, QuantRetinaNet):
    """
    :class:`QuantRetinaNet` with ``loss_mimic`` among its losses.

    It neither proposes nor samples regions, so ``MODEL.QMIMIC.MIMIC.ROI_SOURCE`` must name other ones.
    """


@META_ARCH_REGISTRY.register()
class QuantMimicFCOS(WithMimic, QuantFCOS):
    """:class:`QuantFCOS` with ``loss_mimic`` among its losses; for its regions see :class:`QuantMimicRetinaNet`."""
