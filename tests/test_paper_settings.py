"""
The paper's own settings on miniatures of its data sets, in their exact format: every shipped config of Pascal VOC and
WIDER FACE is trained and evaluated there. Sizes and schedules are overridden, and ImageNet weights, which no test
downloads.
"""

import json
import math
import re

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_pascal_voc
from shipped_configs import FEW_REGIONS, PAPER, UntrainedTeachers, load
from tiny_training import ROOT, Run

from miniature_lib.pascal_voc import make_miniature_voc
from miniature_lib.wider_face import make_miniature_wider_face
from qmimic_d2.data import register_wider_face
from qmimic_d2.engine import Trainer

NUM_IMAGES = 8

# KEY VALUE pairs for all of them.
SMALL = (
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)),
    *("DATALOADER.NUM_WORKERS", 0, "MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES", 2),
    *FEW_REGIONS,
)

FIGURES = {
    "PascalVOC": {"AP", "AP50", "AP75", "AP50_11point", "AP50_area"},
    "WIDERFACE": {"AP", "AP_easy", "AP_medium", "AP_hard"},
}

# By folder of configs: the steps of one row, by the keys that each is given beside SMALL.
ROWS = {
    "PascalVOC": ("teacher_resnet18_faster_rcnn", "student_resnet18_1_16_qmimic", "voc"),
    "WIDERFACE": ("teacher_vgg_1_4", "student_vgg_1_32_qmimic", "widerface"),
}

# Runs a script several times, as if each were a process of its own: importing PyTorch takes longer than all of them.
DRIVER = """
import json, runpy, sys
script, commands = sys.argv[1], json.loads(sys.argv[2])
for command in commands:
    sys.argv = [script, *command]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """DETECTRON2_DATASETS with both miniatures."""
    root = tmp_path_factory.mktemp("datasets")
    make_miniature_voc(str(root), NUM_IMAGES)
    make_miniature_wider_face(str(root), NUM_IMAGES)
    return root


@pytest.fixture(scope="module")
def catalogs(root):
    """Catalogs that hold these sets, as Detectron2 and this project register them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetCatalog, "data", {})
        patch.setattr(MetadataCatalog, "data", {})
        register_all_pascal_voc(str(root))
        register_wider_face(str(root))
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return UntrainedTeachers(tmp_path_factory.mktemp("teachers"))


def check_figures(folder, results):
    assert set(results) == FIGURES[folder]
    assert all(0.0 <= results[name] <= 100.0 for name in FIGURES[folder])


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_trains_and_is_evaluated(name, tmp_path, catalogs, teachers):
    options = [*SMALL, "OUTPUT_DIR", str(tmp_path / "output"), "MODEL.WEIGHTS", ""]
    cfg = load(name, *options)
    has_teacher = bool(cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE)
    if has_teacher:
        cfg = load(name, *options, "MODEL.QMIMIC.TEACHER.WEIGHTS", teachers.weights_of(cfg))
    trainer = Trainer(cfg)
    trainer.checkpointer.save_to_disk = False  # of a full-width network and its momentum, several 100 MB
    trainer.resume_or_load(resume=False)
    torch.manual_seed(cfg.SEED)
    trainer.train()
    written = json.loads((tmp_path / "output" / "evaluation.json").read_text())
    assert written["datasets"] == list(cfg.DATASETS.TEST)
    check_figures(name.partition("/")[0], written["results"]["bbox"])
    latest = trainer.storage.latest()
    assert math.isfinite(latest["total_loss"][0])
    assert ("loss_mimic" in latest) == has_teacher
    assert (tmp_path / "output" / "mimic.json").exists() == has_teacher


@pytest.mark.slow
@pytest.mark.parametrize("folder", ROWS)
def test_a_row_from_the_teacher_to_the_students_evaluation(folder, root, tmp_path):
    """train_net.py in the order of docs/reproduce.md, with the paths that stand in the configs."""
    teacher, student, output = ROWS[folder]
    options = [str(each) for each in SMALL]

    def arguments(name, *more):
        return ["--config-file", f"{folder}/{name}.yaml", *more]

    weights = f"output/{output}/{student}/model_final.pth"
    commands = [
        arguments(teacher, *options, "MODEL.WEIGHTS", ""),
        arguments(f"{teacher}_quant", *options),
        arguments(student, *options),
        arguments(student, "--eval-only", *options, "MODEL.WEIGHTS", weights),
    ]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    script = ROOT / "train_net.py"
    with Run(script, json.dumps(commands), cwd=tmp_path, datasets=root, script=driver) as process:
        assert process.finish() == 0, process.texts()
        text = "".join(process.texts())
    outputs = tmp_path / "output" / output
    assert sorted(path.name for path in outputs.iterdir()) == sorted([teacher, f"{teacher}_quant", student])
    for each in outputs.iterdir():
        check_figures(folder, json.loads((each / "evaluation.json").read_text())["results"]["bbox"])
    # the quantized teacher begins with the teacher's weights, and the student imitates the quantized teacher
    assert re.search(rf"Filled .* of QuantRCNN from output/{output}/{teacher}/model_final.pth", text)
    assert re.search(rf"The weights of output/{output}/{teacher}_quant/model_final.pth \(teacher of", text)
    assert re.search(rf"Filled .* of QuantMimicRCNN from {weights}", text)
    assert '"loss_mimic"' in (outputs / student / "metrics.json").read_text()
