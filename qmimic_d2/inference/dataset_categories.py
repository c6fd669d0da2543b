"""The classes of a config's detector, from the data sets that the config names."""

import logging
import os
from typing import List, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from qmimic_d2.data.loading import load_dataset
from qmimic_d2.inference.categories import Category
from qmimic_d2.modeling.family import head_node

__all__ = ["dataset_categories", "load_class_names"]

logger = logging.getLogger(__name__)


def dataset_categories(cfg: CfgNode) -> List[Category]:
    """
    The classes of a config's detector, in the order of its outputs.

    Names come from the metadata of the first data set of ``DATASETS.TEST`` and ``TRAIN`` that has as many
    classes as the detector, and the ids from its ``thing_dataset_id_to_contiguous_id``. Ids that the metadata
    does not hold are class indices, from 0 on. Where no data set has such metadata, so are the names, and
    ``is_named`` is False. Nothing is read from a file; see :func:`load_class_names`.
    """
    num_classes = head_node(cfg).NUM_CLASSES
    for name in _dataset_names(cfg):
        metadata = MetadataCatalog.get(name)
        names = metadata.get("thing_classes", None) or []
        if len(names) == num_classes:
            contiguous = metadata.get("thing_dataset_id_to_contiguous_id", None) or {}
            ids = {index: dataset_id for dataset_id, index in contiguous.items()}
            return [Category(int(ids.get(index, index)), str(each)) for index, each in enumerate(names)]
    return [Category(index, str(index), is_named=False) for index in range(num_classes)]


def load_class_names(cfg: CfgNode) -> None:
    """
    Reads the annotation file of a data set in COCO's format, from which its class names come.

    The first one whose file is there and was not read yet. A damaged file is warned of: names are no reason to
    lose a job.
    """
    for name in _dataset_names(cfg):
        metadata = MetadataCatalog.get(name)
        has_file = os.path.isfile(metadata.get("json_file", None) or "")
        if has_file and not metadata.get("thing_dataset_id_to_contiguous_id", None):
            try:
                load_dataset(name)
            except Exception as error:  # a loader raises whatever a damaged file leads it to
                logger.warning(
                    "No class names come from the data set %s, whose file %r cannot be read: %s: %s",
                    *(name, metadata.json_file, type(error).__name__, error),
                )
            return


def _dataset_names(cfg: CfgNode) -> Tuple[str, ...]:
    return (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
