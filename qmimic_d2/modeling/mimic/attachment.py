"""The base of what hangs on a detector in training: attaching, removing, and the begin of training."""

import logging
from typing import Callable, List, Optional, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from qmimic_d2.checkpoint.training_entries import rename_old_entries
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

__all__ = ["NAME", "AbsentMimic", "Attachment", "check_attachable"]

# Its name among the detector's modules, and the prefix of its entries in state_dict.
NAME = "mimic"


class Attachment(nn.Module):
    """
    A module that hangs on a detector as ``model.mimic`` and acts through hooks alone.

    Training begins when ``train()`` is called on a new model, as Detectron2's trainers do, or with the first training
    forward. Then :meth:`prepare_training` runs, so that mistakes show early.
    """

    teacher: Optional[FrozenTeacher] = None
    # The detector and the hooks, while attached.
    _held: Sequence[nn.Module] = ()
    _handles: Sequence[RemovableHandle] = ()

    def attach(self, model: nn.Module) -> None:
        """
        Hangs it on a detector; it replaces an earlier one.

        Raises:
            ValueError: see :func:`check_attachable`.
        """
        check_attachable(model)
        previous = getattr(model, NAME, None)
        if previous is not None:
            previous.remove()
        # in a list, so that the detector is no submodule of its own part
        self._held = [model]
        self._handles = self._hooks(model)
        model.add_module(NAME, self)
        self.training = model.training

    def remove(self) -> None:
        """Takes it off the detector, which then is as it was before. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for model in self._held:
            delattr(model, NAME)
        self._handles, self._held = (), ()

    @property
    def detector(self) -> nn.Module:
        """The detector that it hangs on."""
        return self._held[0]

    def prepare_training(self) -> None:
        """Runs when training begins, and before each training step."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Attachment":
        """As ``nn.Module.train``; on a new model it prepares the training."""
        # Detectron2's evaluation ends with train(), which does not begin a training: the mode was False before.
        begins = mode and self.training
        super().train(mode)
        if begins and self._held:
            self.prepare_training()
        return self

    def _hooks(self, model: nn.Module) -> List[RemovableHandle]:
        return [
            model.register_forward_pre_hook(self._on_begin, prepend=True),
            model._register_load_state_dict_pre_hook(rename_old_entries),
        ]

    def _on_begin(self, model: nn.Module, inputs) -> None:
        if model.training:
            self.prepare_training()


def check_attachable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the detector already has an attribute ``mimic``, or has no ``backbone``.
    """
    if not isinstance(getattr(model, NAME, None), (Attachment, type(None))):
        raise ValueError(f"{type(model).__name__} has an attribute {NAME!r} of its own; rename it")
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ValueError(f"{type(model).__name__} has no module 'backbone', whose maps the mimic compares")


class AbsentMimic(Attachment):
    """
    Takes the mimic's place if the config names no teacher, or a teacher whose config cannot be read.

    An evaluation needs no teacher. A training without a teacher warns once; with an unreadable one it raises an error.

    Args:
        build_teacher: raises the error of the unreadable config; None: the config names no teacher.
    """

    def __init__(self, build_teacher: Optional[Callable[[], FrozenTeacher]] = None):
        super().__init__()
        self._build_teacher = build_teacher
        self._has_warned = False

    def prepare_training(self) -> None:
        """
        Raises:
            FileNotFoundError, ValueError: the teacher that the config names could not be read.
        """
        if self._build_teacher is not None:
            self._build_teacher()
            raise ValueError(
                "MODEL.QMIMIC.TEACHER.CONFIG_FILE was not found, or could not be read, when this model was built, "
                "and can be now; build the model again to train it"
            )
        if not self._has_warned:
            self._has_warned = True
            logging.getLogger(__name__).warning(
                "MODEL.QMIMIC.TEACHER.CONFIG_FILE is '': training without a teacher, the mimic is off"
            )
