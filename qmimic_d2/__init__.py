"""
Quantization mimic for Detectron2: very tiny detectors, taught by a frozen, quantized teacher.

Importing it registers the backbones, meta-architectures and data sets of this package and changes
nothing of Detectron2's.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:  # pragma: no cover  (cannot be imported with Detectron2 absent)
    raise ImportError(
        "qmimic_d2 extends Detectron2, which is not installed in this environment; docs/install.md "
        "says how to install it"
    ) from error

from qmimic_d2 import data, modeling  # noqa: F401  (registers data sets and models)
from qmimic_d2.config import add_qmimic_config
from qmimic_d2.config_files import get_config_file

__version__ = "0.1.0"

__all__ = ["add_qmimic_config", "get_config_file", "__version__"]
