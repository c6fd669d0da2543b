"""
Quantization mimic for Detectron2: very tiny detectors, taught by a frozen, quantized teacher.

Importing it registers the backbones, meta-architectures and data sets of this package and changes
nothing of Detectron2's. On a device without torch or Detectron2 it registers nothing, and
:mod:`qmimic_d2.export` alone is of use: its ``OnnxDetector`` runs exported detectors.
"""

from qmimic_d2.config_files import get_config_file
from qmimic_d2.library_noise import quiet_imports

__version__ = "0.1.0"

__all__ = ["add_qmimic_config", "attach_mimic", "attach_quantizer", "get_config_file", "__version__"]

with quiet_imports():
    try:
        import detectron2  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        _missing = error
    else:
        from qmimic_d2 import data, modeling  # noqa: F401  (registers data sets and models)
        from qmimic_d2.config import add_qmimic_config
        from qmimic_d2.modeling.attach import attach_mimic, attach_quantizer


def __getattr__(name: str):
    """Reached by names that are not there: those of training, where Detectron2 is missing."""
    if name in __all__ and name != "__version__":
        raise ImportError(
            f"qmimic_d2.{name} extends Detectron2, which is not installed in this environment ({_missing}); "
            "docs/install.md says how to install it"
        ) from _missing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
