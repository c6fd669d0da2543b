"""Reads Detectron2 configs in YAML: the files that they build on, and the keys that they set; no code runs."""

import logging
import os
import re
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version

from qmimic_d2.near_names import near_names
from qmimic_d2.yaml.file import read_yaml

__all__ = [
    *("BASE_KEY", "as_lists", "describe_mismatch", "flat_keys", "merge_config", "merge_content", "read_config"),
    "value_of",
]

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"

_MOST_FILES = 100
# yacs's error for a text in place of a list. Earlier versions joined the sources of MIMIC.ROI_SOURCE by "+".
_TEXT_FOR_LIST = re.compile(r"<class 'list'> vs\. <class 'str'>.* vs\. (.*)\) for config key", re.DOTALL)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def read_config(path: str) -> Dict[str, Any]:
    """
    The keys of a config and of the files that its ``_BASE_`` leads to, the later ones over the earlier ones.

    As Detectron2 has it, ``_BASE_`` is a path or a list of paths, relative to the file that names them, absolute, or
    from "~". Unlike there, files come from this machine alone, and nothing in them is run.

    Raises:
        FileNotFoundError: a file is not there; names the one that builds on it.
        ValueError: a file is no config in YAML, builds on itself, on an address, or on more than 100 files.
    """
    return _read(path, (), [])


def merge_config(cfg: CfgNode, path: str, *, allow_new: bool = False) -> List[str]:
    """
    Sets the keys of a config file: ``cfg.merge_from_file`` without its readiness to run code.

    Args:
        cfg: with every key that the file may set; not frozen.
        path: of the YAML.
        allow_new: keys that ``cfg`` lacks are added to it, in place of an error.

    Returns:
        The added keys.

    Raises:
        FileNotFoundError: as :func:`read_config`.
        KeyError: unknown keys; names all of them, and near ones.
        ValueError: as :func:`read_config`; or a value of another type.
    """
    return merge_content(cfg, read_config(path), path, allow_new=allow_new)


def merge_content(cfg: CfgNode, content: Dict[str, Any], path: str, *, allow_new: bool = False) -> List[str]:
    """:func:`merge_config` of keys that have been read already; ``path`` names their file in errors."""
    try:
        loaded = CfgNode(content)
        unknown = _unknown_keys(loaded, cfg)
        return _merge(cfg, loaded, path, unknown, allow_new)
    except KeyError as error:
        raise KeyError(f"{error.args[0] if error.args else error} (in {path!r})") from error
    except ValueError as error:
        raise ValueError(f"{path!r}: {describe_mismatch(error)}") from error
    except (AssertionError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path!r} is no Detectron2 config: {type(error).__name__}: {error}") from error


def flat_keys(node: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Every value of a config, or of nested dicts, by its full key, such as "SOLVER.BASE_LR"."""
    found: Dict[str, Any] = {}
    for key, value in node.items():
        found.update(flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def value_of(content: Any, key: str) -> Any:
    """The value of a full key in nested mappings, which may be anybody's; None where there is none."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def as_lists(value: Any) -> Any:
    """A saved config has lists where Detectron2's defaults have tuples."""
    return list(map(as_lists, value)) if isinstance(value, (list, tuple)) else value


def describe_mismatch(error: ValueError) -> str:
    """The text of yacs's error, which names the key; for a text or an integer of the wrong type, with what to write."""
    text = str(error)
    as_text = _TEXT_FOR_LIST.search(text)
    if as_text:
        return f"{text}. Give a list: {as_text[1].split('+')}"
    return f"{text}. A float needs its point: 1.0, not 1" if "'float'" in text and "'int'" in text else text


def _read(path: str, chain: Tuple[str, ...], files: List[str]) -> Dict[str, Any]:
    real = os.path.realpath(path)
    if real in chain:
        loop = " -> ".join([*chain[chain.index(real) :], real])
        raise ValueError(f"{BASE_KEY} leads back to its own file: {loop}. Take {BASE_KEY} out of one of them")
    files.append(path)
    if len(files) > _MOST_FILES:
        raise ValueError(f"{BASE_KEY} leads to more than {_MOST_FILES} files, {path!r} among them")
    content = read_yaml(path)
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__} in place of keys and values"
        raise ValueError(f"{path!r} is no Detectron2 config: it {what}")
    bases = content.pop(BASE_KEY, [])
    merged: Dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        found = _base_path(base, path)
        _override(merged, _read(found, (*chain, real), files), found)
    _override(merged, content, path)
    return merged


def _base_path(base: Any, path: str) -> str:
    if not isinstance(base, str) or not base:
        raise ValueError(f"{BASE_KEY} in {path!r} is {base!r}; give the path of a YAML, or a list of paths")
    if _ADDRESS.match(base):
        raise ValueError(
            f"{BASE_KEY} in {path!r} is the address {base!r}, which is not fetched; download it and give its path"
        )
    found = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    if not os.path.isfile(found):
        raise FileNotFoundError(
            f"{BASE_KEY} in {path!r} is {base!r}, and there is no file {os.path.abspath(found)!r}; correct the path, "
            "which counts from the file that names it"
        )
    return found


def _override(target: Dict[str, Any], source: Dict[str, Any], path: str, prefix: str = "") -> None:
    """Sets the keys of ``source`` in ``target``, key by key in their sections."""
    for key, value in source.items():
        if not isinstance(key, str):
            raise ValueError(f"{path!r} is no Detectron2 config: its key {prefix}{key!r} is no text")
        if isinstance(value, dict):
            section = target.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"{path!r} gives {prefix}{key} keys, and a file that it builds on gives it a value")
            _override(section, value, path, f"{prefix}{key}.")
        else:
            target[key] = value


def _unknown_keys(loaded: CfgNode, cfg: CfgNode, prefix: str = "") -> List[str]:
    """Keys and sections that ``cfg`` lacks; of a section that it lacks, the section alone."""
    unknown = []
    for key, value in loaded.items():
        if key not in cfg:
            unknown += [] if cfg.is_new_allowed() else [prefix + key]
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            unknown += _unknown_keys(value, cfg[key], f"{prefix}{key}.")
    return unknown


def _merge(cfg: CfgNode, loaded: CfgNode, path: str, unknown: Sequence[str], allow_new: bool) -> List[str]:
    version = loaded.get("VERSION")
    if version is None:
        version = guess_version(loaded, path)
    if version not in range(1, cfg.VERSION + 1):
        raise ValueError(f"VERSION is {version!r}; this Detectron2 reads configs of versions 1 to {cfg.VERSION}")
    if version != cfg.VERSION:  # keys had other names then, so Detectron2 translates them
        earlier = downgrade_config(cfg, to_version=version)
        unknown = _merge(earlier, loaded, path, _unknown_keys(loaded, earlier), allow_new)
        upgraded = upgrade_config(earlier)
        cfg.clear()
        cfg.update(upgraded)
        return unknown
    for key in filter(cfg.key_is_renamed, unknown):
        cfg.raise_key_rename_error(key)
    unknown = [key for key in unknown if not cfg.key_is_deprecated(key)]
    if unknown and not allow_new:
        raise KeyError(_unknown_text(unknown, flat_keys(cfg)))
    if not allow_new:
        cfg.merge_from_other_cfg(loaded)
        return []
    cfg.set_new_allowed(True)
    try:
        cfg.merge_from_other_cfg(loaded)
    finally:
        cfg.set_new_allowed(False)
    return unknown


def _unknown_text(unknown: Sequence[str], known: Iterable[str]) -> str:
    texts = []
    for key in unknown:
        near = near_names(key, known)
        texts.append(f"{key}{f' (near keys are {near})' if near else ''}")
    return f"Non-existent config key{'s' if len(unknown) > 1 else ''}: {', '.join(texts)}"
