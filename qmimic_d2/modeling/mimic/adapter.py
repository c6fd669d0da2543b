"""r, the adapter that brings the student's channels to the teacher's."""

import fvcore.nn.weight_init as weight_init
from torch import nn

__all__ = ["ADAPTERS", "build_adapter", "check_adapter"]

# Values of MODEL.QMIMIC.MIMIC.ADAPTER.
ADAPTERS = ("conv1x1", "conv1x1_relu", "")


def build_adapter(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """
    Args:
        kind: "conv1x1", linear as in the paper's equation; "conv1x1_relu"; or "" for the identity.
        in_channels, out_channels: of the student's and of the teacher's map.

    Returns:
        A module that takes (N, in_channels, H, W) to (N, out_channels, H, W).

    Raises:
        ValueError: an unknown kind.
    """
    check_adapter(kind)
    if not kind:
        return nn.Identity()
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    weight_init.c2_xavier_fill(convolution)
    return nn.Sequential(convolution, nn.ReLU()) if kind == "conv1x1_relu" else convolution


def check_adapter(kind: str) -> None:
    """Raises a ValueError if ``kind`` is not in :data:`ADAPTERS`."""
    if kind not in ADAPTERS:
        raise ValueError(f"MODEL.QMIMIC.MIMIC.ADAPTER is {kind!r}; choose one of {list(ADAPTERS)}")
