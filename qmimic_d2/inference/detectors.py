"""Opens a detector in whichever form it was exported: ONNX without torch, TorchScript, or YAML and weights."""

import os
from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np

from qmimic_d2.export import OnnxDetector, TorchScriptDetector
from qmimic_d2.inference.categories import described_categories, unknown_names_note
from qmimic_d2.inference.open_detector import OpenDetector
from qmimic_d2.inference.zoo import ZOO, zoo_file

__all__ = ["OPENERS", "open_detector"]

_YAML = (".yaml", ".yml")

# What opens a file that is complete in itself, by its ending: (path, threads, device) -> a detector with a
# ``description``, which is called with an image. A further format of qmimic_d2.engine.exporting has its entry here.
OPENERS: Dict[str, Callable[[str, int, str], Any]] = {
    ".onnx": lambda path, threads, device: OnnxDetector(path, threads),
    ".ts": lambda path, threads, device: TorchScriptDetector(path, device or "cpu"),
    ".torchscript": lambda path, threads, device: TorchScriptDetector(path, device or "cpu"),
}


def open_detector(
    path: str,
    *,
    score_threshold: Optional[float] = None,
    opts: Sequence[str] = (),
    device: str = "",
    threads: int = 0,
) -> OpenDetector:
    """
    Args:
        path: "zoo:NAME" (see :func:`qmimic_d2.inference.zoo.zoo_file`), or that of a ``.onnx``, ``.ts`` or ``.yaml``
            file of ``python -m qmimic_d2 export``. The weights of a YAML are those that it names, or the file of
            that name beside it.
        score_threshold: what the caller wants to see; None = all that the detector gives.
        opts: KEY VALUE pairs over a YAML.
        device: of a YAML or a TorchScript file; "" = as it says.
        threads: of onnxruntime; 0 = its own choice.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a package that this form runs in is not installed.
        ValueError: an unknown ending, or a file that is not what its ending says; a score threshold below the
            one that was exported; options for a form that takes none.
    """
    if path.startswith(ZOO):
        path = zoo_file(path)
    ending = os.path.splitext(path)[1].lower()
    if ending not in OPENERS and ending not in _YAML:
        known = ", ".join((*OPENERS, *_YAML))
        raise ValueError(f"--model is {path!r}; the ending tells the form, and these are known: {known}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--model is {path!r}, and there is no such file")
    if ending in _YAML:
        from qmimic_d2.inference.config_detector import open_yaml  # which needs torch

        return open_yaml(path, score_threshold, opts, device)
    if opts:
        raise ValueError(f"{path!r} is complete in itself and takes no KEY VALUE pairs, got {' '.join(map(str, opts))}")
    detector = OPENERS[ending](path, threads, device)
    description = detector.description
    least = description.score_threshold
    if score_threshold is not None and score_threshold < least:
        raise ValueError(
            f"--score-threshold is {score_threshold:g}, and {path!r} was exported with {least:g}: what scores lower "
            f"never leaves it. Export it with a lower {description.score_threshold_key}"
        )
    detector(_probe())  # a file that cannot run fails here, before the first image
    categories = described_categories(description)
    return OpenDetector(detector, categories, path, "", unknown_names_note(categories, path=path))


def _probe() -> np.ndarray:
    """A small image of noise, always the same. Shape (H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
