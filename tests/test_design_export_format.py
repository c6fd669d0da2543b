"""A project's own export format: an entry of FORMATS writes it, and an entry of OPENERS opens it."""

import os

import torch
from exported import random_image, write_detector

from qmimic_d2.engine import load_config
from qmimic_d2.engine.exporting import FORMATS, Exported, Exporter, ExportFormat
from qmimic_d2.export import ModelDescription
from qmimic_d2.inference.detectors import OPENERS, open_detector
from qmimic_d2.inference.prediction import Predictor


def write_pickled(exporter, job):
    """The whole model, by torch.save; the description beside it."""
    torch.save(exporter.model, job.path)
    with open(job.path + ".json", "w", encoding="utf-8") as file:
        file.write(exporter.description.to_json())
    return Exported(job.path, os.path.getsize(job.path))


class PickledDetector:
    def __init__(self, path, threads, device):
        with open(path + ".json", encoding="utf-8") as file:
            self.description = ModelDescription.from_json(file.read())
        model = torch.load(path, weights_only=False)
        self._predictor = Predictor.of_model(None, model, self.description.input_spec)

    def __call__(self, image):
        return self._predictor.detect(image)


def test_a_format_of_ones_own_is_exported_and_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pickled", ExportFormat("model.pickled", write_pickled))
    monkeypatch.setitem(OPENERS, ".pickled", PickledDetector)
    written = write_detector(tmp_path)
    exporter = Exporter(load_config(written.config_file, ["MODEL.WEIGHTS", written.weights], eval_only=True))
    exported = exporter.write("pickled", str(tmp_path / "device"))
    assert exported.path == str(tmp_path / "device" / "model.pickled")
    assert (tmp_path / "device" / "labels.json").is_file()
    image = random_image(48, 64)
    found, expected = open_detector(exported.path).detect(image), exporter.predictor.detect(image)
    for name in ("boxes", "scores", "classes"):
        assert (getattr(found, name) == getattr(expected, name)).all()
    assert len(found.scores)
