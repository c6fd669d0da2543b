"""A detector as a TorchScript file, which runs with torch and torchvision alone."""

import logging
import warnings

import torch
from torch import nn

from qmimic_d2.export.description import METADATA_KEY, ModelDescription
from qmimic_d2.export.network import example_image, trace, traceable
from qmimic_d2.files import whole_file

__all__ = ["export_torchscript"]

logger = logging.getLogger(__name__)


def export_torchscript(model: nn.Module, description: ModelDescription, path: str) -> None:
    """
    Traces a detector and writes it. The file appears under its name when it is complete.

    The traced module takes the network's input, shape (3, h, w), float32, of any size (of the fixed size, if
    ``description`` has one) and gives boxes (N, 4) in its pixels, scores (N,) and classes (N,).

    Args:
        model: in evaluation mode, with its quantizer kept or dropped.
        description: stored in the archive.
        path: of the ``.ts`` file, in a folder that exists.

    Raises:
        ValueError: the model is of a kind that cannot be exported.
    """
    image = example_image(description.input_spec)
    traced = trace(traceable(model, image), image)
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its deprecation
        torch.jit.save(traced, partial, _extra_files={METADATA_KEY: description.to_json()})
    logger.info("Wrote %s", path)
