"""
Python imports this module at its start when this folder is on PYTHONPATH.

The storm runs ``train_net.py`` as it stands. This module only adds a recorder to the trainer once it is imported, in
every process of the training.
"""

import importlib.abc
import importlib.util
import os
import sys

_TRAINER = "qmimic_d2.engine.trainer"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        import storm_recorder

        storm_recorder.attach(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = _Loader(spec.loader)
        return spec


if "QMIMIC_STORM_RECORD" in os.environ:
    sys.meta_path.insert(0, _Finder())
