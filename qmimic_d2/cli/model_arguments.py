"""Arguments of the sub-commands that take a model: its config, its weights, its device."""

import argparse
from typing import TYPE_CHECKING, List

if TYPE_CHECKING:  # a device with an exported detector has no Detectron2
    from detectron2.config import CfgNode

__all__ = ["add_model_arguments", "key_value_pairs", "load_model_config", "weights_key"]


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds ``--config-file`` (which a command may do without), ``--weights``, ``--device`` and KEY VALUE pairs."""
    parser.add_argument(
        "--config-file",
        required=required,
        default="",
        metavar="FILE",
        help="the detector's YAML, as train_net.py takes it; a name below this project's configs will do",
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="its checkpoint (default: MODEL.WEIGHTS)")
    parser.add_argument(
        "--device", default="", type=_device, help="cpu, cuda, cuda:1, ... (default: MODEL.DEVICE)"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="at the end: pairs that override the config, such as MODEL.DEVICE cpu",
    )


def key_value_pairs(args: argparse.Namespace) -> List[str]:
    """
    The KEY VALUE pairs of the arguments.

    Raises:
        ValueError: for a KEY without VALUE.
    """
    opts = args.opts[1:] if args.opts[:1] == ["--"] else list(args.opts)
    if len(opts) % 2:
        raise ValueError(f"give KEY VALUE pairs at the end; {' '.join(opts)!r} leaves a KEY without its VALUE")
    return opts


def load_model_config(args: argparse.Namespace) -> "CfgNode":
    """
    The config that the arguments name, for a use that needs no file of a teacher.

    Raises:
        KeyError, ValueError, FileNotFoundError: as :func:`load_config` and :func:`key_value_pairs`.
    """
    from qmimic_d2.engine import load_config

    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    return load_config(args.config_file, key_value_pairs(args) + weights, eval_only=True, device=args.device)


def weights_key(args: argparse.Namespace) -> str:
    """Where the user gave the weights, for error messages."""
    return "--weights" if args.weights else "MODEL.WEIGHTS (or --weights)"


def _device(text: str) -> str:
    try:
        import torch
    except ImportError:  # then only what runs without it can be opened
        return text
    try:
        torch.device(text or "cpu")  # "" leaves it to the config
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda or cuda:NUMBER") from None
    return text
