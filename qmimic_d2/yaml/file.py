"""Reads YAML that anybody may have written: plain data of bounded size, and never code."""

import itertools
from typing import Any, Dict, Tuple

import yaml

from qmimic_d2.files import check_is_file
from qmimic_d2.yaml.arithmetic import compute

__all__ = ["read_yaml"]

# A Detectron2 config has about 25 kB, 700 values and 6 levels.
_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000
_MOST_LEVELS = 32

_PYTHON = "tag:yaml.org,2002:python/"


def read_yaml(path: str) -> Any:
    """
    The content of one YAML file, with tuples, and with the arithmetic that Detectron2's own files hold, see
    :func:`qmimic_d2.yaml.arithmetic.compute`.

    Returns:
        Dicts, lists, tuples, texts, numbers, booleans and None; None for an empty file.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, a pipe or a device.
        OSError: it cannot be opened.
        ValueError: it is no YAML, holds a tag that would run code, or is too large: over 1 MB, over 100,000 values
            (every use of an anchor counts), or over 32 levels. Names the file.
    """
    check_is_file(path, "YAML")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path!r} has more than {_MOST_BYTES:,} bytes, and is no config")
    try:
        return _load(data)
    except RecursionError as error:
        raise ValueError(f"{path!r} is nested too deeply") from error
    except Exception as error:  # for a tag whose value does not fit, PyYAML raises what Python's own types raise
        raise ValueError(f"{path!r} cannot be read as YAML: {type(error).__name__}: {_one_line(error)}") from error


def _load(data: bytes) -> Any:
    loader = _PlainLoader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, known: Dict[int, Tuple[int, int]]) -> Tuple[int, int]:
    """
    Number of values and of levels of a node, every use of an anchor counted: a few lines of anchors in anchors stand
    for billions of values, which are shared until somebody copies them.
    """
    if id(node) in known:
        values, levels = known[id(node)]
        if not values:
            raise ValueError(f"an anchor is used inside itself{_place(node)}")
        return values, levels
    known[id(node)] = (0, 0)
    values, levels = 1, 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    for child in itertools.chain(*children) if isinstance(node, yaml.MappingNode) else children:
        more, depth = _weigh(child, known)
        values, levels = values + more, max(levels, depth)
    if values > _MOST_VALUES or levels >= _MOST_LEVELS:
        raise ValueError(f"more than {_MOST_VALUES:,} values or {_MOST_LEVELS} levels{_place(node)}")
    known[id(node)] = (values, levels + 1)
    return known[id(node)]


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, and what stands for plain data under the tags of its unsafe one."""


def _tuple(loader: _PlainLoader, node: yaml.Node) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _arithmetic(loader: _PlainLoader, node: yaml.Node) -> Any:
    arguments = loader.construct_sequence(node, deep=True)
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise ValueError(f"the tag !!python/object/apply:eval takes one text{_place(node)}")
    return compute(arguments[0])


def _refuse(loader: _PlainLoader, suffix: str, node: yaml.Node) -> None:
    text = f"the tag !!python/{suffix} would run code, which is not done for a config file; write the value itself"
    raise yaml.constructor.ConstructorError(problem=text, problem_mark=node.start_mark)


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_PlainLoader.add_multi_constructor(_PYTHON, _refuse)
for _name, _construct in {
    "tuple": _tuple,
    "object/apply:eval": _arithmetic,
    "list": yaml.SafeLoader.construct_yaml_seq,
    "dict": yaml.SafeLoader.construct_yaml_map,
    "str": yaml.SafeLoader.construct_yaml_str,
    "unicode": yaml.SafeLoader.construct_yaml_str,
    "int": yaml.SafeLoader.construct_yaml_int,
    "float": yaml.SafeLoader.construct_yaml_float,
    "bool": yaml.SafeLoader.construct_yaml_bool,
    "none": yaml.SafeLoader.construct_yaml_null,
}.items():
    _PlainLoader.add_constructor(_PYTHON + _name, _construct)
