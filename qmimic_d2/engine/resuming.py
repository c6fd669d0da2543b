"""
What ``--resume`` goes on from. What cannot be continued is refused before anything is written.

A checkpoint holds the optimizer with the settings that it had. Detectron2 restores them. Here the config's count.
"""

import logging
import os
import reprlib
from typing import Any, List, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode
from torch import nn

from qmimic_d2.checkpoint.checkpointer import SafeCheckpointer, check_resumed_state, tensors_in
from qmimic_d2.checkpoint.reader import local_path, read_mapping, subject
from qmimic_d2.run_folder import CONFIG, TAG, read_config
from qmimic_d2.yaml.config import as_lists, flat_keys, value_of

__all__ = ["check_resuming", "check_trainer_state", "earlier_seed", "saved_config"]

logger = logging.getLogger(__name__)

# By what their state holds, for a message; other optimizers of a subclass are only compared by these keys.
_HYPERPARAMETERS = {"SGD": "momentum", "AdamW": "betas"}


def earlier_seed(folder: str) -> Optional[int]:
    """
    The SEED of an earlier run in a folder; None where there is none.

    Raises:
        ValueError: its ``config.yaml`` is damaged.
    """
    seed = saved_config(folder).get("SEED", -1)
    if type(seed) is not int:
        raise _damaged_config(folder, f"SEED is {seed!r}")
    return seed if seed >= 0 else None


def saved_config(folder: str) -> Mapping[str, Any]:
    """{} where there is no ``config.yaml``."""
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        return {}
    try:
        return read_config(folder)
    except (OSError, ValueError) as error:
        raise _damaged_config(folder, type(error.__cause__).__name__ if error.__cause__ else str(error)) from error


def _damaged_config(folder: str, reason: str) -> ValueError:
    return ValueError(
        f"{os.path.join(folder, CONFIG)!r} is damaged ({reason}), and --resume compares its settings with the new "
        "ones. Put the file back, or delete it and give the run's SEED with --resume"
    )


def check_resuming(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises where a resumed training could not continue the one in OUTPUT_DIR; there may be none.

    Args:
        cfg: of the run.
        optimizer: as the config builds it, on the model as it is trained.

    Raises:
        ValueError: ``config.yaml`` or the last checkpoint is damaged, the checkpoint has no state of a training, or
            the config asks for what cannot be continued: another optimizer, other groups of parameters, fewer
            iterations than are done. Names the file or the key, and the fix.
    """
    checkpointer = SafeCheckpointer(nn.Module(), cfg.OUTPUT_DIR, save_to_disk=False)
    if not checkpointer.has_checkpoint():
        return
    tag, last = os.path.join(cfg.OUTPUT_DIR, TAG), checkpointer.get_checkpoint_file()
    content = read_mapping(local_path(last, tag), last, tag)
    check_resumed_state(content, ["trainer"], last, tag)
    source = subject(tag, last)
    check_trainer_state(content["trainer"], optimizer, cfg.SOLVER.MAX_ITER, source)
    changes = _changes(saved_config(cfg.OUTPUT_DIR), cfg)
    if changes:
        iteration = content["trainer"]["iteration"] + 1
        logger.warning("From iteration %d on, SOLVER is another than so far: %s", iteration, "; ".join(changes))


def check_trainer_state(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, max_iter: int, source: str
) -> None:
    """
    Raises:
        ValueError: a Detectron2 trainer's state is damaged, does not belong to an optimizer, or is longer than
            ``max_iter``. Names its ``source`` and the fix.
    """
    iteration, last_epoch = state.get("iteration"), value_of(state, "hooks.LRScheduler.last_epoch")
    saved, groups = (value_of(state, f"_trainer.optimizer.{name}") for name in ("state", "param_groups"))
    if (
        type(iteration) is not int
        or iteration < 0
        or last_epoch not in (iteration, iteration + 1)
        or not isinstance(saved, Mapping)
        or not (isinstance(groups, list) and groups)
        or not all(isinstance(value_of(each, "params"), list) for each in groups)
    ):
        raise ValueError(
            f"{source} has a damaged state of the training (optimizer, schedule or iteration). Write the name of an "
            f"earlier checkpoint into {TAG}, or begin a training from its weights without --resume"
        )
    if iteration >= max_iter:
        raise ValueError(
            f"SOLVER.MAX_ITER is {max_iter}, and {source} is of iteration {iteration}: {iteration + 1} iterations are "
            f"done. Set SOLVER.MAX_ITER to {iteration + 1} or more, or begin another training without --resume"
        )
    _check_optimizer(groups, saved, optimizer, source)


def _check_optimizer(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], optimizer: torch.optim.Optimizer, source: str
) -> None:
    afresh = "or begin a training from its weights without --resume, in another OUTPUT_DIR"
    for name, key in _HYPERPARAMETERS.items():
        if (key in groups[0]) != (key in optimizer.param_groups[0]):
            kinds = [each for each, own in _HYPERPARAMETERS.items() if own in groups[0]] or ["another optimizer"]
            raise ValueError(
                f"SOLVER.OPTIMIZER is not that of {source}, which is {kinds[0]!r}: the state of one optimizer means "
                f"nothing to another. Set it to {kinds[0]!r}, {afresh}"
            )
    sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if sizes != own_sizes:
        raise ValueError(
            f"{source} has groups of {sizes} trained parameters, and the config makes groups of {own_sizes}. Set what "
            "decides them as it was: SOLVER.BIAS_LR_FACTOR, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, what is frozen "
            f"(the FREEZE_AT keys) and the model's parts, {afresh}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in groups for index in group["params"]]
    wrong = []
    for index, parameter in zip(order, parameters):
        for name, tensor in tensors_in(state.get(index, {})):
            if tensor.dim() and tensor.shape != parameter.shape:
                wrong.append(f"state {index}.{name} of shape {tuple(tensor.shape)} for {tuple(parameter.shape)}")
            elif tensor.dim() and not tensor.is_floating_point():
                wrong.append(f"state {index}.{name} of {tensor.dtype}")
    if wrong:
        raise ValueError(
            f"{source} has an optimizer of another model: {', '.join(wrong[:3])}. Correct the model, {afresh}"
        )


def _changes(saved: Mapping[str, Any], cfg: CfgNode) -> List[str]:
    """Keys of SOLVER whose value is another, as "KEY before -> after"."""
    before = flat_keys(saved)
    return [
        f"{key} {reprlib.repr(before[key])} -> {reprlib.repr(value)}"
        for key, value in flat_keys(cfg.SOLVER, "SOLVER.").items()
        if key in before and before[key] != as_lists(value)
    ]
