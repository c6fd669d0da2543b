"""Opens a detector of a config: a training's, or a YAML that was exported with its weights."""

import os
from typing import Optional, Sequence

from detectron2.config import CfgNode

from qmimic_d2.config_files import changed
from qmimic_d2.engine.setup import load_config
from qmimic_d2.export import ModelDescription
from qmimic_d2.export.description import LABELS_NAME
from qmimic_d2.inference.categories import described_categories, unknown_names_note
from qmimic_d2.inference.dataset_categories import dataset_categories, load_class_names
from qmimic_d2.inference.open_detector import OpenDetector
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.modeling.family import head_node, head_node_key

__all__ = ["open_config", "open_yaml"]


def open_yaml(
    path: str, score_threshold: Optional[float] = None, opts: Sequence[str] = (), device: str = ""
) -> OpenDetector:
    """
    The detector of an exported YAML; see :func:`qmimic_d2.inference.detectors.open_detector`.

    Raises:
        FileNotFoundError, KeyError, ValueError: as :func:`load_config` and :func:`open_config`.
    """
    cfg, labels = _config_beside_weights(path, opts, device), _labels_beside(path)
    return open_config(cfg, "MODEL.WEIGHTS", path, score_threshold, labels)


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
        cfg = changed(cfg, f"{head_node_key(cfg)}.SCORE_THRESH_TEST", float(score_threshold))
    num_classes = head_node(cfg).NUM_CLASSES
    if labels is not None and len(labels.classes) != num_classes:
        raise ValueError(
            f"{LABELS_NAME} beside {config_file!r} has {len(labels.classes)} classes, and "
            f"{head_node_key(cfg)}.NUM_CLASSES is {num_classes}; it is another export's. Export the detector again, or "
            f"take {LABELS_NAME} away"
        )
    if labels is not None and labels.has_names:
        categories = described_categories(labels)
    else:
        load_class_names(cfg)
        categories = dataset_categories(cfg)
    note = unknown_names_note(categories, cfg)
    return OpenDetector(Predictor(cfg, weights_key).detect, categories, config_file, cfg.MODEL.WEIGHTS, note)


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
        cfg = changed(cfg, "MODEL.WEIGHTS", beside)
    return cfg
