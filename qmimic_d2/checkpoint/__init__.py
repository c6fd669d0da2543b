"""
Checkpoints: read without executing code, written whole, and an account of what they filled.

* :func:`read_checkpoint`: a file, or an address that Detectron2 resolves, becomes a flat state dict.
* :func:`load_audited`: a state dict fills one module completely, or an error lists what does not fit and the module
  stays as it was. The teacher's backbone is loaded this way.
* :class:`SafeCheckpointer`: Detectron2's checkpointer for the student, reading by the same rules.
"""

from qmimic_d2.checkpoint.audit import load_audited, weights_digest
from qmimic_d2.checkpoint.checkpointer import DivergedError, SafeCheckpointer, tensors_in
from qmimic_d2.checkpoint.reader import UnsafeCheckpointError, read_checkpoint

__all__ = [
    "DivergedError",
    "SafeCheckpointer",
    "UnsafeCheckpointError",
    "load_audited",
    "read_checkpoint",
    "tensors_in",
    "weights_digest",
]
