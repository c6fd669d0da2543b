"""
Data sets of users' own, named in the config alone: ``DATASETS.SOURCES``.

An entry is a dict. ``NAME`` is what ``DATASETS.TRAIN`` and ``TEST`` call the set. ``FORMAT`` is one of :data:`FORMATS`:

- "coco": ``PATH`` is the annotation file, ``IMAGES`` the folder of the images (by default the folder of the file);
- "voc": ``PATH`` is a folder in the layout of Pascal VOC, ``SPLIT`` the name of a list in ``ImageSets/Main``;
- "yolo": ``PATH`` is the ``data.yaml``, ``SPLIT`` "train", "val" or "test".

``CLASSES`` gives names and order of the classes; without it they come from the data.
"""

from qmimic_d2.data.sources.registration import complete_sources, register_sources, sources_config
from qmimic_d2.data.sources.source import FORMATS, Source, SourceLoader, guess_sources

__all__ = [
    "FORMATS",
    "Source",
    "SourceLoader",
    "complete_sources",
    "guess_sources",
    "register_sources",
    "sources_config",
]
