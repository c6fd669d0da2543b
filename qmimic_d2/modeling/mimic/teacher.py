"""
The frozen teacher.

Shape letters:
    N: number of images.
    T: channels of a teacher's map.
    H, W: height and width, of an image in pixels or of a map in cells.
"""

import logging
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from qmimic_d2.checkpoint import load_audited, read_checkpoint
from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.mimic.sharing import shared
from qmimic_d2.modeling.mimic.step_record import check_maps
from qmimic_d2.modeling.mimic.teacher_config import TeacherConfig, load_teacher_config
from qmimic_d2.modeling.quantizer import Quantizer, build_quantizer
from qmimic_d2.modeling.quantizer_hook import check_features, warn_of_lost_signs

__all__ = [
    "FrozenTeacher",
    "load_teacher_modules",
    "stack_maps",
    "teacher_feature_names",
    "teacher_shapes",
    "teacher_weights",
]

logger = logging.getLogger(__name__)

_WEIGHTS_KEY = "MODEL.QMIMIC.TEACHER.WEIGHTS"


class FrozenTeacher:
    """
    The backbone of a trained detector, which gives features and never changes.

    It is no ``nn.Module``. A model that has it as an attribute therefore does not have it in its parameters,
    ``state_dict``, optimizer, DDP buckets or ``train()``. ``copy.deepcopy`` of the model (a moving average of the
    student, for example) shares the teacher. ``torch.save(model)`` writes None in its place: the next training builds
    the teacher again.

    ``FrozenTeacher(cfg)``, with a student's config, loads the weights and audits them; in
    :func:`qmimic_d2.modeling.mimic.sharing.one_teacher` once. The explicit arguments are for a backbone that is loaded
    already.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        features: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
        student_input_format: str,
        input_scale: float = 1.0,
        quantizer: Optional[Quantizer] = None,
        proposal_generator: Optional[nn.Module] = None,
        digest: str = "",
        source: str = "",
    ):
        """
        Args:
            backbone: the teacher's backbone with its trained weights.
            features: names of the maps that it gives, among ``backbone.output_shape()``.
            pixel_mean, pixel_std: the teacher's own, one number per channel.
            input_format: the teacher's channel order, "BGR" or "RGB" (others must equal the student's).
            student_input_format: channel order of the images that it gets.
            input_scale: factor that enlarges these images first.
            quantizer: of the named features; None for full precision.
            proposal_generator: with its trained weights; it reads the quantized maps. None: no proposals.
            digest, source: of the loaded weights, for messages.

        Raises:
            ValueError: an unknown feature, an input scale that is not positive, or different channel orders other than
                BGR and RGB.
        """
        _check_input_scale(input_scale)
        key = "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES"
        check_features(features, backbone.output_shape(), key)
        if quantizer is not None:
            warn_of_lost_signs(backbone, quantizer, features)
        self._flip_channels = _needs_flip(student_input_format, input_format)
        self._backbone = backbone.eval().requires_grad_(False)
        self._features = tuple(features)
        self.quantizer = quantizer
        self._proposal_generator = proposal_generator
        if proposal_generator is not None:
            proposal_generator.eval().requires_grad_(False)
        self._input_scale = float(input_scale)
        self.digest, self.source = digest, source
        self._device = next(backbone.parameters()).device
        column = (-1, 1, 1)
        numbers = {"dtype": torch.float32, "device": self._device}
        self._pixel_mean = torch.tensor(pixel_mean, **numbers).view(column)
        self._pixel_std = torch.tensor(pixel_std, **numbers).view(column)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        config, node = load_teacher_config(cfg), cfg.MODEL.QMIMIC
        proposes = "teacher_proposals" in node.MIMIC.ROI_SOURCE
        is_new = []
        settings = (node.TEACHER.dump(), proposes)
        loaded = shared("teacher", settings, lambda: is_new.append(True) or _load(cfg, config, proposes))
        if not is_new:
            logger.info("The weights of %s, digest %s, were audited before the run", loaded["source"], loaded["digest"])
        # a rehearsal computes on the CPU, whatever the training does
        for module in (loaded["backbone"], loaded["proposal_generator"]):
            if module is not None:
                module.to(cfg.MODEL.DEVICE)
        return {
            **loaded,
            "features": teacher_feature_names(cfg),
            "pixel_mean": config.pixel_mean,
            "pixel_std": config.pixel_std,
            "input_format": config.input_format,
            "student_input_format": cfg.INPUT.FORMAT,
            "input_scale": node.TEACHER.INPUT_SCALE,
            "quantizer": build_quantizer(cfg) if node.MIMIC.QUANTIZE_TEACHER else None,
        }

    def __deepcopy__(self, memo) -> "FrozenTeacher":
        return self

    def __reduce__(self) -> Tuple:
        return type(None), ()

    @property
    def device(self) -> torch.device:
        """Where the teacher computes."""
        return self._device

    def to(self, device: torch.device) -> "FrozenTeacher":
        """Moves the teacher; its dtype stays. Returns itself."""
        device = torch.device(device)
        if device != self._device:
            self._backbone.to(device)
            if self._proposal_generator is not None:
                self._proposal_generator.to(device)
            self._pixel_mean = self._pixel_mean.to(device)
            self._pixel_std = self._pixel_std.to(device)
            self._device = device
        return self

    def scalars(self) -> Dict[str, float]:
        """For a training's metrics: a teacher that computes has none."""
        return {}

    @torch.inference_mode()
    def features(self, batched_inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """
        The teacher's (quantized) maps of the student's images.

        Each image is padded to the teacher's own size divisibility and not to the size of other images, so that its
        features do not depend on the rest of the batch.

        Args:
            batched_inputs: N dicts as Detectron2's ``DatasetMapper`` makes them; "image" has shape
                (3, H, W) and values 0 to 255.

        Returns:
            Maps of shape (N, T, H', W') by name, inference tensors. Smaller maps repeat their last column and row, as
            ROIAlign does.

        Raises:
            ValueError: the backbone gives another number of maps than of images.
        """
        return self._maps_and_proposals(batched_inputs, proposes=False)[0]

    @torch.inference_mode()
    def features_and_proposals(
        self, batched_inputs: List[Dict[str, Tensor]]
    ) -> Tuple[Dict[str, Tensor], List[Boxes]]:
        """
        As :meth:`features`, with the proposals of the teacher's own generator at inference.

        Returns:
            The maps, and N Boxes in pixels of the student's input image, by falling score.

        Raises:
            ValueError: the teacher was built without a proposal generator.
        """
        if self._proposal_generator is None:
            raise ValueError("this FrozenTeacher has no proposal_generator; give it one")
        maps, proposals = self._maps_and_proposals(batched_inputs, proposes=True)
        for boxes, each in zip(proposals, batched_inputs):
            boxes.clip(tuple(each["image"].shape[-2:]))
        return maps, proposals

    def _maps_and_proposals(
        self, batched_inputs: List[Dict[str, Tensor]], proposes: bool
    ) -> Tuple[Dict[str, Tensor], List[Boxes]]:
        """Images of one size go through the backbone in one batch. The boxes may reach out of the images."""
        images = [self._preprocess(each["image"]) for each in batched_inputs]
        groups: Dict[Tuple[int, ...], List[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(index)
        proposals: List[Boxes] = [Boxes(torch.zeros(0, 4))] * len(images)
        maps_of_image: List[Dict[str, Tensor]] = [{} for _ in images]
        for shape, members in groups.items():
            batch = torch.stack([images[index] for index in members])
            maps = self._backbone(batch)
            if self.quantizer is not None:
                maps = {**maps, **{name: self.quantizer(maps[name]) for name in self._features}}
            named = {name: maps[name] for name in self._features}
            check_maps({"teacher": named}, len(members))
            if proposes:
                found, _ = self._proposal_generator(ImageList(batch, [shape[-2:]] * len(members)), maps, None)
                for index, each in zip(members, found):
                    proposals[index] = Boxes(each.proposal_boxes.tensor / self._input_scale)
            if len(groups) == 1:
                return named, proposals
            for position, index in enumerate(members):
                maps_of_image[index] = {name: level[position] for name, level in named.items()}
        return {name: stack_maps([maps[name] for maps in maps_of_image]) for name in self._features}, proposals

    def _preprocess(self, image: Tensor) -> Tensor:
        """Shape (3, H, W) of the student's input to (3, H', W') of the teacher's."""
        image = image.to(self._device, torch.float32, non_blocking=True)
        if self._flip_channels:
            image = image.flip(0)
        if self._input_scale != 1.0:
            size = [max(1, round(length * self._input_scale)) for length in image.shape[-2:]]
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        image = (image - self._pixel_mean) / self._pixel_std
        return ImageList.from_tensors(
            [image],
            self._backbone.size_divisibility,
            padding_constraints=self._backbone.padding_constraints,
        ).tensor[0]


def load_teacher_modules(cfg: CfgNode, modules: Dict[str, nn.Module]) -> None:
    """
    Fills modules of the student completely from the teacher's modules of the same names.

    Args:
        cfg: the student's, which names the teacher.
        modules: for example ``{"roi_heads": student.roi_heads}``.

    Raises:
        FileNotFoundError, ValueError: the teacher's weights are missing or do not fit; lists what differs.
    """
    config = load_teacher_config(cfg)
    weights, key = _weights_and_key(cfg, config)
    state = read_checkpoint(weights, key=key)
    source = f"{weights} (teacher of {config.path}, for INIT_HEADS_FROM_TEACHER)"
    for name, module in modules.items():
        load_audited(module, state, prefix=f"{name}.", source=source, key=key)


def teacher_feature_names(cfg: CfgNode) -> Tuple[str, ...]:
    """Names of the teacher's compared maps, in the order of the student's."""
    node = cfg.MODEL.QMIMIC.MIMIC
    return tuple(node.TEACHER_IN_FEATURES or node.IN_FEATURES or head_features(cfg))


def teacher_shapes(cfg: CfgNode) -> Dict[str, ShapeSpec]:
    """
    Channels and stride of the teacher's compared maps, from its config alone.

    Returns:
        By name, in order; strides in pixels of the student's input image.

    Raises:
        FileNotFoundError, ValueError: the teacher's config is missing, or it has no such feature.
    """
    scale = cfg.MODEL.QMIMIC.TEACHER.INPUT_SCALE
    _check_input_scale(scale)
    shapes = load_teacher_config(cfg).shapes()
    names = teacher_feature_names(cfg)
    key = "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES"
    if not cfg.MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES:
        key += " is [], for the student's own names, so it"
    check_features(names, shapes, key, of="the teacher's backbone")
    return {name: ShapeSpec(channels=shapes[name].channels, stride=shapes[name].stride / scale) for name in names}


def teacher_weights(cfg: CfgNode) -> str:
    """Path or address of the weights of a student's teacher."""
    return _weights_and_key(cfg, load_teacher_config(cfg))[0]


def _load(cfg: CfgNode, config: TeacherConfig, proposes: bool) -> Dict[str, Any]:
    """Arguments of :class:`FrozenTeacher`: its modules with their weights, and where these are from."""
    weights, key = _weights_and_key(cfg, config)
    state = read_checkpoint(weights, key=key)
    backbone = config.take_backbone()
    source = f"{weights} (teacher of {config.path})"
    digest = load_audited(backbone, state, prefix="backbone.", source=source, key=key)
    proposal_generator = None
    if proposes:
        proposal_generator = _build_proposal_generator(config, backbone)
        source = f"{weights} (teacher of {config.path}, whose proposals ROI_SOURCE asks for)"
        load_audited(proposal_generator, state, prefix="proposal_generator.", source=source, key=key)
    return {"backbone": backbone, "proposal_generator": proposal_generator, "digest": digest, "source": source}


def _weights_and_key(cfg: CfgNode, config: TeacherConfig) -> Tuple[str, str]:
    """Path of the teacher's weights, and the key that names it."""
    if cfg.MODEL.QMIMIC.TEACHER.WEIGHTS:
        return cfg.MODEL.QMIMIC.TEACHER.WEIGHTS, _WEIGHTS_KEY
    return config.weights, f"{_WEIGHTS_KEY} is '' and MODEL.WEIGHTS of {config.path}"


def _build_proposal_generator(config: TeacherConfig, backbone: Backbone) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        try:
            generator = config.build_proposal_generator(backbone.output_shape())
        except Exception as error:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.ROI_SOURCE asks for the teacher's proposals, but the proposal generator of "
                f"{config.path!r} cannot be built: {type(error).__name__}: {error}. Choose another ROI_SOURCE"
            ) from error
    if generator is None:
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.ROI_SOURCE asks for the teacher's proposals, but the detector of {config.path!r} has "
            'no proposal generator; use "ground_truth" or "neighbourhood"'
        )
    return generator


def _check_input_scale(input_scale: float) -> None:
    if not (math.isfinite(input_scale) and input_scale > 0.0):
        raise ValueError(
            f"MODEL.QMIMIC.TEACHER.INPUT_SCALE is {input_scale!r}; give a positive finite factor, 1.0 "
            "for the student's own image"
        )


def _needs_flip(student_format: str, teacher_format: str) -> bool:
    if student_format == teacher_format:
        return False
    if sorted([student_format, teacher_format]) == ["BGR", "RGB"]:
        return True
    raise ValueError(
        f"INPUT.FORMAT is {student_format!r} for the student and {teacher_format!r} for the teacher; only "
        "BGR and RGB can be turned into each other. Train one of the two with the other's format"
    )


def stack_maps(maps: List[Tensor]) -> Tensor:
    """N maps (T, H', W') as one (N, T, H', W'); smaller ones repeat their last column and row."""
    height = max(each.shape[-2] for each in maps)
    width = max(each.shape[-1] for each in maps)
    padding = [(0, width - each.shape[-1], 0, height - each.shape[-2]) for each in maps]
    padded = [F.pad(each[None], pad, mode="replicate")[0] if any(pad) else each for each, pad in zip(maps, padding)]
    return torch.stack(padded)


