"""Wrong settings stop a run before it begins: the message names key, value and fix, and no file appears."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from helpers import RESNET_C4, randomize, seeded_model, write_teacher
from refusals import check, files, refusal
from tiny_coco import write_images
from tiny_training import Run, registered_data, training_cfg, write_builtin_data, write_coco

from qmimic_d2.engine import Trainer, load_config

TEACHER = "MODEL.QMIMIC.TEACHER"
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
MIMIC = "MODEL.QMIMIC.MIMIC"
DIAGNOSTICS = "MODEL.QMIMIC.DIAGNOSTICS"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def teacher(folder):
    return write_teacher(folder)


@pytest.fixture(scope="module", autouse=True)
def dataset(folder):
    with registered_data(folder / "data", "tiny_preflight") as name:
        yield name


@pytest.fixture(scope="module")
def student(folder, teacher, dataset):
    """A good student's YAML."""
    path = folder / "student.yaml"
    path.write_text(training_cfg(folder / "output", dataset, teacher=teacher).dump())
    return str(path)


def test_a_good_config_passes_and_leaves_no_trace(student, folder):
    before, state = files(folder), torch.get_rng_state()
    check(student)
    check(student, "SOLVER.IMS_PER_BATCH", 6, num_processes=3)
    assert files(folder) == before
    assert torch.equal(torch.get_rng_state(), state)


# The key, its value as written on a command line, and what the message has to say besides the key.
WRONG_VALUES = [
    (f"{QUANTIZER}.NAME", "Unifrom", ["'Unifrom'", "Uniform", "PowerOfTwo", "Clamp"]),
    (f"{QUANTIZER}.STRIDE", "0.0", ["0.0", "positive"]),
    (f"{QUANTIZER}.STRIDE", "-0.5", ["-0.5", "positive"]),
    (f"{QUANTIZER}.STRIDE", "1e999", ["inf", "finite"]),
    (f"{QUANTIZER}.NUM_CODES", "-1", ["-1", "0"]),
    (f"{QUANTIZER}.IN_FEATURES", "['conv9']", ["'conv9'", "conv5"]),
    (f"{MIMIC}.IN_FEATURES", "['p3']", ["'p3'", "conv5"]),
    (f"{MIMIC}.TEACHER_IN_FEATURES", "['res4']", ["'res4'", "conv5"]),
    (f"{MIMIC}.LOSS_WEIGHT", "-1.0", ["-1.0", ">= 0"]),
    (f"{MIMIC}.SCHEDULE", "linear", ["'linear'", "constant", "warmup"]),
    (f"{MIMIC}.WARMUP_ITERS", "-5", ["-5", ">= 0"]),
    (f"{MIMIC}.ROI_SOURCE", "['anchors']", ["'anchors'", "sampled", "proposals", "ground_truth"]),
    (f"{MIMIC}.POOLER_TYPE", "ROIAlignV3", ["'ROIAlignV3'", "ROIAlignV2", "ROIPool"]),
    (f"{MIMIC}.NORMALIZE_BY", "area", ["'area'", "roi", "element", "target"]),
    (f"{MIMIC}.ADAPTER", "linear", ["'linear'", "conv1x1"]),
    (f"{DIAGNOSTICS}.PERIOD", "-1", ["-1", ">= 0"]),
    (f"{DIAGNOSTICS}.EVAL_IMAGES", "-1", ["-1", ">= 0"]),
    (f"{TEACHER}.INPUT_SCALE", "0.0", ["0.0", "positive"]),
    ("MODEL.META_ARCHITECTURE", "QuantMimicCNN", ["QuantMimicCNN", "QuantMimicRCNN"]),
    ("SOLVER.OPTIMIZER", "Adam", ["'Adam'", "SGD", "AdamW"]),
    ("SOLVER.IMS_PER_BATCH", "0", ["0", "multiple of 1"]),
    ("SOLVER.MAX_ITER", "0", ["0", ">= 1"]),
    ("SOLVER.REFERENCE_WORLD_SIZE", "3", ["3", "2 images", "divisor"]),
    ("SOLVER.LR_SCHEDULER_NAME", "Cosine", ["Cosine"]),
    # fvcore 0.1.5 has no value for its end: Detectron2 stops in the last iteration, model_final unsaved
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", ["WarmupStepWithFixedGammaLR", "IndexError"]),
    ("SOLVER.CLIP_GRADIENTS", "{'ENABLED': True, 'CLIP_TYPE': 'both'}", ["'both'"]),
    ("SOLVER.BASE_LR", "-0.1", ["-0.1"]),
    ("SOLVER.AMP.ENABLED", "True", ["'cpu'", "CUDA", "SOLVER.AMP.ENABLED False"]),
    ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", ["'WeightedTrainingSampler'", "TrainingSampler"]),
    ("DATASETS.TRAIN", "('tiny_preflihgt',)", ["'tiny_preflihgt'", "not registered", "'tiny_preflight'"]),
    ("DATASETS.TEST", "('coco_2017_vla',)", ["'coco_2017_vla'", "not registered", "'coco_2017_val'"]),
    ("DATASETS.TRAIN", "()", ["name a registered data set"]),
    ("DATASETS.TRAIN", "('coco_2017_train',)", ["'coco_2017_train'", "no such file", "DETECTRON2_DATASETS"]),
    ("DATASETS.TRAIN", "('voc_2007_trainval',)", ["'voc_2007_trainval'", "there is no", "VOCtrainval_06-Nov-2007.tar"]),
    ("MODEL.WEIGHTS", "/nowhere/model.pth", ["'/nowhere/model.pth'", "does not exist"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("key, value, words", WRONG_VALUES, ids=[f"{k}={v}" for k, v, _ in WRONG_VALUES])
def test_wrong_value(student, key, value, words):
    message = refusal(student, key, value)
    assert key.rpartition(".")[2] in message
    for word in words:
        assert word in message


def test_stride_nan_from_a_file(student, folder):
    path = folder / "nan_stride.yaml"
    path.write_text(f"_BASE_: {student}\nMODEL: {{QMIMIC: {{QUANTIZER: {{STRIDE: .nan}}}}}}\n")
    message = refusal(str(path))
    assert f"{QUANTIZER}.STRIDE" in message and "nan" in message


@pytest.mark.parametrize(
    "opts", [(f"{QUANTIZER}.STRIDES", "1.0"), (f"{QUANTIZER}.STRIDE",), (f"{QUANTIZER}.STRIDE", "x")]
)
def test_pairs_that_are_none(student, opts):
    message = refusal(student, *opts)
    assert opts[0] in message


@pytest.mark.parametrize(
    "opts, words",
    [
        ((f"{MIMIC}.LOSS_WIEGHT", "1.0"), f"'{MIMIC}.LOSS_WEIGHT'"),
        ((f"{QUANTIZER}.STRIDE", "1"), "1.0, not 1"),
        ((f"{QUANTIZER}.STRIDE", "1.0", "--resume"), "--resume stand before the pairs"),
    ],
)
def test_what_may_have_been_meant(student, opts, words):
    assert words in refusal(student, *opts)


@pytest.mark.parametrize("text", ["MODEL: [1\n", "only words\n", "- a list\n", "", "\x00\x01"])
def test_a_config_that_is_no_yaml_of_keys(student, folder, text):
    path = folder / "broken.yaml"
    path.write_text(text)
    message = refusal(str(path)) if text else refusal(str(path), "DATASETS.TRAIN", "()")
    assert "--config-file" in message or "DATASETS.TRAIN" in message


def test_batch_that_processes_cannot_share(student):
    message = refusal(student, num_processes=4)
    assert "SOLVER.IMS_PER_BATCH is 2" in message and "4 process(es)" in message and "multiple of 4" in message


def test_a_scaled_batch_is_what_the_processes_share(student):
    # 2 images on 2 processes become 3 on 3
    check(student, "SOLVER.REFERENCE_WORLD_SIZE", 2, num_processes=3)


class TestTeacher:
    def test_config_is_not_there(self, student):
        message = refusal(student, f"{TEACHER}.CONFIG_FILE", "nowhere.yaml")
        assert f"{TEACHER}.CONFIG_FILE is 'nowhere.yaml'" in message and "Looked for" in message

    @pytest.mark.parametrize("text", ["MODEL: {BACKBONE: [", "MODEL: {BACKBOEN: {NAME: x}}", "\x00"])
    def test_config_cannot_be_read(self, student, folder, text):
        path = folder / "unreadable_teacher.yaml"
        path.write_text(text)
        message = refusal(student, f"{TEACHER}.CONFIG_FILE", path)
        assert f"{TEACHER}.CONFIG_FILE" in message and str(path) in message and "Give the YAML" in message

    def test_options_do_not_fit_its_config(self, student):
        message = refusal(student, f"{TEACHER}.OPTS", "['MODEL.VGG.DEPHT', 11]")
        assert f"{TEACHER}.OPTS" in message and "MODEL.VGG.DEPHT" in message

    def test_no_weights_are_named(self, student, teacher):
        message = refusal(student, f"{TEACHER}.WEIGHTS", "''")
        assert f"{TEACHER}.WEIGHTS is ''" in message and teacher.config_file in message and "Give a .pth" in message

    def test_weights_are_not_there(self, student):
        message = refusal(student, f"{TEACHER}.WEIGHTS", "nowhere.pth")
        assert f"{TEACHER}.WEIGHTS" in message and "'nowhere.pth' does not exist" in message
        assert "Give the path" in message

    def test_weights_are_a_folder(self, student, folder):
        message = refusal(student, f"{TEACHER}.WEIGHTS", folder)
        assert f"{TEACHER}.WEIGHTS" in message and "is a folder" in message

    @pytest.mark.parametrize("kept", [0, 100, 5000])
    def test_weights_are_cut_short(self, student, teacher, folder, kept):
        path = folder / "short.pth"
        path.write_bytes(Path(teacher.weights).read_bytes()[:kept])
        message = refusal(student, f"{TEACHER}.WEIGHTS", path)
        assert f"{TEACHER}.WEIGHTS" in message and str(path) in message and "Get a complete copy" in message

    def test_weights_are_of_another_width(self, student, teacher, folder):
        path = folder / "narrow.pth"
        cfg = teacher.cfg.clone()
        cfg.MODEL.VGG.WIDTH_DIVISOR = 32
        torch.save({"model": seeded_model(cfg).state_dict()}, path)
        message = refusal(student, f"{TEACHER}.WEIGHTS", path)
        assert f"{TEACHER}.WEIGHTS" in message and "of another shape" in message and "correct the config" in message

    def test_weights_are_of_another_network(self, student, folder):
        other = write_teacher(folder, *RESNET_C4, name="resnet")
        message = refusal(student, f"{TEACHER}.WEIGHTS", other.weights)
        assert f"{TEACHER}.WEIGHTS" in message and "missing in the checkpoint" in message

    def test_weights_would_run_code(self, student, folder):
        class Touch:
            def __reduce__(self):
                return Path.touch, (folder / "code_ran",)

        path = folder / "code.pkl"
        path.write_bytes(pickle.dumps({"model": {"backbone.conv1.conv1.weight": Touch()}}))
        message = refusal(student, f"{TEACHER}.WEIGHTS", path)
        assert f"{TEACHER}.WEIGHTS" in message and str(path) in message and "Save model.state_dict()" in message
        assert not (folder / "code_ran").exists()

    def test_channels_differ_and_there_is_no_adapter(self, student):
        message = refusal(student, f"{MIMIC}.ADAPTER", "''")
        assert f"{MIMIC}.ADAPTER" in message and "16 channels" in message and "32" in message and "conv1x1" in message

    def test_strides_differ_and_there_is_no_input_scale(self, student, folder):
        coarse = write_teacher(folder, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1], name="coarse")
        message = refusal(student, *coarse.options)
        assert "stride 8" in message and "16" in message and f"{TEACHER}.INPUT_SCALE" in message
        check(student, *coarse.options, f"{TEACHER}.INPUT_SCALE", "2.0")

    def test_a_teacher_that_nothing_uses(self, student, caplog):
        check(student)
        assert "nothing uses" not in caplog.text
        check(student, "MODEL.META_ARCHITECTURE", "QuantRCNN", f"{TEACHER}.WEIGHTS", "nowhere.pth")
        assert "which nothing uses: MODEL.META_ARCHITECTURE is 'QuantRCNN'" in caplog.text
        check(student, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
        assert "which nothing uses: MODEL.META_ARCHITECTURE is 'ProposalNetwork'" in caplog.text


ANNOTATIONS = {
    "no JSON": "images: 3",
    "no JSON of a text file": "\udcff",
    "a list": "[]",
    "a number": "3",
    "without categories": json.dumps({"images": [{}], "annotations": []}),
    "no images": json.dumps({"images": [], "annotations": [], "categories": []}),
    "images by name": json.dumps({"images": {"a": 1}, "annotations": [], "categories": []}),
    "no categories": json.dumps(
        {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [], "categories": []}
    ),
}


VOC_ANNOTATION = (
    "<annotation><size><width>64</width><height>64</height></size><object><name>dog</name><bndbox><xmin>1</xmin>"
    "<ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)


class TestAnnotations:
    @pytest.fixture
    def registered(self, folder):
        path = folder / "annotations.json"
        register_coco_instances("tiny_wrong", {}, str(path), str(folder / "data" / "images"))
        yield path
        path.unlink(missing_ok=True)
        DatasetCatalog.remove("tiny_wrong")
        MetadataCatalog.remove("tiny_wrong")

    @pytest.mark.parametrize("kind", ANNOTATIONS)
    @pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
    def test_not_in_cocos_format(self, student, registered, kind, key):
        registered.write_bytes(ANNOTATIONS[kind].encode("utf-8", "surrogateescape"))
        message = refusal(student, key, "('tiny_wrong',)")
        assert f"{key} names 'tiny_wrong'" in message and str(registered) in message
        assert "is not in COCO's format" in message and "It must be JSON" in message

    def test_not_there(self, student, registered):
        message = refusal(student, "DATASETS.TRAIN", "('tiny_wrong',)")
        assert "DATASETS.TRAIN names 'tiny_wrong'" in message and str(registered) in message

    def test_other_entries_do_no_harm(self, student, registered, folder):
        write_coco(registered, folder / "data" / "images")
        content = json.loads(registered.read_text())
        content.update(type="instances", licenses=None)
        registered.write_text(json.dumps(content))
        check(student, "DATASETS.TRAIN", "('tiny_wrong',)")

    def test_annotations_are_needed_for_training_alone(self, student, registered, folder):
        write_coco(registered, folder / "data" / "images")
        content = json.loads(registered.read_text())
        del content["annotations"]
        registered.write_text(json.dumps(content))
        check(student, "DATASETS.TEST", "('tiny_wrong',)")
        assert "no list 'annotations'" in refusal(student, "DATASETS.TRAIN", "('tiny_wrong',)")

    @pytest.mark.parametrize("number", [1, 2])
    def test_too_few_classes(self, student, number):
        message = refusal(student, "MODEL.ROI_HEADS.NUM_CLASSES", number)
        assert f"MODEL.ROI_HEADS.NUM_CLASSES is {number}" in message and "'tiny_preflight'" in message
        assert "set it to 3" in message

    def test_more_classes_than_the_data_have(self, student, caplog):
        check(student, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
        assert "never learned" not in caplog.text
        check(student, "MODEL.ROI_HEADS.NUM_CLASSES", 4)
        assert "MODEL.ROI_HEADS.NUM_CLASSES is 4" in caplog.text and "has 3 classes" in caplog.text

    def test_classes_are_counted_up_to_the_last_that_is_annotated(self, student, registered, folder):
        # ids with gaps; the first and the last category have no box, as a "supercategory" of some tools has none
        names = {1: "all", 4: "a", 5: "b", 8: "c", 9: "rest"}
        categories = [{"id": number, "name": name} for number, name in names.items()]
        write_coco(registered, folder / "data" / "images", categories=categories[1:4])
        content = json.loads(registered.read_text())
        content["categories"] = categories
        registered.write_text(json.dumps(content))
        train = ("DATASETS.TRAIN", "('tiny_wrong',)")
        message = refusal(student, *train, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
        assert "has 5 classes, 'c' the last that is annotated" in message
        check(student, *train, "MODEL.ROI_HEADS.NUM_CLASSES", 4)
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["category_id"] == 8)  # not trained on
        registered.write_text(json.dumps(content))
        check(student, *train, "MODEL.ROI_HEADS.NUM_CLASSES", 3)

    @pytest.mark.parametrize(
        "architecture, key", [("RetinaNet", "RETINANET"), ("QuantFCOS", "FCOS")], ids=["retinanet", "fcos"]
    )
    def test_classes_of_one_stage_detectors(self, student, architecture, key):
        one_level = (f"MODEL.{key}.IN_FEATURES", "['conv5']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16]]")
        options = ("MODEL.META_ARCHITECTURE", architecture, *one_level, f"MODEL.{key}.NUM_CLASSES")
        assert f"MODEL.{key}.NUM_CLASSES is 2" in refusal(student, *options, 2)
        check(student, *options, 3)

    def test_no_evaluator_for_the_test_set(self, student, registered):
        MetadataCatalog.remove("tiny_wrong")
        MetadataCatalog.get("tiny_wrong").evaluator_type = "lvis"
        message = refusal(student, "DATASETS.TEST", "('tiny_wrong',)")
        assert "DATASETS.TEST names 'tiny_wrong'" in message and "'lvis'" in message and "'pascal_voc'" in message

    def test_pascal_voc(self, student, folder):
        root = folder / "voc"
        register_pascal_voc("tiny_voc", str(root), "train", 2007)
        MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
        try:
            message = refusal(student, "DATASETS.TRAIN", "('tiny_voc',)")
            assert "'tiny_voc'" in message and str(root / "ImageSets" / "Main" / "train.txt") in message
            for path, text in (("ImageSets/Main/train.txt", "0\n"), ("Annotations/0.xml", VOC_ANNOTATION)):
                (root / path).parent.mkdir(parents=True)
                (root / path).write_text(text)
            write_images(root / "JPEGImages", 1)
            check(student, "DATASETS.TRAIN", "('tiny_voc',)", "MODEL.ROI_HEADS.NUM_CLASSES", 20)
            message = refusal(student, "DATASETS.TRAIN", "('tiny_voc',)", "MODEL.ROI_HEADS.NUM_CLASSES", 19)
            assert "MODEL.ROI_HEADS.NUM_CLASSES is 19" in message and "set it to 20" in message
        finally:
            DatasetCatalog.remove("tiny_voc")
            MetadataCatalog.remove("tiny_voc")

    def test_wider_face(self, student, folder):
        root = folder / "wider"
        metadata = MetadataCatalog.get("tiny_wider_face").set(
            evaluator_type="wider_face", annotation_file=str(root / "bbx_gt.txt"), ground_truth_dir=str(root)
        )
        image = {"file_name": str(folder / "data" / "images" / "0.png"), "image_id": 0, "height": 64, "width": 48}
        DatasetCatalog.register("tiny_wider_face", lambda: [{**image, "annotations": []}])
        try:
            message = refusal(student, "DATASETS.TRAIN", "('tiny_wider_face',)")
            assert "'tiny_wider_face'" in message and metadata.annotation_file in message
            message = refusal(student, "DATASETS.TEST", "('tiny_wider_face',)")
            assert "wider_easy_val.mat" in message and str(root) in message
            root.mkdir()
            (root / "bbx_gt.txt").write_text("0\n")
            message = refusal(student, "DATASETS.TRAIN", "('tiny_wider_face',)")
            assert "no object to be trained on" in message
            check(student, "DATASETS.TRAIN", "('tiny_wider_face',)", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
        finally:
            DatasetCatalog.remove("tiny_wider_face")
            MetadataCatalog.remove("tiny_wider_face")


class TestEvaluation:
    @pytest.fixture(scope="class")
    def weights(self, folder, student):
        path = folder / "student.pth"
        torch.save({"model": randomize(seeded_model(load_config(student, eval_only=True))).state_dict()}, path)
        return str(path)

    def test_needs_neither_teacher_nor_training_data(self, student, weights, dataset):
        teacher = (f"{TEACHER}.CONFIG_FILE", "nowhere.yaml", f"{TEACHER}.WEIGHTS", "nowhere.pth")
        data = ("DATASETS.TRAIN", "('nothing',)", "DATASETS.TEST", f"('{dataset}',)")
        solver = ("SOLVER.IMS_PER_BATCH", 3, "SOLVER.AMP.ENABLED", True, "SOLVER.OPTIMIZER", "None")
        options = (*teacher, *data, *solver, "MODEL.WEIGHTS", weights)
        check(student, *options, num_processes=2, eval_only=True)

    def test_needs_weights_that_fill_the_model(self, student, weights, dataset, folder):
        data = ("DATASETS.TEST", f"('{dataset}',)")
        message = refusal(student, *data, eval_only=True)
        assert "MODEL.WEIGHTS is empty" in message
        message = refusal(student, *data, "MODEL.WEIGHTS", weights, "MODEL.VGG.WIDTH_DIVISOR", 16, eval_only=True)
        assert "MODEL.WEIGHTS" in message and "correct the config" in message

    def test_needs_test_data(self, student, weights):
        message = refusal(student, "MODEL.WEIGHTS", weights, eval_only=True)
        assert "DATASETS.TEST is ()" in message or "DATASETS.TEST is []" in message


class TestResume:
    def test_a_checkpoint_that_no_longer_fits(self, student, tmp_path):
        cfg = load_config(student)
        model = seeded_model(cfg)
        inner = {"iteration": 3, "optimizer": Trainer.build_optimizer(cfg, model).state_dict()}
        trainer = {"iteration": 3, "hooks": {"LRScheduler": {"last_epoch": 4}}, "_trainer": inner}
        torch.save({"model": model.state_dict(), "trainer": trainer, "iteration": 3}, tmp_path / "model_0000003.pth")
        (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
        check(student, "OUTPUT_DIR", tmp_path, resume=True)
        before = files(tmp_path)
        message = refusal(student, "OUTPUT_DIR", tmp_path, "MODEL.ROI_BOX_HEAD.FC_DIM", 4, resume=True)
        assert "last_checkpoint" in message and "correct the config" in message
        (tmp_path / "model_0000003.pth").unlink()
        message = refusal(student, "OUTPUT_DIR", tmp_path, resume=True)
        assert "last_checkpoint" in message and "does not exist" in message
        assert set(files(tmp_path)) == set(before) - {tmp_path / "model_0000003.pth"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts, words",
    [
        ((f"{QUANTIZER}.NAME", "Unifrom"), f"KeyError: {QUANTIZER}.NAME is 'Unifrom'"),
        (("DATASETS.TRAIN", "('coco_2017_vla_100',)"), "KeyError: DATASETS.TRAIN names 'coco_2017_vla_100'"),
    ],
)
def test_train_net_says_it_in_one_line(student, tmp_path, opts, words):
    write_builtin_data(tmp_path / "datasets")
    before = files(tmp_path)
    data = ("DATASETS.TRAIN", "('coco_2017_val_100',)")
    arguments = ("--config-file", student, "OUTPUT_DIR", tmp_path / "output", *data, *opts)
    with Run(*arguments, cwd=tmp_path, datasets=tmp_path / "datasets") as process:
        assert process.finish() == 1
        output, errors = process.texts()
    assert output == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(words)
    assert files(tmp_path) == before
