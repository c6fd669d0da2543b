"""Configs as YAML with the reason of every value behind it."""

import json
from typing import Any, Dict, Sequence, Tuple

from qmimic_d2.distill.choices import Choice

__all__ = ["config_text"]

# A node: by key, another node or a value with its reason.
_Node = Dict[str, Any]


def config_text(title: str, choices: Sequence[Choice], base: str = "") -> str:
    """
    Args:
        title: what the config is, for the first line.
        choices: a key's last one counts.
        base: of ``_BASE_``; "" for none.
    """
    root: _Node = {}
    for choice in choices:
        node = root
        *sections, name = choice.key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = (choice.value, choice.reason)
    lines = [f"# {title}", *([f"_BASE_: {_value(base)}"] if base else []), *_lines(root, 0)]
    return "\n".join(lines) + "\n"


def _lines(node: _Node, depth: int) -> Tuple[str, ...]:
    lines = []
    indent = "  " * depth
    for key, item in node.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", *_lines(item, depth + 1)]
        elif isinstance(item[0], list) and item[0] and isinstance(item[0][0], dict):
            lines += [f"{indent}{key}:{_comment(item[1])}", *(f"{indent}  - {_value(each)}" for each in item[0])]
        else:
            lines.append(f"{indent}{key}: {_value(item[0])}{_comment(item[1])}")
    return tuple(lines)


def _value(value: Any) -> str:
    # JSON is YAML but for True and False, which Detectron2's files write so
    return str(value) if isinstance(value, (bool, int, float)) else json.dumps(value, ensure_ascii=False)


def _comment(reason: str) -> str:
    return f"  # {reason}" if reason else ""
