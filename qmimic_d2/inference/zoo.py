"""Students that this project trained and ships, each as ONNX in float32 and int8; torch is not needed."""

import os
from typing import Dict

__all__ = ["ZOO", "zoo_file", "zoo_models"]

# What an address of the zoo begins with.
ZOO = "zoo:"

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "zoo")
# File by what follows the model's name.
_FILES = {"": "model.onnx", "-int8": "model_int8.onnx"}
_CARD = "README.md"


def zoo_models() -> Dict[str, str]:
    """The first line of each model's card, by the model's name."""
    names = sorted(each for each in os.listdir(_FOLDER) if os.path.isfile(os.path.join(_FOLDER, each, _CARD)))
    return {name: _first_line(os.path.join(_FOLDER, name, _CARD)) for name in names}


def zoo_file(address: str) -> str:
    """
    Args:
        address: "zoo:NAME" for float32, "zoo:NAME-int8" for 8 bits.

    Returns:
        Absolute path of the ONNX file.

    Raises:
        ValueError: there is no such model; lists those that are there.
    """
    name = address[len(ZOO) :]
    files = _addresses()
    if name not in files:
        raise ValueError(f"the zoo has no model {name!r}; it has {', '.join(files)}")
    return files[name]


def _addresses() -> Dict[str, str]:
    found: Dict[str, str] = {}
    for name in zoo_models():
        for ending, file in _FILES.items():
            found[name + ending] = os.path.join(_FOLDER, name, file)
    return found


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
