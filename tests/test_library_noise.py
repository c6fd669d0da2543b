"""What a run shows before its first iteration: no warning of a library about another one, and no line twice."""

import collections
import os
import subprocess
import sys
import warnings

import pytest
from helpers import write_teacher
from tiny_training import BUILTIN_DATASET, ROOT, training_cfg, write_builtin_data

from qmimic_d2.library_noise import hush_libraries, quiet_imports

JIT = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def printed(*arguments, **options):
    """The lines that a Python process writes to stderr. It has to end well."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, **options)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def library_warnings(lines):
    kinds = ("FutureWarning:", "DeprecationWarning:", "UserWarning:", "torch/utils/cpp_extension", "_symbolic_trace")
    return [line for line in lines if any(kind in line for kind in kinds)]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--num-processes", 2, "--dist-url", "auto")], ids=["one process", "two"])
def test_a_training_begins_without_noise(tmp_path, flags):
    write_builtin_data(tmp_path / "datasets")
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    cfg = training_cfg(
        *(tmp_path / "output", BUILTIN_DATASET, *classes, "SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.001),
        *("MODEL.DEVICE", "cuda"),
        teacher=write_teacher(tmp_path),
        evaluate=True,
    )
    (tmp_path / "student.yaml").write_text(cfg.dump())
    options = {"cwd": tmp_path, "env": environment(DETECTRON2_DATASETS=str(tmp_path / "datasets"))}
    lines = printed(ROOT / "train_net.py", *flags, "--config-file", "student.yaml", **options)
    assert library_warnings(lines) == []
    log = (tmp_path / "output" / "log.txt").read_text()
    start = log[: log.index("Starting training from iteration 0")]
    messages = collections.Counter(line.partition("]")[2] for line in start.splitlines() if line.startswith("["))
    assert len(messages) > 5 and [text for text, count in messages.items() if count > 1] == []


@pytest.mark.slow
def test_a_command_begins_without_noise():
    config = ROOT / "configs" / "Digits" / "student_vgg_1_16_scratch.yaml"
    assert printed("-m", "qmimic_d2", "size", "--config-file", config, cwd=ROOT, env=environment()) == []


@pytest.mark.slow
@pytest.mark.parametrize("options, shown", [((), 0), (("-W", "default"), 1)])
def test_who_asks_for_warnings_sees_them(options, shown):
    code = (
        "import warnings\nfrom qmimic_d2.library_noise import hush_libraries\nhush_libraries()\n"
        f"warnings.warn({JIT!r}, FutureWarning)\n"
    )
    lines = [line for line in printed(*options, "-c", code, env=environment()) if "<string>:4: FutureWarning" in line]
    assert len(lines) == shown


@pytest.fixture
def no_options(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def test_only_the_listed_messages_are_hidden(no_options):
    hush_libraries()
    warnings.warn(JIT, FutureWarning)
    warnings.warn("torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument")
    warnings.warn("`my.function` is deprecated", FutureWarning)
    assert [str(each.message) for each in no_options] == ["`my.function` is deprecated"]


def test_after_the_imports_filters_are_as_the_libraries_left_them(no_options):
    before = list(warnings.filters)
    with quiet_imports():
        warnings.warn(JIT, FutureWarning)
        warnings.filterwarnings("ignore", "a library's own")
        own = warnings.filters[0]
    assert no_options == [] and warnings.filters == [own, *before]
    warnings.warn(JIT, FutureWarning)
    assert len(no_options) == 1


