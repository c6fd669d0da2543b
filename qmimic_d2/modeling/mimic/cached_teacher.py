"""
A teacher whose maps are computed once and read afterwards.

The key of a map is a digest of all that decides on it: the teacher's weights and config, the quantizer, the compared
features, and the very pixels that the teacher would see. Any mapper works: where the same pixels come again, the map
is read. A mirrored image has other pixels and a map of its own: the mirrored map is not the map of the mirrored image.

Shape letters:
    T: channels of a teacher's map.
    H, W: height and width, of an image in pixels or of a map in cells.
"""

import hashlib
import json
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from torch import Tensor

from qmimic_d2.modeling.mimic.map_store import MapStore
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher, stack_maps, teacher_feature_names, teacher_weights
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config
from qmimic_d2.modeling.quantizer import CONSTANT_QUANTIZERS, CodeQuantizer, Quantizer, build_quantizer

__all__ = ["CachedTeacher", "Teacher", "build_teacher", "image_key", "teacher_identity"]

# Of the way in which maps are computed and kept.
_VERSION = 1
_PROPOSALS = "proposals"
# The smallest type that holds the codes of a map is the first that does.
_CODE_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
_GIGABYTE = 10**9


def build_teacher(cfg: CfgNode) -> "Teacher":
    """
    The teacher of a student's config, with a cache where TEACHER.CACHE names a folder.

    Raises:
        FileNotFoundError, ValueError: as :class:`FrozenTeacher`; a cached teacher is loaded when an image is new. Or
            the quantizer is not one of this package's, whose codes depend on the image alone.
        OSError: the folder of the cache cannot be made.
    """
    node = cfg.MODEL.QMIMIC
    if not node.TEACHER.CACHE:
        return FrozenTeacher(cfg)
    if not node.TEACHER.CACHE_GB > 0.0:
        raise ValueError(f"MODEL.QMIMIC.TEACHER.CACHE_GB is {node.TEACHER.CACHE_GB}; give a size above 0, such as 10.0")
    quantizer = build_quantizer(cfg) if node.MIMIC.QUANTIZE_TEACHER else None
    if quantizer is not None and type(quantizer) not in CONSTANT_QUANTIZERS:
        raise ValueError(
            f"MODEL.QMIMIC.TEACHER.CACHE is {node.TEACHER.CACHE!r}, and the codes of a {type(quantizer).__name__} may "
            "change during a training. Set it to '', or keep maps in full precision: MIMIC.QUANTIZE_TEACHER False"
        )
    weights = teacher_weights(cfg)
    store = MapStore(node.TEACHER.CACHE, teacher_identity(cfg), int(node.TEACHER.CACHE_GB * _GIGABYTE))
    features = teacher_feature_names(cfg)
    store.describe(
        {
            "config": load_teacher_config(cfg).path,
            "weights": weights,
            "features": list(features),
            "quantizer": str(quantizer) if quantizer else "none",
        }
    )
    return CachedTeacher(
        store=store,
        build=lambda: FrozenTeacher(cfg),
        features=features,
        quantizer=quantizer,
        proposes="teacher_proposals" in node.MIMIC.ROI_SOURCE,
        device=cfg.MODEL.DEVICE,
    )


class CachedTeacher:
    """
    Gives the maps of a :class:`FrozenTeacher`, of each image alone, from a store; no ``nn.Module`` either.

    Where all images are known, neither the teacher's weights nor its modules are loaded. Maps that come from the store
    equal those that went there to the last bit.

    Attributes:
        quantizer: of the maps; None for full precision.
        store: of the maps.
    """

    def __init__(
        self,
        *,
        store: MapStore,
        build: Callable[[], FrozenTeacher],
        features: Sequence[str],
        quantizer: Optional[Quantizer] = None,
        proposes: bool = False,
        device: Union[str, torch.device] = "cpu",
    ):
        """
        Args:
            store: of this teacher's maps, with this quantizer.
            build: loads the teacher.
            features: names of the maps.
            quantizer: that ``build`` gives the teacher.
            proposes: keep the proposals of the teacher's generator as well.
            device: where the maps are wanted.
        """
        self.store, self.quantizer = store, quantizer
        self._build, self._features, self._proposes = build, tuple(features), proposes
        self._device = torch.device(device)
        self._teacher: Optional[FrozenTeacher] = None
        self._last = (0, 0)

    def __deepcopy__(self, memo) -> "CachedTeacher":
        return self

    def __reduce__(self) -> Tuple:
        return type(None), ()

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return self._device

    @property
    def is_loaded(self) -> bool:
        """Whether an image was new, so that the teacher had to be loaded."""
        return self._teacher is not None

    def to(self, device: torch.device) -> "CachedTeacher":
        """Gives further maps there. Returns itself."""
        self._device = torch.device(device)
        if self._teacher is not None:
            self._teacher.to(self._device)
        return self

    @torch.inference_mode()
    def features(self, batched_inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """As :meth:`FrozenTeacher.features`."""
        return self._stacked([self._entry(each) for each in batched_inputs])

    @torch.inference_mode()
    def features_and_proposals(
        self, batched_inputs: List[Dict[str, Tensor]]
    ) -> Tuple[Dict[str, Tensor], List[Boxes]]:
        """As :meth:`FrozenTeacher.features_and_proposals`."""
        if not self._proposes:
            raise ValueError("this CachedTeacher keeps no proposals; build it with proposes=True")
        entries = [self._entry(each) for each in batched_inputs]
        proposals = [Boxes(torch.tensor(each[_PROPOSALS], device=self._device)) for each in entries]
        return self._stacked(entries), proposals

    def scalars(self) -> Dict[str, float]:
        """Share of the images since the last call that were known, for a training's metrics."""
        hits, misses = self.store.hits - self._last[0], self.store.misses - self._last[1]
        self._last = (self.store.hits, self.store.misses)
        return {"qmimic/teacher_cache_hits": hits / (hits + misses)} if hits + misses else {}

    def summary(self) -> str:
        """What the cache did so far, in a sentence."""
        store = self.store
        return (
            f"Teacher cache: {store.hits} of {store.hits + store.misses} images were known; read "
            f"{store.bytes_read / 1e6:.1f} MB, wrote {store.bytes_written / 1e6:.1f} MB"
        )

    def _entry(self, batched_input: Dict[str, Tensor]) -> Dict[str, np.ndarray]:
        key = image_key(batched_input["image"], _precision(self._device))
        entry = self.store.get(key)
        if entry is None:
            entry = self._compute(batched_input)
            self.store.put(key, entry)
        return entry

    def _compute(self, batched_input: Dict[str, Tensor]) -> Dict[str, np.ndarray]:
        if self._teacher is None:
            self._teacher = self._build().to(self._device)
        entry: Dict[str, np.ndarray] = {}
        if self._proposes:
            maps, (boxes,) = self._teacher.features_and_proposals([batched_input])
            entry[_PROPOSALS] = boxes.tensor.cpu().numpy()
        else:
            maps = self._teacher.features([batched_input])
        for name in self._features:
            entry[f"map {name}"] = _array_of(maps[name][0], self.quantizer)
            entry[f"type {name}"] = np.array(str(maps[name].dtype).partition(".")[2])
        return entry

    def _stacked(self, entries: List[Dict[str, np.ndarray]]) -> Dict[str, Tensor]:
        return {
            name: stack_maps([self._map_of(each, name) for each in entries]).to(self._device)
            for name in self._features
        }

    def _map_of(self, entry: Dict[str, np.ndarray], name: str) -> Tensor:
        array, dtype = entry[f"map {name}"], getattr(torch, str(entry[f"type {name}"]))
        if array.dtype.kind == "f":
            return torch.from_numpy(array.copy()).to(dtype)
        codes = torch.from_numpy(array.astype(np.int32))  # torch has few operations for unsigned types
        return self.quantizer.dequantize(codes, dtype)


Teacher = Union[FrozenTeacher, CachedTeacher]


def image_key(image: Tensor, precision: torch.dtype = torch.float32) -> str:
    """
    Digest of an image's pixels, and of the precision in which a backbone would see them.

    Args:
        image: shape (3, H, W).
        precision: of a convolution at present, which autocast lowers.
    """
    context = [str(image.dtype), list(image.shape), str(precision)]
    digest = hashlib.blake2b(json.dumps(context).encode(), digest_size=20)
    digest.update(image.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _precision(device: torch.device) -> torch.dtype:
    one = torch.ones(1, 1, device=device)
    return (one @ one).dtype


def teacher_identity(cfg: CfgNode) -> str:
    """
    Digest of all that decides on the maps of a student's teacher, besides the image: its weights (the bytes of their
    file), its config, the quantizer, the features, the preprocessing, the kind of device, and the versions of torch and
    Detectron2. Code of a backbone that its project changes is not seen: empty the cache then.

    Raises:
        FileNotFoundError, ValueError: the teacher's config or weights are missing.
    """
    node, config = cfg.MODEL.QMIMIC, load_teacher_config(cfg)
    content: List[Any] = [
        _VERSION,
        config.identity,
        _file_digest(teacher_weights(cfg)),
        [list(config.pixel_mean), list(config.pixel_std), config.input_format, cfg.INPUT.FORMAT],
        node.TEACHER.INPUT_SCALE,
        teacher_feature_names(cfg),
        node.QUANTIZER.dump() if node.MIMIC.QUANTIZE_TEACHER else "",
        "teacher_proposals" in node.MIMIC.ROI_SOURCE,
        [torch.device(cfg.MODEL.DEVICE).type, torch.__version__, detectron2.__version__],
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _file_digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=20)
    with open(PathManager.get_local_path(path), "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _array_of(level: Tensor, quantizer: Optional[Quantizer]) -> np.ndarray:
    """A map (T, H, W) as codes of the smallest type that holds them, where these give it back; else as it is."""
    level = level.cpu()
    if isinstance(quantizer, CodeQuantizer):
        try:
            codes = quantizer.codes(level)
        except ValueError:  # NaN, infinite or huge values have no code
            return level.float().numpy()
        if torch.equal(quantizer.dequantize(codes, level.dtype), level):
            low, high = int(codes.min()), int(codes.max())
            for kind in _CODE_TYPES:
                if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                    return codes.numpy().astype(kind)
    return level.float().numpy()
