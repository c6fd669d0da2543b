"""Runs an exported TorchScript detector with torch and torchvision; Detectron2 is not needed."""

import os
import warnings
from typing import Sequence

import numpy as np

from qmimic_d2.error_text import one_line
from qmimic_d2.export.description import METADATA_KEY
from qmimic_d2.export.exported_detector import ExportedDetector

__all__ = ["TorchScriptDetector"]


class TorchScriptDetector(ExportedDetector):
    """
    A detector in a TorchScript file that ``python -m qmimic_d2 export`` wrote; see ``OnnxDetector``.

    Loading a TorchScript file runs what it holds: open only files that you trust.
    """

    def __init__(self, path: str, device: str = "cpu"):
        """
        Args:
            path: of the ``.ts`` file.
            device: where it runs. Exported on a CPU, constants in it stay there, so others may not do.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: torch cannot read it, or it is not one of this package's.
        """
        import torch
        import torchvision  # noqa: F401  (its operators are used by the file)

        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no TorchScript file {path!r}")
        files = {METADATA_KEY: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of its deprecation
                self._network = torch.jit.load(path, map_location=device, _extra_files=files)
            text = files[METADATA_KEY]
            text = text.decode() if isinstance(text, bytes) else text
        except Exception as error:  # torch has many ways to say that a file is damaged
            raise ValueError(f"{path!r} is no TorchScript file that torch can run: {one_line(error)}") from error
        super().__init__(path, text, [device])
        self._device = device

    def run_network(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        import torch

        with torch.no_grad():
            outputs = self._network(torch.from_numpy(pixels).to(self._device))
        return [each.cpu().numpy() for each in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]
