"""The shipped matrix is well-formed and every run of it is an ordinary config; mistakes in one are named."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from evidence_lib import prototypes
from evidence_lib.matrix import load_matrix
from evidence_lib.records import Records
from evidence_lib.runs import Runs
from evidence_lib.settings import config_digest, settings_of
from qmimic_d2.config_files import get_config_file
from qmimic_d2.engine import Trainer, load_config
from qmimic_d2.modeling import QUANTIZER_REGISTRY, QuantMimicRCNN

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "benchmarks" / "evidence" / "matrix.yaml"
MATRIX = load_matrix(str(SHIPPED))
NAMES = list(MATRIX.variants)
SCRIPTS = ("train_net.py", "benchmarks/train_variant.py")
# The claims of the method that each has a group.
GROUPS = [
    *("main", "match", "sides", "codes", "stride", "num_codes", "lambda", "schedule", "sgd"),
    *("vgg32", "resnet", "convolutions", "rfcn", "hard"),
]
CONTROLS = ("clamp", "relu")  # in the names of the variants

SMALL = """
seeds: {reporting: [101, 102, 103], choosing: [11]}
common: [MODEL.DEVICE, cpu]
settings: {wide: [MODEL.VGG.WIDTH_DIVISOR, 8, SOLVER.BASE_LR, 0.01], fast: [SOLVER.BASE_LR, 0.02]}
variants:
  teacher: {label: "the teacher", config: Digits/teacher_vgg_1_8.yaml, seed: 1}
  scratch: {label: "from scratch", config: Digits/student_vgg_1_16_scratch.yaml}
  student: {label: "student", config: Digits/student_vgg_1_16_qmimic.yaml, teacher: teacher, with: [wide, fast],
            opts: [MODEL.QMIMIC.QUANTIZER.NAME, ""]}
groups:
  main: {title: "All", seeds: reporting, count: 2, variants: [teacher, scratch, student], against: scratch}
  rare: {title: "Rare", seeds: choosing, count: 1, variants: [scratch], on_request: true}
quick: {count: 1, variants: [student]}
"""


@pytest.fixture
def small(tmp_path):
    def load(*replacements):
        text = SMALL
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "matrix.yaml"
        path.write_text(text)
        return load_matrix(str(path))

    return load


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(MATRIX, Records(str(tmp_path_factory.mktemp("records"))), "output/evidence")


def names(found):
    return [run.name for run in found]


def test_every_claim_has_a_group_with_enough_seeds():
    assert set(GROUPS) <= set(MATRIX.groups)
    for name in GROUPS:
        group = MATRIX.groups[name]
        assert len(group.seeds) >= 5 and group.seed_list == "reporting" and group.contrasts
    assert len(MATRIX.groups["kinds"].seeds) == 12  # five left the sign of a claim open there
    assert [name for name, group in MATRIX.groups.items() if group.on_request] == ["hard"]


def test_the_controls_stand_in_every_comparison_of_students():
    for name, group in MATRIX.groups.items():
        if group.seed_list == "reporting":
            assert all(any(control in each for each in group.variants) for control in CONTROLS), name


def test_what_is_reported_was_not_chosen_on():
    content = yaml.safe_load(SHIPPED.read_text())["seeds"]
    assert not {*content["reporting"], *content["mask"]} & set(content["choosing"])
    assert len(set(content["reporting"])) >= 12


@pytest.mark.slow
def test_no_two_variants_are_the_same(runs):
    alike = {}
    # the group `mask` has its own teacher, and what is compared with it, so that it can be trained on another machine
    for name in [name for name in NAMES if name not in ("mask_teacher", "mask_scratch")]:
        (run,) = MATRIX.runs(variants=[name], seeds=[1])
        alike.setdefault((runs.digest(run), run.variant.needs), []).append(name)
    twice, learning_rate = sorted(found for found in alike.values() if len(found) > 1)
    # one is there to compare the scripts that train it
    assert twice == ["qmimic", "qmimic_fast"] and len({MATRIX.variants[name].script for name in twice}) == 2
    # SGD's learning rate is one of those that it was chosen from, on other seeds
    sgd, rate = learning_rate
    assert sgd == "sgd_scratch" and rate in MATRIX.groups["sgd_rate"].variants


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_variant_is_an_ordinary_config(name, runs, tmp_path):
    variant = MATRIX.variants[name]
    (run,) = MATRIX.runs(variants=[name], seeds=[7])
    assert len(variant.opts) % 2 == 0 and variant.label
    cfg = runs.config(run)
    assert cfg.SEED == (7 if variant.seed is None else variant.seed) and cfg.MODEL.DEVICE == "cpu"
    model_class = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    is_mimic = issubclass(model_class, QuantMimicRCNN)
    assert is_mimic == bool(variant.teacher)
    parts = (model_class, QUANTIZER_REGISTRY.get(f"{cfg.MODEL.QMIMIC.QUANTIZER.NAME or 'Uniform'}Quantizer"))
    needs_prototypes = any(part.__module__ == prototypes.__name__ for part in parts)
    assert variant.script in (SCRIPTS[1:] if needs_prototypes else SCRIPTS)
    assert (ROOT / variant.script).is_file()
    if variant.not_yet:
        return
    if is_mimic:
        weights = tmp_path / "teacher.pth"
        node = cfg.MODEL.QMIMIC.TEACHER
        teacher = load_config(node.CONFIG_FILE, node.OPTS, device="cpu")
        torch.save(build_model(teacher).state_dict(), weights)
        opts = [*variant.opts, "MODEL.QMIMIC.TEACHER.WEIGHTS", str(weights)]
        cfg = load_config(get_config_file(variant.config), opts)
        # the variant that lends its weights is the teacher of the config
        variant = MATRIX.variants[variant.teacher]
        lender = load_config(get_config_file(variant.config), variant.opts)
        assert lender.MODEL.VGG == teacher.MODEL.VGG
        assert lender.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    model = build_model(cfg)
    model.train()  # reads the teacher
    assert Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))


def test_opts_are_merged_and_text(small):
    matrix = small()
    opts = matrix.variants["student"].opts
    assert dict(zip(opts[::2], opts[1::2])) == {
        "MODEL.DEVICE": "cpu",
        "MODEL.VGG.WIDTH_DIVISOR": "8",
        "SOLVER.BASE_LR": "0.02",
        "MODEL.QMIMIC.QUANTIZER.NAME": "",
    }
    assert matrix.variants["student"].needs == ("teacher",) and matrix.variants["scratch"].needs == ()


def test_selection(small):
    matrix = small()
    assert names(matrix.runs()) == [
        "teacher_1", "scratch_101", "student_101", "scratch_102", "student_102",
    ]  # fmt: skip
    assert names(matrix.runs(["rare"])) == ["scratch_11"]
    assert names(matrix.runs(variants=["student"], seeds=[5])) == ["student_5"]
    assert names(matrix.runs(variants=["scratch"])) == ["scratch_11", "scratch_101", "scratch_102"]
    assert names(matrix.runs(["main", "rare"], ["scratch"], [9])) == ["scratch_9"]
    assert names(matrix.quick_runs()) == ["student_101"]


def test_contrasts_against_one_leave_out_what_is_run_once(small):
    assert small().groups["main"].contrasts == (("student", "scratch"),)
    explicit = small(("against: scratch", "contrasts: [[scratch, student]]"))
    assert explicit.groups["main"].contrasts == (("scratch", "student"),)
    assert small().groups["rare"].contrasts == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"groups": ["mian"]}, r"--group: there is no 'mian'; choose among main, rare"),
        ({"variants": ["studnet"]}, r"--variant: there is no 'studnet'"),
        ({"groups": ["rare"], "variants": ["student"]}, r"--variant: student is in none of the groups \['rare'\]"),
    ],
)
def test_unknown_names_are_refused(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        small().runs(**arguments)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("with: [wide, fast]", "with: [wied]", "variant student, with: there is no 'wied'"),
        ("teacher: teacher, ", "teacher: techer, ", r"variant student, teacher or weights .*: there is no 'techer'"),
        ("teacher: teacher, ", "teacher: scratch, ", "needs the weights of scratch, which has no seed of its own"),
        ('[MODEL.QMIMIC.QUANTIZER.NAME, ""]', "[MODEL.MASK_ON]", "no KEY VALUE pairs"),
        ("seed: 1}", "seed: 1, weights: teacher}", r"variant teacher, .* \(of those above it\): there is no 'teacher'"),
        ("seed: 1}", "seed: 1, eval_only: true}", "variant teacher is eval_only and has no weights"),
        (
            "  scratch: {",
            "  q: {label: q, config: x, seed: 1, weights: teacher, eval_only: true}\n"
            "  p: {label: p, config: x, teacher: q}\n  scratch: {",
            "variant p needs the weights of q, which has no seed of its own or trains nothing",
        ),
        ("seed: 1}", "sede: 1}", "variant teacher: .*sede"),
        ("against: scratch}", "contrasts: [[scratch, quant]]}", r"group main, contrast \['scratch', 'quant'\]"),
        ("against: scratch}", "contrasts: [[scratch, scratch]]}", "is no contrast of two variants"),
        ("against: scratch}", "x: {label: a, lines: {b: {c: 1}}}}", "group main, x: there is no 'c'"),
        ("count: 2", "count: 4", "group main: 4 seeds of 'reporting'; there are"),
        ("seeds: choosing", "seeds: chosing", "group rare: 1 seeds of 'chosing'"),
        ("variants: [student]}", "variants: [stud]}", "quick: there is no 'stud'"),
        ("groups:", "gruops:", "is no matrix: KeyError: 'groups'"),
    ],
)
def test_mistakes_in_a_matrix_are_named(small, old, new, message):
    with pytest.raises(ValueError, match=message):
        small((old, new))


def test_digest_is_of_what_has_an_effect():
    def digest(*opts, name="Digits/student_vgg_1_16_qmimic.yaml"):
        return config_digest(settings_of(load_config(get_config_file(name), opts, device="cpu")), 1)

    plain = digest()
    same = ["OUTPUT_DIR", "elsewhere", "DATALOADER.NUM_WORKERS", "3", "SOLVER.CHECKPOINT_PERIOD", "7"]
    same += ["MODEL.QMIMIC.TEACHER.WEIGHTS", "other.pth", "MODEL.QMIMIC.DIAGNOSTICS.PERIOD", "5"]
    assert digest(*same) == plain
    for key, value in [
        ("SEED", "2"),
        ("SOLVER.MAX_ITER", "801"),
        ("MODEL.QMIMIC.QUANTIZER.STRIDE", "0.5"),
        ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", "teacher_vgg_1_8.yaml"),
        ("MODEL.QMIMIC.TEACHER.OPTS", "['MODEL.VGG.WIDTH_DIVISOR', '4']"),
    ]:
        assert digest(key, value) != plain, key
    assert digest(name="Digits/student_vgg_1_16_mimic.yaml") != plain


@pytest.mark.slow
def test_recorded_digests_stay_valid(runs):
    files = sorted((SHIPPED.parent / "runs").glob("*/*.json"))
    assert len(files) > 500
    for file in files:
        (run,) = MATRIX.runs(variants=[file.parent.name], seeds=[int(file.stem)])
        assert json.loads(file.read_text())["config_digest"] == runs.digest(run), file


def test_settings_are_differences_from_the_defaults():
    settings = settings_of(load_config("", ["SOLVER.MAX_ITER", "7", "OUTPUT_DIR", "x", "SEED", "3"], device="cpu"))
    assert settings == {"SOLVER.MAX_ITER": 7, "MODEL.DEVICE": "cpu", "SEED": 3}
    assert config_digest(settings, 1) != config_digest(settings, 2)
    assert config_digest(settings, 1) == config_digest(dict(reversed(settings.items())), 1)


def test_a_lazy_teacher_counts_by_its_file(tmp_path):
    lazy = tmp_path / "teacher.py"
    lazy.write_text("")
    settings = settings_of(load_config("", ["MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(lazy)], device="cpu"))
    assert settings["TEACHER"] == str(lazy)
