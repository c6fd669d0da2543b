"""Registers the sources of a config with Detectron2's catalogs."""

from typing import Dict, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.data.sources.source import KEY, Source, SourceLoader

__all__ = ["complete_sources", "register_sources", "sources_config"]

# What this process has registered, by name.
_registered: Dict[str, Source] = {}


def complete_sources(cfg: CfgNode, beside: str = "") -> None:
    """
    Makes the entries of ``DATASETS.SOURCES`` complete: absolute paths, and the names of the classes.

    The sets of ``DATASETS.TRAIN`` decide on the classes. Another set without CLASSES gets the same ones if it has no
    other class; then a label means the same everywhere, also where a class has no object in one of the sets.

    Args:
        cfg: not frozen.
        beside: see :meth:`Source.from_entry`.

    Raises:
        FileNotFoundError, ValueError: an entry is wrong, or its data cannot be read; names the entry.
    """
    sources = [Source.from_entry(entry, beside) for entry in cfg.DATASETS.SOURCES]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{KEY} has two entries of the NAME {name!r}; give each its own")
    found = {source.name: source.find_classes() for source in sources}
    trained: Tuple[str, ...] = ()
    for name in names:
        if name in cfg.DATASETS.TRAIN:
            trained = trained if set(found[name]) <= set(trained) else found[name]
    entries = []
    for source in sources:
        is_free = source.format != "coco" and not source.classes
        classes = trained if is_free and set(found[source.name]) <= set(trained) else found[source.name]
        entries.append({**source.to_entry(), "CLASSES": list(classes)})
    cfg.DATASETS.SOURCES = entries


def sources_config(train: Sequence[Source], test: Sequence[Source]) -> CfgNode:
    """
    A config of Detectron2's defaults with these data sets, complete and registered. It is not frozen.

    Raises:
        FileNotFoundError, ValueError: as :func:`complete_sources` and :func:`register_sources`.
    """
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.DATASETS.SOURCES = [each.to_entry() for each in (*train, *test)]
    cfg.DATASETS.TRAIN = tuple(each.name for each in train)
    cfg.DATASETS.TEST = tuple(each.name for each in test)
    complete_sources(cfg)
    register_sources(cfg)
    return cfg


def register_sources(cfg: CfgNode) -> None:
    """
    Registers the sets of ``DATASETS.SOURCES``. A set of the same name in an earlier config gives way to another one.

    Args:
        cfg: after :func:`complete_sources`.

    Raises:
        ValueError: a name is that of a data set that no config has registered.
    """
    for entry in cfg.DATASETS.SOURCES:
        source = Source.from_entry(entry)
        if _registered.get(source.name) == source:
            continue
        if source.name in DatasetCatalog:
            if source.name not in _registered:
                raise ValueError(f"{KEY} has the NAME {source.name!r}, which is another data set's; give it its own")
            DatasetCatalog.remove(source.name)
            MetadataCatalog.remove(source.name)
        _register(source)
        _registered[source.name] = source


def _register(source: Source) -> None:
    if source.format == "coco":
        register_coco_instances(source.name, {}, source.path, source.images)
        return
    DatasetCatalog.register(source.name, SourceLoader(source))
    MetadataCatalog.get(source.name).set(thing_classes=list(source.classes), evaluator_type="coco")
