"""What the registered detectors have in common: quantizer and mimic are arguments of their ``__init__``."""

from detectron2.config import CfgNode, configurable

from qmimic_d2.modeling.attach import attach_parts, mimic_arguments

__all__ = ["WithMimic", "WithParts"]


class WithParts:
    """Stands before a detector of Detectron2 in the bases of a class, and attaches the parts to it."""

    @configurable
    def __init__(self, *, quantizer=None, quantized_features=(), mimic=None, **kwargs):
        """
        Args:
            quantizer, quantized_features, mimic: see :func:`qmimic_d2.modeling.attach.attach_parts`.
            kwargs: of the detector.

        Raises:
            ValueError: as these do.
        """
        super().__init__(**kwargs)
        attach_parts(self, quantizer=quantizer, quantized_features=quantized_features, mimic=mimic)


class WithMimic:
    """Stands before one of these classes, and adds the mimic that a config describes."""

    @classmethod
    def from_config(cls, cfg: CfgNode):
        return {**super().from_config(cfg), **mimic_arguments(cfg)}
