"""Finds the key whose value makes a part of a run fail: with Detectron2's default in its place, the part succeeds."""

import os
import re
import time
import traceback
from typing import Any, Callable, Dict, List

from detectron2.config import CfgNode

from qmimic_d2.config import default_config
from qmimic_d2.config_files import changed
from qmimic_d2.yaml.config import as_lists, flat_keys

__all__ = ["explained"]

# Longest search, in seconds, and most keys and characters in a message.
_SECONDS = 30.0
_MOST_KEYS = 12
_MOST_CHARACTERS = 400

# Their defaults mean another run, or none.
_NEVER_RESET = ("VERSION", "OUTPUT_DIR", "SEED", "MODEL.DEVICE", "DATASETS.TRAIN", "DATASETS.TEST")

# Their defaults change much more than one setting, so they are tried last.
_LAST = (
    *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "MODEL.WEIGHTS"),
    *("MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ROI_HEADS.NAME", "MODEL.QMIMIC.QUANTIZER.NAME"),
)


def explained(
    error: Exception, cfg: CfgNode, part: str, attempt: Callable[[CfgNode], Any], nodes: List[str]
) -> Exception:
    """
    The error as a user sees it.

    Args:
        error: that ``part`` raised. One that already names a key is returned as it is.
        cfg: of the run.
        part: what failed, for example "the first training step".
        attempt: does that part with another config, and raises where it fails.
        nodes: beginnings of the keys that the part reads.
    """
    text = " ".join(str(error).split())
    values = flat_keys(cfg)
    if isinstance(error, (KeyError, ValueError, OSError)) and any(key in text for key in values if "." in key):
        return error
    text = f"{type(error).__name__}: {text[:_MOST_CHARACTERS] or _failed_line(error)}"
    defaults = flat_keys(default_config())
    registry = re.search(r"'(\w+)' registry", text)
    if registry and f"MODEL.{registry[1]}.NAME" in values:
        key = f"MODEL.{registry[1]}.NAME"
        return ValueError(f"{key} is {values[key]!r}, with which {part} fails: {text}. Give a registered name")
    suspects = _suspects(values, defaults, text, nodes)
    if not _succeeds(attempt, cfg):  # else it failed for what an attempt leaves out, such as the loaded weights
        end = time.monotonic() + _SECONDS
        key = _culprit(cfg, [each for each in suspects if each not in _LAST], defaults, attempt, end)
        quoted = next((each for each in suspects if _is_quoted(values[each], text)), "")
        if not key and quoted:
            return ValueError(f"{quoted} is {values[quoted]!r}, with which {part} fails: {text}. Correct the value")
        key = key or _culprit(cfg, [each for each in suspects if each in _LAST], defaults, attempt, end)
        if key:
            return ValueError(
                f"{key} is {values[key]!r}, with which {part} fails: {text}. It succeeds with Detectron2's default, "
                f"{defaults[key]!r}; correct the value"
            )
    shown = ", ".join(f"{key} {values[key]!r}" for key in suspects[:_MOST_KEYS])
    more = f", or one of {len(suspects) - _MOST_KEYS} more" if len(suspects) > _MOST_KEYS else ""
    return ValueError(
        f"{part} fails: {text}. No single key is to blame. Correct what does not fit the others"
        + (f" among the keys that differ from Detectron2's defaults: {shown}{more}" if shown else "")
    )


def _suspects(values: Dict[str, Any], defaults: Dict[str, Any], text: str, nodes: List[str]) -> List[str]:
    """Keys that differ from their defaults, the likeliest first."""

    def rank(key: str) -> tuple:
        is_named = key.rpartition(".")[2].lower() in text.lower()
        return (key in _LAST, not _is_quoted(values[key], text), not _is_odd(values[key]), not is_named, key)

    read = (key for key in values if key in defaults and key.startswith(tuple(nodes)) and key not in _NEVER_RESET)
    return sorted((key for key in read if as_lists(values[key]) != as_lists(defaults[key])), key=rank)


def _is_quoted(value: Any, text: str) -> bool:
    """Whether a text quotes a string, or one of a list."""
    if isinstance(value, (list, tuple)):
        return any(_is_quoted(each, text) for each in value)
    return isinstance(value, str) and repr(value) in text


def _failed_line(error: Exception) -> str:
    """The line of code, of an assertion that says nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].line} ({os.path.basename(frames[-1].filename)})" if frames else ""


def _is_odd(value: Any) -> bool:
    """Whether a value looks like a mistake: a switch, nothing, negative, huge or not finite."""
    if isinstance(value, (list, tuple)):
        return not value or any(map(_is_odd, value))
    if not isinstance(value, (int, float)):
        return False
    return isinstance(value, bool) or not 0 < value < 1e5


def _culprit(
    cfg: CfgNode, suspects: List[str], defaults: Dict[str, Any], attempt: Callable[[CfgNode], Any], end: float
) -> str:
    """The first key whose default helps; "" where none does, or the time is over."""
    for key in suspects:
        if time.monotonic() > end:
            break
        if _succeeds(attempt, changed(cfg, key, defaults[key])):
            return key
    return ""


def _succeeds(attempt: Callable[[CfgNode], Any], cfg: CfgNode) -> bool:
    try:
        attempt(cfg)
    except Exception:  # whatever a wrong value makes Detectron2, PyTorch or Pillow raise
        return False
    return True
