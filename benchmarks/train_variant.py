#!/usr/bin/env python
"""
As train_net.py, faster on a CPU (evidence_lib/fast_training.py), and with the quantizers and meta-architectures of
evidence_lib/prototypes.py registered.

    python benchmarks/train_variant.py --config-file ... MODEL.QMIMIC.QUANTIZER.NAME SoftUniform [KEY VALUE ...]
"""

import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import evidence_lib.prototypes  # noqa: E402,F401
import qmimic_d2.engine  # noqa: E402
from evidence_lib.fast_training import FastTrainer  # noqa: E402

if __name__ == "__main__":
    qmimic_d2.engine.Trainer = FastTrainer  # train_net.py takes it from there
    runpy.run_path(os.path.join(ROOT, "train_net.py"), run_name="__main__")
