"""Opens a detector in whichever form it was exported: YAML and weights, TorchScript or ONNX."""

import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
from detectron2.config import CfgNode

from qmimic_d2.engine.setup import load_config
from qmimic_d2.export import Detections, ModelDescription, OnnxDetector, TorchScriptDetector
from qmimic_d2.export.description import LABELS_NAME
from qmimic_d2.inference.categories import Category, dataset_categories, load_class_names, unknown_names_note
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.modeling.family import head_node, head_node_key

__all__ = ["OPENERS", "OpenDetector", "open_config", "open_detector", "with_score_threshold"]

_YAML = (".yaml", ".yml")

# What opens a file that is complete in itself, by its ending: (path, threads, device) -> a detector with a
# ``description``, which is called with an image. A further format of qmimic_d2.engine.exporting has its entry here.
OPENERS: Dict[str, Callable[[str, int, str], Any]] = {
    ".onnx": lambda path, threads, device: OnnxDetector(path, threads),
    ".ts": lambda path, threads, device: TorchScriptDetector(path, device or "cpu"),
    ".torchscript": lambda path, threads, device: TorchScriptDetector(path, device or "cpu"),
}


@dataclass(frozen=True)
class OpenDetector:
    """
    Attributes:
        detect: from an image (H, W, 3), BGR, uint8, to its :class:`Detections`.
        categories: in the order of the class indices.
        config_file, weights: where it came from; one file has no weights apart.
        note: what the user should know about it; "" for nothing.
    """

    detect: Callable[[np.ndarray], Detections]
    categories: List[Category]
    config_file: str
    weights: str
    note: str = ""


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
        path: of a ``.onnx``, ``.ts`` or ``.yaml`` file of ``python -m qmimic_d2 export``. The weights of a YAML
            are those that it names, or the file of that name beside it.
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
    ending = os.path.splitext(path)[1].lower()
    if ending not in OPENERS and ending not in _YAML:
        known = ", ".join((*OPENERS, *_YAML))
        raise ValueError(f"--model is {path!r}; the ending tells the form, and these are known: {known}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--model is {path!r}, and there is no such file")
    if ending in _YAML:
        cfg, labels = _config_beside_weights(path, opts, device), _labels_beside(path)
        return open_config(cfg, "MODEL.WEIGHTS", path, score_threshold, labels)
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
    categories = _categories_of(description)
    return OpenDetector(detector, categories, path, "", unknown_names_note(categories, path=path))


def open_config(
    cfg: CfgNode,
    weights_key: str,
    config_file: str,
    score_threshold: Optional[float] = None,
    labels: Optional[ModelDescription] = None,
) -> OpenDetector:
    """
    The detector of a config.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        weights_key: where the user gave these, for error messages.
        config_file: for the record.
        score_threshold: the model itself drops what scores lower, so that one below the config's takes effect;
            None = the config's.
        labels: what an export wrote about it; None = class names come from the config's data sets.

    Raises:
        FileNotFoundError, ValueError: there are no weights, or they do not fit; the labels are of other classes.
    """
    if score_threshold is not None:
        cfg = with_score_threshold(cfg, score_threshold)
    num_classes = head_node(cfg).NUM_CLASSES
    if labels is not None and len(labels.classes) != num_classes:
        raise ValueError(
            f"{LABELS_NAME} beside {config_file!r} has {len(labels.classes)} classes, and "
            f"{head_node_key(cfg)}.NUM_CLASSES is {num_classes}; it is another export's. Export the detector again, or "
            f"take {LABELS_NAME} away"
        )
    if labels is not None and labels.has_names:
        categories = _categories_of(labels)
    else:
        load_class_names(cfg)
        categories = dataset_categories(cfg)
    note = unknown_names_note(categories, cfg)
    return OpenDetector(Predictor(cfg, weights_key).detect, categories, config_file, cfg.MODEL.WEIGHTS, note)


def with_score_threshold(cfg: CfgNode, threshold: float) -> CfgNode:
    """A copy whose model drops what scores lower."""
    cfg = cfg.clone()
    cfg.defrost()
    head_node(cfg).SCORE_THRESH_TEST = float(threshold)
    cfg.freeze()
    return cfg


def _categories_of(description: ModelDescription) -> List[Category]:
    return [Category(number, name, description.has_names) for number, name in description.classes]


def _probe() -> np.ndarray:
    """A small image of noise, always the same. Shape (H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def _labels_beside(path: str) -> Optional[ModelDescription]:
    """
    What the export that wrote a YAML wrote beside it; None where that is not there.

    Raises:
        ValueError: the file is damaged; names it.
    """
    labels = os.path.join(os.path.dirname(os.path.abspath(path)), LABELS_NAME)
    if not os.path.isfile(labels):
        return None
    try:
        with open(labels, encoding="utf-8") as file:
            return ModelDescription.from_json(file.read())
    except ValueError as error:
        raise ValueError(f"{labels!r} holds {error}; export the detector again, or take the file away") from error


def _config_beside_weights(path: str, opts: Sequence[str], device: str) -> CfgNode:
    """The config of a YAML; weights that are not where it says are looked for beside it."""
    cfg = load_config(path, opts, eval_only=True, device=device)
    weights = cfg.MODEL.WEIGHTS
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.basename(weights))
    if weights and not os.path.isfile(weights) and os.path.isfile(beside):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = beside
        cfg.freeze()
    return cfg
