"""
An account of what a state dict fills in a module, before it fills it.

What counts as no weights: entries that are missing, unknown, of another shape, of a dtype that cannot stand for the
module's, or with NaN and infinite values.
"""

import copy
import hashlib
import logging
from typing import Iterable, List, Mapping, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from qmimic_d2.checkpoint.reader import entries_below, listing, subject

__all__ = [
    "load_audited",
    "log_loaded",
    "non_finite_entries",
    "problems",
    "weights_digest",
    "without_counters",
    "wrong_dtypes",
]

# All that is said of checkpoints goes to one logger.
logger = logging.getLogger("qmimic_d2.checkpoint.checkpointer")

# Floating dtypes whose values are the weights themselves. Smaller ones (float8) are scaled by factors kept elsewhere.
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
            ``prefix`` that the module does not have, a dtype that cannot stand for the module's
            (:func:`wrong_dtypes`), or NaN and infinite values; all listed. The module is then unchanged.
    """
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    entries = entries_below(state, prefix)
    own = module.state_dict()
    shapes = [
        (prefix + name, tuple(entries[name].shape), tuple(own[name].shape))
        for name in sorted(entries)
        if name in own and entries[name].shape != own[name].shape
    ]
    dtypes = [(prefix + name, given, needed) for name, given, needed in wrong_dtypes(entries, own)]
    non_finite = [prefix + name for name in non_finite_entries(entries, own)]
    differing = {name for name, _, _ in shapes + dtypes}
    for name in differing:
        del entries[name[len(prefix) :]]

    # Only load_state_dict knows what modules accept by their own rules: it is asked, and undone if need be.
    before = copy.deepcopy(own)
    try:
        result = module.load_state_dict(entries, strict=False)
    except RuntimeError as error:
        module.load_state_dict(before)
        raise ValueError(f"{subject(key, source)} does not load into {type(module).__name__}.") from error
    missing = [n for n in without_counters(prefix + n for n in result.missing_keys) if n not in differing]
    unexpected = without_counters(prefix + n for n in result.unexpected_keys)
    found = problems(missing, shapes, unexpected, non_finite, dtypes)
    if found:
        module.load_state_dict(before)
        hint = ""
        if not entries and not differing and state:
            hint = f"\n  no name begins with {prefix!r}; names are such as {sorted(state)[:3]}"
        raise ValueError(f"{subject(key, source)} does not fit {type(module).__name__} at {prefix!r}:{hint}{found}")

    own_rule = without_counters(set(own) - set(entries))
    if own_rule:
        logger.warning("Not in %s, left to the modules' own defaults:%s", source, listing(own_rule))
    digest = weights_digest(module)
    log_loaded({n: own[n] for n in without_counters(entries)}, type(module).__name__, source, digest)
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
    for name in without_counters(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"weights_digest takes tensors; {name!r} is a {type(tensor).__name__}.")
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def without_counters(names: Iterable[str]) -> List[str]:
    """Sorted, without BatchNorm's count of batches: not every checkpoint has it, no output needs it."""
    return sorted(name for name in names if name.rpartition(".")[2] != "num_batches_tracked")


def wrong_dtypes(
    entries: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> List[Tuple[str, torch.dtype, torch.dtype]]:
    """
    Entries whose dtype cannot stand for the module's, as (name, in the checkpoint, in the model).

    A floating parameter or buffer takes float16, bfloat16, float32 and float64. Integers would be codes without
    their scale, float8 likewise. An integer or boolean buffer takes integers and booleans; BatchNorm's count of
    batches takes any real number.
    """
    wrong = []
    for name in sorted(set(entries) & set(own)):
        given, needed = entries[name].dtype, own[name].dtype
        if needed.is_floating_point:
            fits = given in _FLOATING or given == needed
        elif needed.is_complex:
            fits = given.is_complex
        else:
            is_counter = not without_counters([name])
            fits = not given.is_complex and (is_counter or not given.is_floating_point)
        if not fits:
            wrong.append((name, given, needed))
    return wrong


def non_finite_entries(entries: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> List[str]:
    """
    Names of entries with NaN or infinite values, in the dtype that the module has for them.

    A value that is not finite in the module either is a constant of its own, such as an attention mask.
    """
    return [name for name in sorted(set(entries) & set(own)) if not _is_sound(entries[name], own[name])]


def _is_sound(given: Tensor, own: Tensor) -> bool:
    if not own.is_floating_point() or given.dtype not in _FLOATING:
        return True
    finite = torch.isfinite(given.to(own.dtype))
    return bool(finite.all()) or (given.shape == own.shape and torch.equal(finite.cpu(), torch.isfinite(own).cpu()))


def problems(
    missing: Sequence[str] = (),
    shapes: Sequence[Tuple[str, Tuple[int, ...], Tuple[int, ...]]] = (),
    unexpected: Sequence[str] = (),
    non_finite: Sequence[str] = (),
    dtypes: Sequence[Tuple[str, torch.dtype, torch.dtype]] = (),
) -> str:
    """
    What does not fit, one paragraph per kind, and what to do about it; "" where all fits.

    Shapes and dtypes are given as (name, in the checkpoint, in the model).
    """

    def differing(items: Sequence[Tuple[str, object, object]]) -> List[str]:
        return [f"{name}: {given} in the checkpoint, {needed} in the model" for name, given, needed in items]

    kinds = (
        ("missing in the checkpoint", missing),
        ("of another shape", differing(shapes)),
        ("of another kind of number", differing(dtypes)),
        ("unknown to the model", unexpected),
        ("with NaN or infinite values", non_finite),
    )
    text = "".join(f"\n  {len(items)} {kind}:{listing(items)}" for kind, items in kinds if items)
    if non_finite:
        advice = (
            "The training that wrote it diverged: give an earlier checkpoint, or train again with a smaller "
            "SOLVER.BASE_LR."
        )
    elif dtypes:
        advice = "Give the weights as floating-point numbers, before they were quantized or converted."
    else:
        advice = "Give the weights of the architecture that the config builds, or correct the config."
    return f"{text}\n{advice}" if text else ""


def log_loaded(filled: Mapping[str, Tensor], model: str, source: str, digest: str) -> None:
    values = sum(tensor.numel() for tensor in filled.values())
    logger.info(
        "Filled %d tensors (%d values) of %s from %s, digest %s", len(filled), values, model, source, digest
    )


