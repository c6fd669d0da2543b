#!/usr/bin/env python
"""
As train_net.py, with the quantizers and meta-architectures of evidence_lib/prototypes.py registered.

    python benchmarks/train_prototype.py --config-file ... MODEL.QMIMIC.QUANTIZER.NAME SoftUniform [KEY VALUE ...]
"""

import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import evidence_lib.prototypes  # noqa: E402,F401

if __name__ == "__main__":
    runpy.run_path(os.path.join(ROOT, "train_net.py"), run_name="__main__")
