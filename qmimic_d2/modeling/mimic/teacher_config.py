"""Reads what the frozen teacher needs from the teacher's own config, a YAML or a LazyConfig."""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_proposal_generator
from detectron2.utils.logger import log_first_n
from omegaconf import DictConfig, ListConfig
from torch import nn

from qmimic_d2.config import default_config
from qmimic_d2.config_files import find_config_file
from qmimic_d2.files import read_json, write_json
from qmimic_d2.modeling.family import detector_name, family_of, has_quantizer_keys
from qmimic_d2.modeling.mimic.sharing import shared
from qmimic_d2.near_names import near_names
from qmimic_d2.yaml.config import describe_mismatch, merge_config

__all__ = ["TeacherConfig", "TeacherConfigError", "load_teacher_config"]

_KEY = "MODEL.QMIMIC.TEACHER.CONFIG_FILE"
_ADD_KEY = "MODEL.QMIMIC.TEACHER.ADD_CONFIG"
_CODE_KEYS = ("NAME", "STRIDE", "NUM_CODES", "SIGNED")


class TeacherConfigError(ValueError):
    """The teacher's config cannot be used; the message names the key, the file and what to do."""


@dataclass
class TeacherConfig:
    """
    The part of a teacher's config that the mimic needs.

    Attributes:
        path: absolute path of the config file.
        build_backbone: builds the backbone with random weights.
        build_proposal_generator: builds the proposal generator from the backbone's output shapes; returns None if the
            detector has none.
        weights: checkpoint that the config names, or "".
        pixel_mean, pixel_std: of the teacher's own preprocessing, in units of the pixel values.
        input_format: channel order, for example "BGR".
        dump: the whole config as YAML, with OPTS; "" for a LazyConfig, which is Python code.
        identity: text that changes with whatever decides on the backbone and the proposals.
        shapes_file: where a teacher cache keeps :meth:`shapes`, so that no backbone is built for them; "" without one.
        codes: keys and values of ``MODEL.QMIMIC.QUANTIZER`` in the training of a quantized teacher.
    """

    path: str
    build_backbone: Callable[[], Backbone]
    build_proposal_generator: Callable[[Dict[str, ShapeSpec]], Optional[nn.Module]]
    weights: str
    pixel_mean: Tuple[float, ...]
    pixel_std: Tuple[float, ...]
    input_format: str
    dump: str = ""
    identity: str = ""
    shapes_file: str = ""
    codes: Dict[str, Any] = field(default_factory=dict)
    _backbone: Optional[Backbone] = None
    _shapes: Optional[Dict[str, ShapeSpec]] = None

    def shapes(self) -> Dict[str, ShapeSpec]:
        """
        Channels and stride of the backbone's maps, by name.

        Raises:
            TeacherConfigError: the backbone cannot be built.
        """
        if self._shapes is None and self.shapes_file:
            self._shapes = _kept_shapes(self.shapes_file)
        if self._shapes is None:
            self._backbone = self.take_backbone()
            self._shapes = self._backbone.output_shape()
            if self.shapes_file:
                _keep_shapes(self.shapes_file, self._shapes)
        return dict(self._shapes)

    def take_backbone(self) -> Backbone:
        """
        A backbone with random weights, which belongs to the caller. The global random numbers do not change.

        Raises:
            TeacherConfigError: it cannot be built.
        """
        backbone, self._backbone = self._backbone, None
        if backbone is not None:
            return backbone
        with torch.random.fork_rng(devices=[]):
            try:
                return self.build_backbone()
            except Exception as error:
                raise TeacherConfigError(
                    f"{_KEY} is {self.path!r}, whose backbone cannot be built: {type(error).__name__}: {error}. "
                    "Correct that config, or import the package that registers its backbone before the model is built, "
                    f"or name the function that adds its keys in {_ADD_KEY}, which imports the package too"
                ) from error


def load_teacher_config(cfg: CfgNode) -> TeacherConfig:
    """
    Reads the teacher's config that a student's ``cfg.MODEL.QMIMIC.TEACHER`` names.

    A YAML is data, and may hold keys of its own project. Code runs only from a LazyConfig ``.py`` and from the function
    that ADD_CONFIG names.

    Raises:
        FileNotFoundError: the file or its base file does not exist; names the key and the places searched.
        TeacherConfigError: the config cannot be read, an entry of TEACHER.OPTS does not fit it, or TEACHER.ADD_CONFIG
            names no function that adds keys.
    """
    config = shared("config", (cfg.MODEL.QMIMIC.TEACHER.dump(), cfg.MODEL.DEVICE), lambda: _read(cfg))
    if cfg.MODEL.QMIMIC.TEACHER.CACHE:
        digest = hashlib.blake2b(config.identity.encode(), digest_size=8).hexdigest()
        config.shapes_file = os.path.join(cfg.MODEL.QMIMIC.TEACHER.CACHE, f"shapes_{digest}.json")
    _warn_of_other_codes(config, cfg)
    return config


def _read(cfg: CfgNode) -> TeacherConfig:
    node = cfg.MODEL.QMIMIC.TEACHER
    path = find_config_file(node.CONFIG_FILE, _KEY)
    is_lazy = path.endswith(".py")
    if is_lazy and node.ADD_CONFIG:
        raise TeacherConfigError(
            f"{_ADD_KEY} is {node.ADD_CONFIG!r}, and {_KEY} names a LazyConfig, which needs no such function; set it "
            "to ''"
        )
    add_keys = _key_adder(node.ADD_CONFIG)
    try:
        return _read_lazy(path, cfg) if is_lazy else _read_yaml(path, cfg, add_keys)
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else TeacherConfigError
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise kind(
            f"{_KEY} is {path!r}, which cannot be read as a Detectron2 config with "
            f"MODEL.QMIMIC.TEACHER.OPTS {list(node.OPTS)}: {type(error).__name__}: {text}. Give the YAML "
            "or LazyConfig .py that the teacher was trained with; if it sets keys of another project, name the "
            f"function that adds them in {_ADD_KEY}"
        ) from error


def _key_adder(name: str) -> Optional[Callable[[CfgNode], None]]:
    """The function that ADD_CONFIG names; None for ""."""
    if not name:
        return None
    form = "give 'package.module:function', such as 'point_rend:add_pointrend_config'"
    module, _, function = name.partition(":")
    if not (module and function):
        raise TeacherConfigError(f"{_ADD_KEY} is {name!r}; {form}")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the project's own code raises
        raise TeacherConfigError(
            f"{_ADD_KEY} is {name!r}, which cannot be imported: {type(error).__name__}: {error}. Install that project "
            f"or put it on PYTHONPATH, and {form}"
        ) from error
    if not callable(found):
        raise TeacherConfigError(f"{_ADD_KEY} is {name!r}, which is a {type(found).__name__}; {form}")

    def add(teacher: CfgNode) -> None:
        try:
            found(teacher)
        except Exception as error:
            raise TeacherConfigError(
                f"{_ADD_KEY} is {name!r}, which failed on a config: {type(error).__name__}: {error}"
            ) from error

    return add


def _read_yaml(path: str, student_cfg: CfgNode, add_keys: Optional[Callable[[CfgNode], None]]) -> TeacherConfig:
    teacher = default_config()
    if add_keys is not None:
        add_keys(teacher)
    before = teacher.clone()
    _check_new_keys(merge_config(teacher, path, allow_new=True), before)
    try:
        teacher.merge_from_list(list(student_cfg.MODEL.QMIMIC.TEACHER.OPTS))
    except ValueError as error:
        raise ValueError(describe_mismatch(error)) from error
    teacher.MODEL.DEVICE = student_cfg.MODEL.DEVICE
    teacher.freeze()
    is_quantized = has_quantizer_keys(teacher.MODEL.META_ARCHITECTURE)
    return TeacherConfig(
        path=path,
        build_backbone=lambda: build_backbone(teacher),
        build_proposal_generator=lambda shapes: _build_generator(teacher, shapes),
        weights=teacher.MODEL.WEIGHTS,
        pixel_mean=tuple(teacher.MODEL.PIXEL_MEAN),
        pixel_std=tuple(teacher.MODEL.PIXEL_STD),
        input_format=teacher.INPUT.FORMAT,
        dump=teacher.dump(),
        identity=_identity(teacher),
        codes={name: teacher.MODEL.QMIMIC.QUANTIZER[name] for name in _CODE_KEYS if is_quantized},
    )


def _read_lazy(path: str, student_cfg: CfgNode) -> TeacherConfig:
    teacher = LazyConfig.load(path)
    teacher = LazyConfig.apply_overrides(teacher, list(student_cfg.MODEL.QMIMIC.TEACHER.OPTS))
    model = teacher.model
    return TeacherConfig(
        path=path,
        build_backbone=lambda: instantiate(model.backbone),
        build_proposal_generator=lambda shapes: instantiate(model.get("proposal_generator", None)),
        weights=str(teacher.get("train", {}).get("init_checkpoint", "") or ""),
        pixel_mean=tuple(_numbers(model.pixel_mean)),
        pixel_std=tuple(_numbers(model.pixel_std)),
        input_format=model.get("input_format", None) or "BGR",
        identity=json.dumps(_plain(model)),
    )


def _build_generator(teacher: CfgNode, shapes: Dict[str, ShapeSpec]) -> Optional[nn.Module]:
    # The key's default is RPN, also for one-stage detectors, which have no generator
    family = family_of(detector_name(teacher.MODEL))
    has_one = family is not None and "proposal_generator" in family.heads
    return build_proposal_generator(teacher, shapes) if has_one else None


def _identity(teacher: CfgNode) -> str:
    """The config without what decides on no map: where and how the teacher was trained."""
    rest = teacher.clone()
    rest.defrost()
    for key in ("DATASETS", "DATALOADER", "SOLVER", "TEST", "OUTPUT_DIR", "SEED"):
        rest.pop(key, None)
    for key in ("WEIGHTS", "DEVICE"):
        rest.MODEL.pop(key, None)
    return rest.dump()


def _plain(value: Any) -> Any:
    """A node of a LazyConfig for JSON. An object that shows its address is another one in every process."""
    if isinstance(value, DictConfig):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, ListConfig):
        return [_plain(each) for each in value]
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def _kept_shapes(path: str) -> Optional[Dict[str, ShapeSpec]]:
    try:
        return {str(name): ShapeSpec(channels=int(c), stride=int(s)) for name, c, s in read_json(path)}
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
        return None


def _keep_shapes(path: str, shapes: Dict[str, ShapeSpec]) -> None:
    if all(isinstance(each.stride, int) for each in shapes.values()):
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            write_json(path, [[name, each.channels, each.stride] for name, each in shapes.items()])


def _numbers(values: Sequence[float]) -> List[float]:
    return [float(value) for value in values]


def _check_new_keys(added: Sequence[str], before: CfgNode) -> None:
    """Refuses new keys whose spelling is close to a known key; other new keys belong to another project."""
    likely = {}
    for key in added:
        *sections, name = key.split(".")
        near = near_names(name, functools.reduce(CfgNode.__getitem__, sections, before), count=1, cutoff=0.8)
        if near:
            likely[key] = near[0]
    if likely:
        raise KeyError(f"keys that nothing reads, and that are spelt almost as known ones (key, known one): {likely}")


def _warn_of_other_codes(config: TeacherConfig, student: CfgNode) -> None:
    """Warns if the teacher was trained with other codes than the student's, which are in force."""
    ours = student.MODEL.QMIMIC.QUANTIZER
    differing = {name: (theirs, ours[name]) for name, theirs in config.codes.items() if theirs != ours[name]}
    if differing:
        # once, although the config is read several times
        log_first_n(
            logging.WARNING,
            f"MODEL.QMIMIC.QUANTIZER of the teacher's config {config.path} differs from the student's, which is "
            f"in force (teacher's value, student's value): {differing}",
            name=__name__,
            key="message",
        )
