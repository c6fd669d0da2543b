"""The benchmark of the diagnostics runs and gives what it says; how long anything takes is not looked at."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

import diagnostics_cost
from qmimic_d2.data import DigitsSpec, prepare_digits
from qmimic_d2.engine import load_config

DATASET = "digits_det_diagnostics_cost_test"


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    """KEY VALUE pairs that make the demo's configs train on four images, two at a time."""
    spec = DigitsSpec(DATASET, split="train", num_images=4)
    folder = Path(prepare_digits(spec, str(tmp_path_factory.mktemp("root"))))
    register_coco_instances(DATASET, {}, str(folder / "annotations.json"), str(folder / "images"))
    yield ["DATASETS.TRAIN", f"('{DATASET}',)", "SOLVER.IMS_PER_BATCH", "2"]
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.mark.slow
def test_cost_of_the_diagnostics(opts, capsys, tmp_path):
    path = tmp_path / "cost.json"
    diagnostics_cost.main(["--repeats", "2", "--calls", "1", "--json", str(path), "--opts", *opts])
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert [row["period"] for row in rows] == [20, 100, 10, "-"]
    for row in rows[:3]:
        # how long anything takes is not looked at
        assert row["% of training"] == pytest.approx(100.0 * (row["step / plain step"] - 1.0) / row["period"])
    assert rows[3]["% of training"] == pytest.approx(rows[0]["% of training"] + rows[1]["% of training"])
    assert "both that are on by default" in capsys.readouterr().out and content["machine"]["threads"] == 1


def test_what_is_measured_is_what_is_named():
    for kind, pairs in diagnostics_cost.KINDS.items():
        node = load_config(diagnostics_cost.STUDENT, pairs, device="cpu").MODEL.QMIMIC
        assert (node.DIAGNOSTICS.PERIOD == 1) == (kind == "features")
        assert (node.DIAGNOSTICS.GRADIENT_PERIOD == 1) == (kind == "gradients")
        assert (node.MIMIC.SCHEDULE == "balanced" and node.MIMIC.BALANCE_PERIOD == 1) == (kind == "balance")
