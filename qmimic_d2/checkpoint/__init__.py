"""Checkpoints: read without executing code, written whole, and an account of what they filled."""

from qmimic_d2.checkpoint.checkpointer import (
    DivergedError,
    SafeCheckpointer,
    UnsafeCheckpointError,
    load_audited,
    read_checkpoint,
    tensors_in,
    weights_digest,
)

__all__ = [
    "DivergedError",
    "SafeCheckpointer",
    "UnsafeCheckpointError",
    "load_audited",
    "read_checkpoint",
    "tensors_in",
    "weights_digest",
]
