"""Pascal VOC's two definitions of AP, on a case small enough for a pencil."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import Boxes, Instances

from qmimic_d2.engine import build_evaluator
from qmimic_d2.evaluation import PascalVOCEvaluator

# xmin, ymin, xmax, ymax as Pascal has them, and whether the object is difficult
CATS = {"1": [(1, 1, 10, 10, 0), (31, 1, 40, 10, 0)], "2": [(1, 1, 10, 10, 0), (31, 31, 40, 40, 1)]}
NOWHERE = (60.0, 60.0, 70.0, 70.0)


@pytest.fixture
def voc(tmp_path):
    """Registers two images as year: three cats to be found, a difficult one, and no dog."""
    names = []

    def make(year, annotations=CATS):
        root = tmp_path / str(year)
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        (root / "ImageSets" / "Main" / "test.txt").write_text("1\n2\n")
        for image_id, objects in annotations.items():
            text = "".join(
                "<object><name>cat</name><pose>Left</pose><truncated>0</truncated>"
                f"<difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
                f"<ymax>{y1}</ymax></bndbox></object>"
                for x0, y0, x1, y1, difficult in objects
            )
            size = "<size><width>80</width><height>80</height><depth>3</depth></size>"
            (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{size}{text}</annotation>")
        name = f"tiny_voc_{year}"
        register_pascal_voc(name, str(root), "test", year, class_names=("cat", "dog"))
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
        names.append(name)
        return name

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def detections(*rows):
    """Instances of (box, score, class)."""
    instances = Instances((80, 80))
    instances.pred_boxes = Boxes(torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score, _ in rows])
    instances.pred_classes = torch.tensor([label for _, _, label in rows], dtype=torch.long)
    return {"instances": instances}


def found(index, image_id="1"):
    x0, y0, x1, y1, _ = CATS[image_id][index]
    return (x0 - 1.0, y0 - 1.0, float(x1), float(y1))


# right, wrong, difficult (counts neither way), right: precision 1 at recall 1/3, 2/3 at recall 2/3
FIRST = detections((found(0), 0.9, 0), (NOWHERE, 0.8, 0))
SECOND = detections((found(1, "2"), 0.7, 0), (found(0, "2"), 0.6, 0))
# recalls 0 to 0.3 and 0.4 to 0.6 of eleven, then none; the area has the same steps
BY_POINTS = (4 * 1 + 3 * 2 / 3) / 11
BY_AREA = 1 / 3 + (2 / 3) / 3


@pytest.mark.parametrize("year, by_year", [(2007, BY_POINTS), (2012, BY_AREA)])
def test_both_rules(voc, year, by_year):
    evaluator = PascalVOCEvaluator(voc(year))
    evaluator.reset()
    evaluator.process([{"image_id": "1"}, {"image_id": "2"}], [FIRST, SECOND])
    results = evaluator.evaluate()["bbox"]
    # a mean over two classes, of which the second has no object
    assert results["AP50"] == pytest.approx(100 * by_year / 2)
    assert results["AP50_11point"] == pytest.approx(100 * BY_POINTS / 2)
    assert results["AP50_area"] == pytest.approx(100 * BY_AREA / 2)
    assert {"AP", "AP75"} < set(results)


def test_detections_of_a_class_without_an_object(voc):
    evaluator = PascalVOCEvaluator(voc(2012))
    evaluator.reset()
    evaluator.process([{"image_id": "1"}, {"image_id": "2"}], [FIRST, SECOND])
    evaluator.process([{"image_id": "1"}], [detections((NOWHERE, 0.9, 1))])
    results = evaluator.evaluate()["bbox"]
    assert math.isnan(results["AP50"])  # Detectron2's own
    assert results["AP50_area"] == pytest.approx(100 * BY_AREA / 2)


def test_no_detections(voc):
    evaluator = PascalVOCEvaluator(voc(2007))
    evaluator.reset()
    evaluator.process([{"image_id": "1"}], [detections()])
    assert set(evaluator.evaluate()["bbox"].values()) == {0.0}


def test_several_processes(voc, monkeypatch):
    name = voc(2007)
    whole, parts = PascalVOCEvaluator(name), [PascalVOCEvaluator(name) for _ in range(2)]
    for evaluator in (whole, *parts):
        evaluator.reset()
    whole.process([{"image_id": "1"}, {"image_id": "2"}], [FIRST, SECOND])
    parts[0].process([{"image_id": "1"}], [FIRST])
    parts[1].process([{"image_id": "2"}], [SECOND])
    expected = whole.evaluate()
    sent, received = [], []
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda data, dst: sent.append(data) or [])
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    assert parts[1].evaluate() is None
    monkeypatch.setattr(
        "detectron2.utils.comm.gather", lambda data, dst: received.append(data) or [data, sent[len(received) - 1]]
    )
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: True)
    assert parts[0].evaluate() == expected
    assert len(sent) == len(received)  # it takes part in every exchange, or the main process would wait


def test_it_is_chosen_by_metadata(voc):
    assert isinstance(build_evaluator(get_cfg(), voc(2012)), PascalVOCEvaluator)
