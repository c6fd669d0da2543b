"""Names of the entries of a checkpoint that only a training has: the adapters and the loss weight of the mimic."""

from typing import Any, Dict

__all__ = ["TRAINING_ONLY", "rename_old_entries"]

_PREFIX, _OLD_PREFIX = "mimic.", "mimic_loss."
# The second one is how checkpoints from before 2026-11-25 call them.
TRAINING_ONLY = (_PREFIX, _OLD_PREFIX)


def rename_old_entries(state: Dict[str, Any], prefix: str = "", *rest: Any) -> None:
    """
    Gives entries of an earlier checkpoint their present names, in place.

    Args:
        state: a state dict.
        prefix: of the detector's entries in it.
        rest: of a hook that runs before ``load_state_dict``; not read.
    """
    old = f"{prefix}{_OLD_PREFIX}"
    for name in [each for each in state if each.startswith(old)]:
        state[f"{prefix}{_PREFIX}{name[len(old):]}"] = state.pop(name)
