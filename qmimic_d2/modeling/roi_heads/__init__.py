"""R-FCN's RoI heads; importing this package registers ``RFCNROIHeads`` in Detectron2's ``ROI_HEADS_REGISTRY``."""

from qmimic_d2.modeling.roi_heads.position_sensitive import PositionSensitivePooler
from qmimic_d2.modeling.roi_heads.rfcn import RFCNOutputLayers, RFCNROIHeads

__all__ = ["PositionSensitivePooler", "RFCNOutputLayers", "RFCNROIHeads"]
