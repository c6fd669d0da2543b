"""Training and evaluation: what train_net.py and the command line are made of."""

from qmimic_d2.diagnostics.mimic_summary import MimicSummary
from qmimic_d2.engine.checks.preflight import check_run
from qmimic_d2.engine.launching import is_first_of_machine, launch_processes, num_processes
from qmimic_d2.engine.mimic_evaluator import MimicEvaluator, add_mimic_hook
from qmimic_d2.engine.relative_stride import with_measured_stride
from qmimic_d2.engine.setup import argument_parser, load_config, set_up_process
from qmimic_d2.engine.trainer import Trainer, build_evaluator, load_evaluated_weights
from qmimic_d2.error_text import describe_error
from qmimic_d2.modeling.checkpointer import build_checkpointer
from qmimic_d2.modeling.mimic.sharing import one_teacher

__all__ = [
    "MimicEvaluator",
    "MimicSummary",
    "Trainer",
    "add_mimic_hook",
    "argument_parser",
    "build_checkpointer",
    "build_evaluator",
    "check_run",
    "describe_error",
    "is_first_of_machine",
    "launch_processes",
    "load_config",
    "load_evaluated_weights",
    "num_processes",
    "one_teacher",
    "set_up_process",
    "with_measured_stride",
]
