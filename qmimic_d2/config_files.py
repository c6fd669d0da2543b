"""Where config files are found, the packaged ones and those that a config names; and changed copies of a config."""

import functools
import operator
import os
from typing import TYPE_CHECKING, Any, Sequence

if TYPE_CHECKING:  # a device with an exported detector has no Detectron2
    from detectron2.config import CfgNode

__all__ = ["changed", "find_config_file", "get_config_file", "packaged_config_folder", "train_net_script"]

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def packaged_config_folder() -> str:
    """Absolute path of this project's ``configs`` folder, in a wheel and in a checkout alike."""
    in_wheel = os.path.join(_PACKAGE, "configs")
    return in_wheel if os.path.isdir(in_wheel) else os.path.join(os.path.dirname(_PACKAGE), "configs")


def get_config_file(name: str) -> str:
    """
    Args:
        name: path below ``configs``, for example "Digits/student_vgg_1_16_qmimic.yaml".

    Returns:
        Its absolute path.

    Raises:
        FileNotFoundError: there is none of that name; lists those of its folder.
    """
    folder = packaged_config_folder()
    path = os.path.join(folder, *name.split("/"))
    if not os.path.isfile(path):
        beside = os.path.dirname(path)
        known = sorted(os.listdir(beside if os.path.isdir(beside) else folder))
        raise FileNotFoundError(f"this package has no config {name!r}; beside it stand {known}")
    return path


def find_config_file(path: str, key: str, beside: Sequence[str] = ()) -> str:
    """
    Finds a config file that another config names.

    Args:
        path: the value as written: absolute, or relative to one of the places below.
        key: config key it came from, for the error.
        beside: folders to look in first, such as that of the config that names it. Then come the
            working directory and the packaged configs.

    Returns:
        Absolute path.

    Raises:
        FileNotFoundError: it is in none of the places; names the key and every place.
    """
    path = os.path.expanduser(path)
    places = [*beside, os.getcwd(), packaged_config_folder()]
    tried = [os.path.abspath(os.path.join(place, path)) for place in places]
    for candidate in tried:
        if os.path.isfile(candidate):
            return candidate
    raise FileNotFoundError(
        f"{key} is {path!r}, and there is no such file. Looked for "
        f"{', '.join(dict.fromkeys(tried))}. Give its path from the working directory or an absolute one"
    )


def changed(cfg: "CfgNode", *pairs: Any) -> "CfgNode":
    """A frozen copy with other values, given as key, value, key, value; they may be of any type."""
    copy = cfg.clone()
    copy.defrost()
    for key, value in zip(pairs[::2], pairs[1::2]):
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, copy)[name] = value
    copy.freeze()
    return copy


def train_net_script() -> str:
    """Absolute path of ``train_net.py``, in a wheel and in a checkout alike."""
    in_wheel = os.path.join(_PACKAGE, "train_net.py")
    return in_wheel if os.path.isfile(in_wheel) else os.path.join(os.path.dirname(_PACKAGE), "train_net.py")
