"""
Detectron2's checkpointer for the student, reading by the rules of :func:`qmimic_d2.checkpoint.reader.read_checkpoint`.

Detectron2's own leaves random weights behind after an empty path or wrong shapes. Here these are errors, raised before
the first iteration.
"""

import logging
import os
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from qmimic_d2.checkpoint.audit import (
    log_loaded,
    non_finite_entries,
    problems,
    weights_digest,
    without_counters,
    wrong_dtypes,
)
from qmimic_d2.checkpoint.reader import (
    UnsafeCheckpointError,
    flat_state,
    local_path,
    read_mapping,
    subject,
)
from qmimic_d2.checkpoint.training_entries import rename_old_entries
from qmimic_d2.files import whole_file, write_text
from qmimic_d2.run_folder import TAG

__all__ = ["DivergedError", "SafeCheckpointer", "check_resumed_state", "tensors_in"]

logger = logging.getLogger(__name__)


class DivergedError(FloatingPointError):
    """A training whose loss, weights or optimizer state are no finite numbers any more."""


class SafeCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer with five differences.

    * Files are read without executing code, by the rules of :func:`read_checkpoint`.
    * A missing file, and one that fills nothing, are errors. Initial weights may fill a part of the model (a
      backbone from ImageNet); resuming and evaluation need all of it.
    * A checkpoint appears under its name, and in ``last_checkpoint``, only once it is completely written and
      has been read back, so one that a kill interrupts is never taken for complete.
    * Weights and optimizer state with NaN or infinite values are neither written nor read.
    * Names of other projects are converted on the fly, and names that only training has can be ignored.

    Attributes:
        name_converters: each takes a flat state dict and returns it with names as in the bare backbone
            modules, or None if it does not know the names. The first that answers counts, and Detectron2's
            suffix matching then finds where in the model they belong.
        ignored_prefixes: entries that begin with one of these are dropped silently when the model does not
            have them, e.g. ``("mimic.",)``: a model built for evaluation has no adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: Optional[bool] = None,
        name_converters: Sequence[Callable[[Dict[str, Tensor]], Optional[Dict[str, Tensor]]]] = (),
        ignored_prefixes: Sequence[str] = (),
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.name_converters = tuple(name_converters)
        self.ignored_prefixes = tuple(ignored_prefixes)
        # A constant of the model's own may be infinite, such as an attention mask.
        self._constants = set(_broken_tensors(self.model.state_dict()))
        self._complete = False
        self._key = ""

    def load(
        self,
        path: str,
        checkpointables: Optional[List[str]] = None,
        *,
        complete: bool = False,
        key: str = "MODEL.WEIGHTS",
    ) -> Dict[str, Any]:
        """
        As ``fvcore.common.checkpoint.Checkpointer.load``; an empty path leaves the model as it is.

        Args:
            complete: every parameter and buffer of the model must be filled; an empty path is an error.
            key: the config key that ``path`` came from, for error messages.

        Raises:
            FileNotFoundError, UnsafeCheckpointError: as :func:`read_checkpoint`.
            ValueError: likewise; also if the file fills nothing or, with ``complete``, not everything, or if it
                has NaN or infinite values or another kind of number. The model is then as it was, or filled in
                part where only ``complete`` was not met.
        """
        if path or complete:
            local_path(urlparse(path)._replace(query="").geturl(), key)
        self._complete, self._key = complete, key
        try:
            return super().load(path, checkpointables)
        finally:
            self._complete, self._key = False, ""
            # Detectron2 leaves it set after an error, and refuses the next load.
            self._parsed_url_during_load = None

    def load_for_evaluation(self, path: str, key: str = "MODEL.WEIGHTS") -> Dict[str, Any]:
        """:meth:`load` of the model alone, which the file must fill completely."""
        return self.load(path, checkpointables=[], complete=True, key=key)

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """
        As fvcore's; a checkpoint that is resumed from must fill the whole model and hold every checkpointable.

        Raises:
            ValueError: as :meth:`load` and :meth:`get_checkpoint_file`; or the checkpoint holds weights alone.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        tag, last = self._tag(), self.get_checkpoint_file()
        if self.checkpointables:
            check_resumed_state(read_mapping(local_path(last, tag), last, tag), self.checkpointables, last, tag)
        return self.load(last, complete=True, key=tag)

    def get_checkpoint_file(self) -> str:
        """
        As fvcore's.

        Raises:
            ValueError: ``last_checkpoint`` is empty or holds no name of a file in its folder.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file()
        if not os.path.exists(self._tag()):
            return ""
        name = ""
        with suppress(OSError, UnicodeDecodeError), open(self._tag(), encoding="utf-8") as file:
            name = file.read(4096).strip()
        if not name or name != os.path.basename(name) or not name.isprintable():
            known = sorted(each for each in os.listdir(self.save_dir) if each.endswith(".pth"))
            raise ValueError(
                f"{self._tag()!r} holds {name!r}, and should hold the name of the checkpoint to resume from. Write one "
                f"of {known} into it, or start without --resume in another OUTPUT_DIR."
            )
        return os.path.join(self.save_dir, name)

    def _tag(self) -> str:
        return os.path.join(self.save_dir, TAG)

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As fvcore's, and atomic in a local folder; an address (``scheme://``) is left to its path handler.

        Raises:
            DivergedError: the model or a checkpointable has NaN or infinite values. Nothing was written, and
                ``last_checkpoint`` names the last finite checkpoint.
            ValueError: ``name`` holds a folder, or a state holds objects that could not be read back safely.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        basename = f"{name}.pth"
        target = os.path.join(self.save_dir, basename)
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()})
        data.update(kwargs)
        self._check_finite(data, target)
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        if os.path.basename(target) != basename:
            raise ValueError(f"A checkpoint's name cannot hold a folder, got {name!r}; set save_dir instead.")
        logger.info("Saving checkpoint to %s", target)
        with whole_file(target, keeps_ending=False) as partial:
            with open(partial, "wb") as file:
                torch.save(data, file)
            try:
                read_mapping(partial, target, "")
            except UnsafeCheckpointError as error:
                raise ValueError(
                    f"{target} was not written, as it could not be resumed from: {error} Let state_dict() of "
                    "hooks and schedulers return numbers, strings, lists, dicts and tensors only."
                ) from error
        self.tag_last_checkpoint(basename)

    def _check_finite(self, data: Mapping[str, Any], target: str) -> None:
        broken = [name for name in _broken_tensors(data["model"]) if name not in self._constants]
        broken += _broken_tensors({**data, "model": {}})
        if broken:
            raise DivergedError(
                f"{target} is not written: the training has diverged, and {len(broken)} of its tensors have NaN or "
                f"infinite values, {', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''}. {self.advice()}"
            )

    def advice(self) -> str:
        """What to do after a divergence: the last finite checkpoint, and how to go on from it."""
        settings = "a smaller SOLVER.BASE_LR or with SOLVER.CLIP_GRADIENTS.ENABLED True"
        if self.save_dir and self.has_checkpoint():
            return (
                f"The last finite checkpoint is {self.get_checkpoint_file()!r}: go on with --resume and {settings}. "
                f"Where that diverges again, write the name of an earlier one into {self._tag()!r}"
            )
        return f"There is no earlier checkpoint: train again with {settings}"

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As fvcore's, and atomic in a local folder."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_text(self._tag(), last_filename_basename)

    def _torch_load(self, f: str) -> Dict[str, Any]:
        content = dict(read_mapping(f, f, self._key))
        if "model" not in content and isinstance(content.get("state_dict"), Mapping):
            content["model"] = content.pop("state_dict")
        return content

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            # Detectron2 reads these two itself, executing what they say.
            checkpoint = _zoo_layout(self._torch_load(filename))
        else:
            checkpoint = super()._load_file(filename)
        state = flat_state(checkpoint["model"], filename, self._key)
        for convert in self.name_converters:
            converted = convert(state)
            if converted is not None:
                state = converted
                checkpoint["matching_heuristics"] = True
                break
        checkpoint["model"] = state
        return checkpoint

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        own = self.model.state_dict()
        state = checkpoint["model"]
        rename_old_entries(state)
        for name in [n for n in state if n.startswith(self.ignored_prefixes) and n not in own]:
            del state[name]
        if checkpoint.pop("matching_heuristics", False):  # as Detectron2 would do below, after the audit
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            state = checkpoint["model"] = align_and_update_state_dicts(own, state, c2_conversion=is_caffe2)
        source = self._parsed_url_during_load.geturl()
        # values that would fill the model and make nothing of it
        found = problems(non_finite=non_finite_entries(state, own), dtypes=wrong_dtypes(state, own))
        if found:
            raise ValueError(f"{subject(self._key, source)} cannot fill {type(self.model).__name__}:{found}")
        incompatible = super()._load_model(checkpoint)

        shapes = incompatible.incorrect_shapes
        differing = {name for name, _, _ in shapes}
        missing = without_counters(set(incompatible.missing_keys) - differing)
        filled = without_counters(set(own) - differing - set(missing))
        # FrozenBatchNorm2d fills its statistics itself when a file has none, so they do not show a match.
        fills_nothing = all(name.endswith(("running_mean", "running_var")) for name in filled)
        if fills_nothing or (self._complete and (missing or shapes)):
            extent = "nothing" if fills_nothing else "only a part"
            raise ValueError(
                f"{subject(self._key, source)} fills {extent} of {type(self.model).__name__}:"
                f"{problems(missing, shapes, without_counters(incompatible.unexpected_keys))}"
            )
        log_loaded(
            {n: own[n] for n in filled}, type(self.model).__name__, source, weights_digest(self.model)
        )
        return incompatible


def check_resumed_state(content: Mapping[str, Any], parts: Iterable[str], path: str, key: str) -> None:
    """
    What a training resumes besides the model: it must be there, and finite.

    Args:
        content: of the checkpoint.
        parts: its entries that are resumed, such as "trainer".
        path, key: of the checkpoint, for error messages.

    Raises:
        ValueError: a part is missing, or a tensor in it has NaN or infinite values.
    """
    missing = sorted(part for part in parts if not isinstance(content.get(part), Mapping))
    if missing:
        raise ValueError(
            f"{subject(key, path)} holds weights without the state of a training ({', '.join(missing)}: optimizer, "
            "schedule, iteration), so nothing can be resumed from it. Begin a training from these weights, without "
            f"--resume: MODEL.WEIGHTS {path!r} and another OUTPUT_DIR."
        )
    broken = _broken_tensors({part: content[part] for part in parts})
    if broken:
        raise ValueError(f"{subject(key, path)} cannot be resumed from:{problems(non_finite=broken)}")


def tensors_in(content: Any, name: str = "") -> Iterator[Tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, with the path to it."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, (Mapping, list, tuple)):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def _broken_tensors(content: Any) -> List[str]:
    """Names of the tensors with NaN or infinite values."""
    return [
        name
        for name, tensor in tensors_in(content)
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all()
    ]


def _zoo_layout(content: Dict[str, Any]) -> Dict[str, Any]:
    """
    A ``.pkl`` or ``.pyth`` file's content as the dict that Detectron2's checkpointer works on.

    The same cases as ``DetectionCheckpointer._load_file`` of Detectron2 v0.6 tells apart.
    """
    if "model" in content:
        return content
    if "model_state" in content:  # pycls
        return {"model": content["model_state"], "matching_heuristics": True}
    if any(isinstance(value, Tensor) for value in content.values()):
        return {"model": content}
    blobs = content.get("blobs", content)  # Caffe2: detectors have "blobs", ImageNet models do not
    blobs = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
