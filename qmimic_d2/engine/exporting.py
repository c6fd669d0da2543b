"""From a training's config and checkpoint to a file that ships, in one of several forms."""

import logging
import operator
import os
import tempfile
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from qmimic_d2.analysis import evenly_spaced
from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.engine.verification import EvaluatorAdapter, read_named_image
from qmimic_d2.export import ModelDescription, OnnxDetector, build_student, describe_model, describe_raw
from qmimic_d2.export.description import LABELS_NAME
from qmimic_d2.export.network import drop_quantizer
from qmimic_d2.export.onnx.file import export_onnx, import_onnx
from qmimic_d2.export.onnx.int8 import Int8Trial, import_quantization, quantize_onnx
from qmimic_d2.export.raw.sources import decoder_sources
from qmimic_d2.export.student import CONFIG_NAME, WEIGHTS_NAME, StudentExport, export_student
from qmimic_d2.export.torchscript.file import export_torchscript
from qmimic_d2.files import check_output_folder, write_text
from qmimic_d2.inference.categories import unknown_names_note
from qmimic_d2.inference.dataset_categories import dataset_categories, load_class_names
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.modeling.quantizer import UniformQuantizer
from qmimic_d2.modeling.quantizer_hook import attached_quantizer
from qmimic_d2.progress import track

__all__ = [
    "FORMATS",
    "LABELS_NAME",
    "ExportFormat",
    "ExportJob",
    "Exported",
    "Exporter",
    "Int8Settings",
    "check_packages",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Settings:
    """
    Attributes:
        calibration_images: images of the training set for the ranges of activations.
        search_images: images of the training set on which the search measures AP; 0 = no search.
        max_ap_loss: what int8 may cost on these, in points, before layers go back to float32.
        search_seconds: bound of the search.
        threads: of onnxruntime during the search; 0 = its own choice.
    """

    calibration_images: int = 100
    search_images: int = 200
    max_ap_loss: float = 0.3
    search_seconds: float = 300.0
    threads: int = 0


@dataclass(frozen=True)
class Exported:
    """
    Attributes:
        path: what is opened to run the detector.
        file_bytes: of what ships, without ``labels.json``.
        student: of the detectron2 form.
        trials: of the int8 form's search.
    """

    path: str
    file_bytes: int
    student: Optional[StudentExport] = None
    trials: Sequence[Int8Trial] = ()


@dataclass(frozen=True)
class ExportJob:
    """
    Attributes:
        path: of the file that is opened to run the detector; its folder is there.
        description: what the file tells about itself.
        int8: settings of that form.
        report: told about the search of int8.
    """

    path: str
    description: ModelDescription
    int8: Int8Settings
    report: Callable[[str], None]


@dataclass(frozen=True)
class ExportFormat:
    """
    A form in which a detector ships.

    Attributes:
        file: name of what is opened to run the detector.
        write: gets the exporter and the job, and writes ``job.path``.
        check_packages: raises ImportError where a package that it takes is not installed; None: it takes none.
        describe: gets the exporter, and gives what the file tells about itself; raises ValueError if the form cannot
            hold this detector.
    """

    file: str
    write: Callable[["Exporter", ExportJob], Exported]
    check_packages: Optional[Callable[[], object]] = None
    describe: Callable[["Exporter"], ModelDescription] = operator.attrgetter("description")


class Exporter:
    """
    The student alone, built once, and written in any form.

    Attributes:
        cfg: of the training, with the sizes to ship.
        model: the detector with its weights, its quantizer kept or dropped.
        was_quantized: whether it had a quantizer in training.
        description: what the files will tell about themselves.
        note: what the user should know about them; "" for nothing.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        keep_quantizer: bool = True,
        fixed_size: Tuple[int, int] = (0, 0),
        config_file: str = "",
        weights_key: str = "MODEL.WEIGHTS",
    ):
        """
        Args:
            cfg: of the training, with ``MODEL.WEIGHTS`` and the sizes to ship in ``INPUT``.
            keep_quantizer: whether features stay quantized.
            fixed_size: height and width of every input; (0, 0) for any size.
            config_file: for the record.
            weights_key: where the user gave the weights, for error messages.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing, cut short, or of another config.
        """
        self.cfg = cfg
        self.model = build_student(cfg, weights_key=weights_key, device="cpu")
        self.was_quantized = attached_quantizer(self.model.backbone) is not None
        if not keep_quantizer:
            drop_quantizer(self.model)
        load_class_names(cfg)
        categories = dataset_categories(cfg)
        self.note = unknown_names_note(categories, cfg)
        self.description: ModelDescription = describe_model(
            cfg,
            self.model,
            [(each.id, each.name) for each in categories],
            has_names=not self.note,
            config_file=config_file,
            fixed_size=fixed_size,
        )

    @property
    def predictor(self) -> Predictor:
        """The same detector, eager, with the same input."""
        return Predictor.of_model(self.cfg, self.model, self.description.input_spec)

    def describe(self, form: str) -> ModelDescription:
        """
        What a file of a form tells about itself.

        Raises:
            ValueError: the form cannot hold this detector.
        """
        return FORMATS[form].describe(self)

    def write(
        self,
        form: str,
        folder: str,
        int8: Optional[Int8Settings] = None,
        report: Callable[[str], None] = logger.info,
    ) -> Exported:
        """
        Writes one form, and next to it its description, and for a raw network the sources that decode its outputs.
        Every file appears under its name when it is complete.

        Args:
            form: a key of :data:`FORMATS`.
            folder: made if need be.
            int8: settings of that form.
            report: told about the search of int8.

        Raises:
            ImportError: a package that the form takes is not installed.
            OSError: the folder cannot be written.
            ValueError: the form cannot hold this detector.
        """
        description = self.describe(form)
        check_output_folder(folder)
        job = ExportJob(os.path.join(folder, FORMATS[form].file), description, int8 or Int8Settings(), report)
        exported = FORMATS[form].write(self, job)
        texts = {description.file_name: description.to_json() + "\n", **decoder_sources(description)}
        for name, text in texts.items():
            write_text(os.path.join(folder, name), text)
        return exported


def _describe_detectron2(exporter: Exporter) -> ModelDescription:
    if exporter.description.input_spec.is_fixed:
        raise ValueError("--fixed-size is for torchscript and onnx; a Detectron2 config has no key for it")
    return exporter.description


def _describe_raw(exporter: Exporter) -> ModelDescription:
    return describe_raw(exporter.model, exporter.description)


def _write_detectron2(exporter: Exporter, job: ExportJob) -> Exported:
    folder = os.path.dirname(job.path)
    student = export_student(exporter.cfg, exporter.model, folder)
    return Exported(job.path, os.path.getsize(os.path.join(folder, WEIGHTS_NAME)), student)


def _write_torchscript(exporter: Exporter, job: ExportJob) -> Exported:
    export_torchscript(exporter.model, job.description, job.path)
    return Exported(job.path, os.path.getsize(job.path))


def _write_onnx(exporter: Exporter, job: ExportJob) -> Exported:
    export_onnx(exporter.model, job.description, job.path)
    return Exported(job.path, os.path.getsize(job.path))


def _write_int8(exporter: Exporter, job: ExportJob) -> Exported:
    settings, names = job.int8, exporter.cfg.DATASETS.TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty; int8 is calibrated on training images")
    dicts = evenly_spaced(load_dataset_dicts(names), settings.calibration_images)
    prepare = job.description.input_spec.prepare
    files = [each["file_name"] for each in dicts]
    pixels = (prepare(read_named_image(each))[0] for each in track(files, "reading images for int8"))
    images: List[np.ndarray] = [job.description.as_input(each) for each in pixels]
    evaluate = None
    if settings.search_images:
        search = APEvaluation(exporter.cfg, names[0], settings.search_images, mapper=dict)
        job.report(f"Calibrated on {len(images)} images, AP on {search.num_images} images of {names[0]}")

        def evaluate(candidate: str) -> float:
            return search(EvaluatorAdapter(OnnxDetector(candidate, settings.threads)))

    stride, signed = _uniform_codes(exporter.model)
    with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
        source = os.path.join(folder, "float.onnx")
        export_onnx(exporter.model, job.description, source)
        trials = quantize_onnx(
            source,
            job.path,
            images,
            evaluate=evaluate,
            max_ap_loss=settings.max_ap_loss,
            seconds=settings.search_seconds,
            code_stride=stride,
            code_signed=signed,
            report=job.report,
        )
    return Exported(job.path, os.path.getsize(job.path), trials=trials)


def _import_int8() -> None:
    import_onnx()
    import_quantization()


# The forms of ``python -m qmimic_d2 export``. Another one is a further entry, and its ending an entry of OPENERS of
# qmimic_d2.inference.detectors.
FORMATS: Dict[str, ExportFormat] = {
    "detectron2": ExportFormat(CONFIG_NAME, _write_detectron2, describe=_describe_detectron2),
    "torchscript": ExportFormat("model.ts", _write_torchscript),
    "onnx": ExportFormat("model.onnx", _write_onnx, import_onnx),
    "onnx-int8": ExportFormat("model_int8.onnx", _write_int8, _import_int8),
    "onnx-raw": ExportFormat("model_raw.onnx", _write_onnx, _import_int8, _describe_raw),
    "onnx-raw-int8": ExportFormat("model_raw_int8.onnx", _write_int8, _import_int8, _describe_raw),
}


def check_packages(form: str) -> None:
    """
    Raises:
        ValueError: there is no such form.
        ImportError: a package that the form takes is not installed; names the extra that brings it.
    """
    if form not in FORMATS:
        raise ValueError(f"--format is {form!r}; choose from {list(FORMATS)}")
    if FORMATS[form].check_packages:
        FORMATS[form].check_packages()


def _uniform_codes(model: nn.Module) -> Tuple[float, bool]:
    """Stride and sign of the codes of a model's uniform quantizer; 0.0 where there is none."""
    hook = attached_quantizer(model.backbone)
    quantizer = None if hook is None else hook.quantizer
    if isinstance(quantizer, UniformQuantizer):
        return quantizer.stride, quantizer.signed
    return 0.0, False
