"""
Checkpoints, and an account of what they filled.

* :func:`read_checkpoint`: a file, or an address that Detectron2 resolves, becomes a flat state dict,
  and no code in it is executed.
* :func:`load_audited`: a state dict fills one module completely, or an error lists what does not fit
  and the module stays as it was. The teacher's backbone is loaded this way.
* :class:`SafeCheckpointer`: Detectron2's checkpointer for the student, reading by the same rules.

Detectron2's own checkpointer leaves random weights behind after an empty path or wrong shapes; a random
teacher then trains a student quietly. Here these are errors, raised before the first iteration.
"""

import copy
import hashlib
import logging
import os
from contextlib import contextmanager, suppress
from typing import (
    IO,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from qmimic_d2.checkpoint_reader import (
    UnsafeCheckpointError,
    entries_below,
    flat_state,
    listing,
    local_path,
    read_checkpoint,
    read_mapping,
    subject,
)

__all__ = [
    "SafeCheckpointer",
    "UnsafeCheckpointError",
    "load_audited",
    "read_checkpoint",
    "weights_digest",
]

logger = logging.getLogger(__name__)


def load_audited(
    module: nn.Module, state: Mapping[str, Tensor], *, prefix: str, source: str, key: str = ""
) -> str:
    """
    Fill ``module`` from the entries of ``state`` below ``prefix``: completely, or not at all.

    ``num_batches_tracked`` may be absent or extra: it is a counter that no output depends on. What a module
    fills by its own rule (Detectron2's ``FrozenBatchNorm2d`` takes the identity for statistics that old
    files lack) is accepted with a warning that lists it.

    Args:
        module: e.g. the teacher's backbone.
        state: the whole model's entries, see :func:`read_checkpoint`.
        prefix: where the module stands in that model, e.g. ``"backbone."``; ``""`` for the model itself.
        source: where ``state`` came from, for the log and for error messages.
        key: the config key that names the source, for error messages.

    Returns:
        :func:`weights_digest` of the module as loaded. One INFO line gives it with the source and counts.

    Raises:
        ValueError: parameters or buffers that ``state`` does not fill, shapes that differ, entries below
            ``prefix`` that the module does not have, or NaN and infinite values; all listed. The module is
            then unchanged.
    """
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    entries = entries_below(state, prefix)
    own = module.state_dict()
    shapes = [
        (prefix + name, tuple(entries[name].shape), tuple(own[name].shape))
        for name in sorted(entries)
        if name in own and entries[name].shape != own[name].shape
    ]
    non_finite = [
        prefix + name
        for name, tensor in sorted(entries.items())
        if name in own and tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    for name, _, _ in shapes:
        del entries[name[len(prefix) :]]

    # Only load_state_dict knows what modules accept by their own rules: it is asked, and undone if need be.
    before = copy.deepcopy(own)
    try:
        result = module.load_state_dict(entries, strict=False)
    except RuntimeError as error:
        module.load_state_dict(before)
        raise ValueError(f"{subject(key, source)} does not load into {type(module).__name__}.") from error
    differing = {name for name, _, _ in shapes}
    missing = [n for n in _without_counters(prefix + n for n in result.missing_keys) if n not in differing]
    unexpected = _without_counters(prefix + n for n in result.unexpected_keys)
    problems = _problems(missing, shapes, unexpected, non_finite)
    if problems:
        module.load_state_dict(before)
        if not entries and not shapes and state:
            problems += f"\n  no name begins with {prefix!r}; names are such as {sorted(state)[:3]}"
        raise ValueError(
            f"{subject(key, source)} does not fit {type(module).__name__} at {prefix!r}:{problems}\n"
            "Give the weights of the architecture that the config builds, or correct the config."
        )

    own_rule = _without_counters(set(own) - set(entries))
    if own_rule:
        logger.warning("Not in %s, left to the modules' own defaults:%s", source, listing(own_rule))
    digest = weights_digest(module)
    _log_loaded({n: own[n] for n in _without_counters(entries)}, type(module).__name__, source, digest)
    return digest


def weights_digest(weights: Union[nn.Module, Mapping[str, Tensor]]) -> str:
    """
    The first 12 hexadecimal digits of a sha256 over names (sorted), dtypes, shapes and bytes.

    It depends on neither device, memory layout nor the order of entries. ``num_batches_tracked`` does not
    count: checkpoints of one and the same model have it or not.

    Args:
        weights: a state dict, or a module, whose ``state_dict()`` is taken.

    Raises:
        ValueError: an entry is not a tensor.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in _without_counters(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"weights_digest takes tensors; {name!r} is a {type(tensor).__name__}.")
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


class SafeCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer with four differences.

    * Files are read without executing code, by the rules of :func:`read_checkpoint`.
    * A missing file, and one that fills nothing, are errors. Initial weights may fill a part of the model (a
      backbone from ImageNet); resuming and evaluation need all of it.
    * A checkpoint appears under its name, and in ``last_checkpoint``, only once it is completely written and
      has been read back, so one that a kill interrupts is never taken for complete.
    * Names of other projects are converted on the fly, and names that only training has can be ignored.

    Attributes:
        name_converters: each takes a flat state dict and returns it with names as in the bare backbone
            modules, or None if it does not know the names. The first that answers counts, and Detectron2's
            suffix matching then finds where in the model they belong.
        ignored_prefixes: entries that begin with one of these are dropped silently when the model does not
            have them, e.g. ``("mimic_loss.",)``: a model built for evaluation has no adapter.
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
            ValueError: likewise; also if the file fills nothing or, with ``complete``, not everything. The
                model may then be filled in part.
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
        """As fvcore's; a checkpoint that is resumed from must fill the whole model."""
        if resume and self.has_checkpoint():
            tag = os.path.join(self.save_dir, "last_checkpoint")
            return self.load(self.get_checkpoint_file(), complete=True, key=tag)
        return self.load(path, checkpointables=[])

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As fvcore's, and atomic in a local folder; an address (``scheme://``) is left to its path handler.

        Raises:
            ValueError: ``name`` holds a folder, or a state holds objects that could not be read back safely.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        basename = f"{name}.pth"
        target = os.path.join(self.save_dir, basename)
        if os.path.basename(target) != basename:
            raise ValueError(f"A checkpoint's name cannot hold a folder, got {name!r}; set save_dir instead.")
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()})
        data.update(kwargs)
        logger.info("Saving checkpoint to %s", target)
        with _replacing(target, "wb") as file:
            torch.save(data, file)
            file.flush()
            try:
                read_mapping(file.name, target, "")
            except UnsafeCheckpointError as error:
                raise ValueError(
                    f"{target} was not written, as it could not be resumed from: {error} Let state_dict() of "
                    "hooks and schedulers return numbers, strings, lists, dicts and tensors only."
                ) from error
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As fvcore's, and atomic in a local folder."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with _replacing(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

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
        for name in [n for n in state if n.startswith(self.ignored_prefixes) and n not in own]:
            del state[name]
        incompatible = super()._load_model(checkpoint)

        source = self._parsed_url_during_load.geturl()
        shapes = incompatible.incorrect_shapes
        differing = {name for name, _, _ in shapes}
        missing = _without_counters(set(incompatible.missing_keys) - differing)
        filled = _without_counters(set(own) - differing - set(missing))
        # FrozenBatchNorm2d fills its statistics itself when a file has none, so they do not show a match.
        fills_nothing = all(name.endswith(("running_mean", "running_var")) for name in filled)
        if fills_nothing or (self._complete and (missing or shapes)):
            extent = "nothing" if fills_nothing else "only a part"
            raise ValueError(
                f"{subject(self._key, source)} fills {extent} of {type(self.model).__name__}:"
                f"{_problems(missing, shapes, _without_counters(incompatible.unexpected_keys), [])}\n"
                "Give the weights of the architecture that the config builds, or correct the config."
            )
        _log_loaded(
            {n: own[n] for n in filled}, type(self.model).__name__, source, weights_digest(self.model)
        )
        return incompatible


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


def _without_counters(names: Iterable[str]) -> List[str]:
    """Sorted, without BatchNorm's count of batches: not every checkpoint has it, no output needs it."""
    return sorted(name for name in names if name.rpartition(".")[2] != "num_batches_tracked")


def _problems(
    missing: Sequence[str],
    shapes: Sequence[Tuple[str, Tuple[int, ...], Tuple[int, ...]]],
    unexpected: Sequence[str],
    non_finite: Sequence[str],
) -> str:
    """What does not fit, one paragraph per kind; ``shapes`` as (name, in the checkpoint, in the model)."""
    differing = [
        f"{name}: {given} in the checkpoint, {needed} in the model" for name, given, needed in shapes
    ]
    kinds = (
        ("missing in the checkpoint", missing),
        ("of another shape", differing),
        ("unknown to the model", unexpected),
        ("with NaN or infinite values", non_finite),
    )
    return "".join(f"\n  {len(items)} {kind}:{listing(items)}" for kind, items in kinds if items)


def _log_loaded(filled: Mapping[str, Tensor], model: str, source: str, digest: str) -> None:
    values = sum(tensor.numel() for tensor in filled.values())
    logger.info(
        "Filled %d tensors (%d values) of %s from %s, digest %s", len(filled), values, model, source, digest
    )


@contextmanager
def _replacing(target: str, mode: str) -> Iterator[IO[Any]]:
    """A file that replaces ``target`` when the block ends; a block that raises leaves ``target`` alone."""
    partial = target + ".partial"  # does not end in .pth, so a leftover is never listed as a checkpoint
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(partial)
        raise
