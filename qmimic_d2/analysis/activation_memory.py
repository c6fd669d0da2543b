"""Peak memory of the activations of one inference, which a device needs in addition to the weights."""

import weakref
from contextlib import contextmanager
from typing import Dict, Iterator, List, Set, Union

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qmimic_d2.analysis.model_cost import PARTS, build_for_measurement, fixed_proposals, most_proposals

__all__ = ["measure_activation_memory"]

TOTAL = "total"


def measure_activation_memory(cfg_or_model: Union[CfgNode, nn.Module], height: int, width: int) -> Dict[str, int]:
    """
    Peak number of bytes in the tensors that an inference makes and still holds, without weights and image.

    It counts the tensors of eager PyTorch, so it is the same on every machine. An optimizing runtime may need less.
    Scratch memory inside an operator does not count. Proposals are fixed as in :func:`measure_cost`.

    Args:
        cfg_or_model: as for :func:`measure_cost`.
        height, width: of the image as it enters the model, in pixels.

    Returns:
        "total", and for each part of the model ("backbone", "proposal_generator", "roi_heads") the peak while it runs,
        with the features that it reads.
    """
    model = build_for_measurement(cfg_or_model) if isinstance(cfg_or_model, CfgNode) else cfg_or_model
    image = torch.full((3, int(height), int(width)), 128.0)
    meter = _Meter([image, *model.parameters(), *model.buffers()])
    with inference_context(model), fixed_proposals(model, most_proposals(model), image), _watched(model, meter), meter:
        model([{"image": image, "height": int(height), "width": int(width)}])
    return {TOTAL: meter.peak, **meter.part_peaks}


class _Meter(TorchDispatchMode):
    """
    Follows the storage of every tensor that an operator returns, until its release.

    Attributes:
        peak: most bytes at a time.
        part_peaks: the same while a part of the model ran.
    """

    def __init__(self, apart: List[Tensor]):
        super().__init__()
        self._apart = {_key(tensor) for tensor in apart}
        self._held: Set[int] = set()
        self._live = 0
        self.peak = self._peak_before = 0
        self.part_peaks: Dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for each in tree_flatten(output)[0]:
            if isinstance(each, Tensor):
                self._follow(each)
        return output

    def _follow(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._held or key in self._apart:
            return
        storage = tensor.untyped_storage()
        self._held.add(key)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._live -= size

    def begin_part(self) -> None:
        """From here on :attr:`peak` is that of a part."""
        self._peak_before, self.peak = self.peak, self._live

    def end_part(self, name: str) -> None:
        """Records the part's peak; :attr:`peak` is again that of the whole model."""
        self.part_peaks[name] = self.peak
        self.peak = max(self._peak_before, self.peak)


@contextmanager
def _watched(model: nn.Module, meter: _Meter) -> Iterator[None]:
    """Within the block the meter knows when each part of the model begins and ends."""
    handles = []
    for name in PARTS:
        module = getattr(model, name, None)
        if module is not None:
            handles.append(module.register_forward_pre_hook(lambda *_: meter.begin_part()))
            handles.append(module.register_forward_hook(lambda *_, name=name: meter.end_part(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
