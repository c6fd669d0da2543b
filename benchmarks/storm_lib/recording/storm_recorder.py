"""Writes every scalar of every training step, exactly, to the file that QMIMIC_STORM_RECORD names."""

import json
import os

from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.utils import comm


class _Recorder(HookBase):
    """It stands before all other hooks: what a checkpoint holds has been recorded before."""

    def before_train(self):
        _append({"start": self.trainer.start_iter})

    def after_step(self):
        iteration = self.trainer.iter
        latest = self.trainer.storage.latest()
        values = {name: float(value).hex() for name, (value, when) in latest.items() if when == iteration}
        _append({"iteration": iteration, "values": values})


def _append(row):
    if comm.is_main_process():
        file = os.open(os.environ["QMIMIC_STORM_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(row) + "\n").encode())  # one write: a kill leaves no half of a line
        finally:
            os.close(file)


def attach(module):
    """
    Registers the storm's data sets and gives the trainer of a module the recorder.

    Args:
        module: ``qmimic_d2.engine.trainer``.
    """
    for name, annotations, images in json.loads(os.environ.get("QMIMIC_STORM_DATASETS", "[]")):
        register_coco_instances(name, {}, annotations, images)
    build_hooks = module.Trainer.build_hooks
    module.Trainer.build_hooks = lambda self: [_Recorder(), *build_hooks(self)]
