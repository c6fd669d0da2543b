"""From command-line arguments to a checked config, and what every process of a run sets up."""

import argparse
import importlib
import logging
import os
from typing import List, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n, setup_logger
from torch import nn

from qmimic_d2.config import default_config
from qmimic_d2.config_files import changed, find_config_file
from qmimic_d2.data.sources import complete_sources, register_sources
from qmimic_d2.engine.resuming import earlier_seed
from qmimic_d2.files import remove_leftovers
from qmimic_d2.folder_lock import hold_folder
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config
from qmimic_d2.modeling.trunk_adapter import is_in_trunk, trained_trunk_channels, trunk_channels
from qmimic_d2.near_names import near_names
from qmimic_d2.run_folder import TAG, TEACHER_CONFIG, is_local, write_configs
from qmimic_d2.yaml.config import describe_mismatch, flat_keys, merge_config

__all__ = [
    "argument_parser",
    "load_config",
    "set_up_process",
]

def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and ``--num-processes``."""
    parser = default_argument_parser()
    parser.description = (
        "Trains and evaluates. Reading a YAML runs no code. What a config names does: a training runs the Python of a "
        "teacher's LazyConfig (MODEL.QMIMIC.TEACHER.CONFIG_FILE ending in .py) and of MODEL.QMIMIC.TEACHER.ADD_CONFIG. "
        "Train with configs of people you trust. --eval-only runs neither."
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        default=0,
        help="train on the CPU with this many processes per machine (0 = use --num-gpus)",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action=_Import,
        default=[],
        metavar="MODULE",
        help="import a module of yours first, which registers data sets or backbones; its code runs",
    )
    return parser


class _Import(argparse.Action):
    """Imports a module, and notes its name for the other processes of the run."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            importlib.import_module(values)
        except ImportError as error:
            parser.error(f"{option_string} {values}: {error}")
        namespace.modules = [*namespace.modules, values]


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    eval_only: bool = False,
    resume: bool = False,
    device: str = "",
) -> CfgNode:
    """
    Reads a config with this project's keys and completes what depends on the machine.

    The teacher's config is looked up next to ``config_file`` and then where :func:`find_config_file` looks.
    ``MODEL.DEVICE`` "cuda" becomes "cpu" where there is no GPU. A negative ``SEED`` becomes a drawn one (the earlier
    one of the output folder when resuming), so that the saved config repeats the run.

    Args:
        config_file: path of a YAML, or a name below this package's ``configs``; "" = Detectron2's
            defaults.
        opts: KEY VALUE pairs that override it.
        eval_only: forget the teacher; an evaluation needs none of its files. The widths of a trunk adapter are those
            of ``MIMIC.TRUNK_CHANNELS``, or of the checkpoint; without either, of the teacher's YAML.
        resume: the run continues the one in OUTPUT_DIR.
        device: overrides MODEL.DEVICE; "" leaves it.

    Returns:
        A frozen config.

    Raises:
        KeyError, ValueError: an unknown key, a value of another type or none, a file that is no YAML or would
            run code; see :func:`qmimic_d2.yaml.config.merge_config`.
        FileNotFoundError: the config, one that it builds on, or the teacher's is not there.
    """
    cfg = default_config()
    if config_file:
        config_file = find_config_file(config_file, "--config-file")
        if config_file.endswith(".py"):
            raise ValueError(
                f"--config-file is {config_file!r}, a LazyConfig, which is Python code; this command reads YAML alone. "
                "Detectron2's tools/lazyconfig_train_net.py trains a LazyConfig"
            )
        _merge_file(cfg, config_file)
    _merge_pairs(cfg, list(opts))
    complete_sources(cfg, os.path.dirname(config_file) if config_file else "")
    register_sources(cfg)
    if not eval_only:
        _check_given(cfg)
    if device:
        cfg.MODEL.DEVICE = device
    _complete_teacher(cfg, os.path.dirname(config_file) if config_file else "", eval_only, resume)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        message = f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} and PyTorch sees no GPU here: using the CPU"
        log_first_n(logging.WARNING, message, name=__name__, key="message")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SEED < 0:
        earlier = earlier_seed(cfg.OUTPUT_DIR) if resume else None
        cfg.SEED = int.from_bytes(os.urandom(3), "little") if earlier is None else earlier
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    try:
        merge_config(cfg, path)
    except (KeyError, ValueError, FileNotFoundError) as error:
        kind = next(each for each in (KeyError, FileNotFoundError, ValueError) if isinstance(error, each))
        raise kind(f"--config-file: {error.args[0] if kind is KeyError else error}") from error


def _merge_pairs(cfg: CfgNode, opts: List[str]) -> None:
    try:
        cfg.merge_from_list(opts)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:  # an unknown key, or one without a value
        text = error.args[0] if error.args else type(error).__name__
        raise KeyError(f"{text} (of the KEY VALUE pairs {opts}){_hint(cfg, opts)}") from error
    except ValueError as error:  # yacs: a value of another type
        raise ValueError(describe_mismatch(error)) from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"a value of the KEY VALUE pairs is nested too deeply: {type(error).__name__}") from error


def _hint(cfg: CfgNode, opts: Sequence[str]) -> str:
    """What may have been meant by KEY VALUE pairs that the config refuses."""
    misplaced = [each for each in opts if str(each).startswith("--")]
    if misplaced:
        return f". Options such as {misplaced[0]} stand before the pairs"
    known = flat_keys(cfg)
    unknown = [str(key) for key in opts[::2] if key not in known and not cfg.key_is_renamed(key)]
    near = near_names(unknown[0], known) if unknown else []
    return f". Near keys are {near}" if near else ""


def _check_given(cfg: CfgNode) -> None:
    """yacs lets every key become None, which a YAML writes as nothing after the colon."""
    defaults = flat_keys(default_config())
    for key, value in flat_keys(cfg).items():
        if value is None and defaults.get(key) is not None:
            raise ValueError(f"{key} is None; give it a value (its default is {defaults[key]!r}), or leave it out")


def set_up_process(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """
    Logging, seeds, and for a training the output folder with its ``config.yaml``.

    That file repeats the run by itself: the teacher's config is copied next to it, and its weights are named by
    absolute path. The first process holds the lock of OUTPUT_DIR until it ends, in an evaluation too.

    Returns:
        The config with the SEED of the first process: where the user gave none, each machine drew its own.

    Raises:
        FolderInUseError: another process writes into OUTPUT_DIR.
    """
    for name in getattr(args, "modules", ()):
        importlib.import_module(name)
    cfg = changed(cfg, "SEED", comm.all_gather(cfg.SEED)[0])
    register_sources(cfg)  # this may be another process than the one that read the config
    if comm.is_main_process() and is_local(cfg.OUTPUT_DIR):
        hold_folder(cfg.OUTPUT_DIR)
        remove_leftovers(cfg.OUTPUT_DIR)
    comm.synchronize()
    rank = comm.get_rank()
    # Detectron2's default_setup does the same, but writes config.yaml in place: a kill would leave half of it.
    for name in ("qmimic_d2", "fvcore", "detectron2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    seed_all_rng(cfg.SEED + rank)
    if args.eval_only:
        return cfg
    logger = logging.getLogger(__name__)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    logger.info("Running with full config:\n%s", cfg.dump())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        _write_configs(cfg)
    return cfg


def _complete_teacher(cfg: CfgNode, beside: str, eval_only: bool, resume: bool) -> None:
    """Finds the teacher's config, writes down what the student has from it, and forgets it for an evaluation."""
    teacher, mimic = cfg.MODEL.QMIMIC.TEACHER, cfg.MODEL.QMIMIC.MIMIC
    widths_are_open = is_in_trunk(cfg) and not mimic.TRUNK_CHANNELS
    if eval_only and widths_are_open:
        mimic.TRUNK_CHANNELS = _trained_widths(cfg, resume)
        # Without weights (what a model costs, say), the teacher alone knows. Its YAML is data; a .py is code.
        widths_are_open = not mimic.TRUNK_CHANNELS and not teacher.CONFIG_FILE.endswith(".py")
        teacher.ADD_CONFIG = ""
    if eval_only and not widths_are_open:
        teacher.CONFIG_FILE = ""
    if teacher.CONFIG_FILE:
        teacher.CONFIG_FILE = find_config_file(
            teacher.CONFIG_FILE, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", [beside] if beside else []
        )
        if widths_are_open:
            mimic.TRUNK_CHANNELS = list(trunk_channels(cfg).values())
    if eval_only:
        teacher.CONFIG_FILE = ""


def _trained_widths(cfg: CfgNode, resume: bool) -> List[int]:
    """Those of the checkpoint that is evaluated: the last one of OUTPUT_DIR when resuming, else MODEL.WEIGHTS."""
    last = DetectionCheckpointer(nn.Module(), cfg.OUTPUT_DIR, save_to_disk=False)
    if resume and last.has_checkpoint():
        return trained_trunk_channels(cfg, last.get_checkpoint_file(), os.path.join(cfg.OUTPUT_DIR, TAG))
    return trained_trunk_channels(cfg, cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else []


def _write_configs(cfg: CfgNode) -> None:
    pairs, teacher_dump = ["MODEL.WEIGHTS", _absolute(cfg.MODEL.WEIGHTS)], ""
    node, key = cfg.MODEL.QMIMIC.TEACHER, "MODEL.QMIMIC.TEACHER"
    if node.CONFIG_FILE:
        teacher = load_teacher_config(cfg)
        pairs += [f"{key}.WEIGHTS", _absolute(node.WEIGHTS or teacher.weights)]
        if node.CACHE:
            pairs += [f"{key}.CACHE", os.path.abspath(node.CACHE)]
        teacher_dump = teacher.dump
        if teacher_dump:
            pairs += [f"{key}.CONFIG_FILE", TEACHER_CONFIG, f"{key}.OPTS", []]
    write_configs(cfg.OUTPUT_DIR, changed(cfg, *pairs).dump(), teacher_dump)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path and os.path.exists(path) else path
