"""The adapter as a part of the student: the heads read r(f_s), which has the teacher's channels."""

from typing import Dict, List

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from qmimic_d2.checkpoint import read_checkpoint
from qmimic_d2.config_files import changed
from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.mimic.adapter import build_adapter
from qmimic_d2.modeling.mimic.teacher import teacher_shapes
from qmimic_d2.modeling.mimic.teacher_config import TeacherConfigError
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.run_folder import CONFIG

__all__ = [
    "PLACEMENTS",
    "TrunkAdapter",
    "build_trunk_adapter",
    "check_proposal_levels",
    "is_in_trunk",
    "trained_trunk_channels",
    "trunk_channels",
    "without_teacher",
]

# Values of MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT.
PLACEMENTS = ("branch", "trunk")


class TrunkAdapter(Backbone):
    """
    A backbone with an adapter on each of the named maps.

    In a branch, the adapter is dropped after training, and the heads read f_s. In the trunk, the heads read r(f_s), in
    training and in inference. The heads then have the teacher's input channels and may start from the teacher's
    weights.

    As in Detectron2's FPN, the network below is ``bottom_up``.

    Args:
        bottom_up: the student's network.
        channels: width of each adapted map after its adapter, by name; other maps stay as they are.
        kind: of the adapters, "conv1x1" or "conv1x1_relu".

    Raises:
        ValueError: the kind is "" (no adapter), or unknown.
    """

    def __init__(self, bottom_up: Backbone, channels: Dict[str, int], kind: str):
        super().__init__()
        if not kind:
            raise ValueError(
                "MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT is 'trunk' and MIMIC.ADAPTER is ''; set ADAPTER to "
                "'conv1x1_relu' (or 'conv1x1')"
            )
        self.bottom_up = bottom_up
        self._shapes = bottom_up.output_shape()
        self.adapters = nn.ModuleDict()
        for name, width in channels.items():
            shape = self._shapes[name]
            self.adapters[name] = build_adapter(kind, shape.channels, width)
            self._shapes[name] = ShapeSpec(channels=width, stride=shape.stride)

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return self.bottom_up.padding_constraints

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Images (N, 3, H, W) to maps (N, C, H', W') by name."""
        return {
            name: self.adapters[name](feature) if name in self.adapters else feature
            for name, feature in self.bottom_up(x).items()
        }


def is_in_trunk(cfg: CfgNode) -> bool:
    """
    Whether the adapter is a part of the student.

    Raises:
        ValueError: an unknown placement.
    """
    placement = cfg.MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT
    if placement not in PLACEMENTS:
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT is {placement!r}; choose one of {list(PLACEMENTS)}"
        )
    return placement == "trunk"


def trunk_channels(cfg: CfgNode) -> Dict[str, int]:
    """
    Width of each map after its adapter in the trunk, which is the teacher's, by the student's names.

    Raises:
        FileNotFoundError, ValueError: TRUNK_CHANNELS, the teacher and the weights of a trained student do not give the
            widths, or there is not one for each map.
    """
    node = cfg.MODEL.QMIMIC.MIMIC
    names = list(node.IN_FEATURES or head_features(cfg))
    widths = list(node.TRUNK_CHANNELS)
    how = (
        f"give one width for each, as {CONFIG} of the training's OUTPUT_DIR does, or name the teacher in "
        "MODEL.QMIMIC.TEACHER.CONFIG_FILE"
    )
    if not widths and cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
        try:
            widths = [shape.channels for shape in teacher_shapes(cfg).values()]
        except (FileNotFoundError, TeacherConfigError) as error:
            # An evaluation of a trained student needs no teacher.
            widths = trained_trunk_channels(cfg, cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else []
            if not widths:
                raise type(error)(f"MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS is []; {how}. {error}") from error
    if len(widths) != len(names):
        raise ValueError(f"MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS is {widths} for the maps {names}; {how}")
    return dict(zip(names, widths))


def trained_trunk_channels(cfg: CfgNode, weights: str, key: str = "MODEL.WEIGHTS") -> List[int]:
    """
    Widths of the adapters in a checkpoint, in the order of the student's maps.

    Args:
        weights: path or address of the student's checkpoint.
        key: config key of ``weights``, for the error.

    Returns:
        [] if the checkpoint has no adapters in the trunk.

    Raises:
        FileNotFoundError, ValueError: see :func:`qmimic_d2.checkpoint.checkpointer.read_checkpoint`.
    """
    state = read_checkpoint(weights, key=key)
    names = cfg.MODEL.QMIMIC.MIMIC.IN_FEATURES or head_features(cfg)
    entries = [[f"backbone.adapters.{name}.{place}" for place in ("weight", "0.weight")] for name in names]
    found = [next((state[each] for each in places if each in state), None) for places in entries]
    return [] if any(each is None for each in found) else [int(each.shape[0]) for each in found]


def without_teacher(cfg: CfgNode) -> CfgNode:
    """
    A frozen copy for evaluation. It names no teacher, so that none of the teacher's files is read. If TRUNK_CHANNELS is
    [], the widths are those of ``MODEL.WEIGHTS``.
    """
    if "QMIMIC" not in cfg.MODEL:
        return changed(cfg)
    widths = cfg.MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS
    if is_in_trunk(cfg) and not widths and cfg.MODEL.WEIGHTS:
        widths = trained_trunk_channels(cfg, cfg.MODEL.WEIGHTS)
    return changed(cfg, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "", "MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS", list(widths))


def build_trunk_adapter(cfg: CfgNode, bottom_up: Backbone) -> TrunkAdapter:
    """A student's network, followed by the adapters that ``MODEL.QMIMIC.MIMIC`` describes."""
    channels = trunk_channels(cfg)
    check_features(list(channels), bottom_up.output_shape(), "MODEL.QMIMIC.MIMIC.IN_FEATURES")
    return TrunkAdapter(bottom_up, channels, cfg.MODEL.QMIMIC.MIMIC.ADAPTER)


def check_proposal_levels(cfg: CfgNode, backbone: TrunkAdapter) -> None:
    """
    All maps of the RPN head must be equally wide. Detectron2 asserts it without naming a key.

    Raises:
        ValueError: some of them have an adapter, and others have another width.
    """
    shapes, adapted = backbone.output_shape(), list(backbone.adapters)
    read = [] if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" else cfg.MODEL.RPN.IN_FEATURES
    widths = {name: shapes[name].channels for name in read if name in shapes}
    if len(set(widths.values())) > 1:
        every = adapted + [name for name in widths if name not in adapted]
        raise ValueError(
            "MODEL.QMIMIC.MIMIC.ADAPTER_PLACEMENT is 'trunk', and the maps of MODEL.RPN.IN_FEATURES would have "
            f"{widths} channels, since only {adapted} have an adapter; set MODEL.QMIMIC.MIMIC.IN_FEATURES {every}, or "
            "give MODEL.FPN.OUT_CHANNELS the teacher's width"
        )
