"""One teacher for all students of a run: the training uses the weights that its rehearsal loaded."""

import contextlib
from typing import Any, Callable, Dict, Hashable, Iterator, Optional, Tuple

__all__ = ["forget_teacher", "one_teacher", "shared"]

# Kind of a shared object -> its settings and the object. None outside of one_teacher().
_shared: Optional[Dict[str, Tuple[Hashable, Any]]] = None


@contextlib.contextmanager
def one_teacher() -> Iterator[None]:
    """
    In the block, students of one teacher share its backbone, which never changes; each has its own quantizer.

    The teacher's config is read once, its backbone is built once, and its weights are audited once. Blocks may be
    nested.
    """
    global _shared
    before = _shared
    _shared = {} if before is None else before
    try:
        yield
    finally:
        _shared = before


def forget_teacher() -> None:
    """Frees the shared objects, for a process that trains nothing itself."""
    if _shared:
        _shared.clear()


def shared(kind: str, settings: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or in :func:`one_teacher` what it returned last for this kind and these settings."""
    if _shared is None:
        return make()
    if kind not in _shared or _shared[kind][0] != settings:
        _shared.pop(kind, None)
        _shared[kind] = (settings, make())
    return _shared[kind][1]
