"""What users install: the wheel, its metadata, the pinned versions, and the commands that do the set-up."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement

import qmimic_d2

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "Digits/student_vgg_1_16_qmimic.yaml"
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def files_below(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy, because a build leaves build/ and *.egg-info where it runs."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT / "qmimic_d2", tree / "qmimic_d2", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tree / "configs")
    for name in ("setup.py", "setup.cfg", "MANIFEST.in", "LICENSE", "README.md", "train_net.py"):
        shutil.copy(ROOT / name, tree)
    gone = tree / "build" / "lib" / "qmimic_d2" / "configs" / "gone.yaml"  # as an earlier build leaves it
    gone.parent.mkdir(parents=True)
    gone.write_text("")
    return tree


@pytest.fixture(scope="module")
def wheel(source_tree):
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    build = subprocess.run(command, cwd=source_tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "invalid command 'bdist_wheel'" in build.stdout:
        pytest.skip("setuptools before 70.1 builds wheels only with the wheel package, which is not here")
    assert build.returncode == 0, build.stdout
    (path,) = (source_tree / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read("qmimic_d2-0.1.0.dist-info/METADATA").decode())


@pytest.fixture(scope="module")
def setup_arguments():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def test_wheel_holds_the_package_and_every_config(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = files_below(ROOT / "configs")
    assert CONFIG in configs
    packed = {name[len("qmimic_d2/configs/") :] for name in names if name.startswith("qmimic_d2/configs/")}
    assert packed == configs
    assert {f"qmimic_d2/{name}" for name in files_below(ROOT / "qmimic_d2")} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]


def test_building_leaves_no_configs_in_the_source_package(wheel, source_tree):
    assert not (source_tree / "qmimic_d2" / "configs").exists()


@pytest.mark.slow
def test_wheel_finds_its_configs_from_any_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = f"import qmimic_d2; print(qmimic_d2.get_config_file({CONFIG!r}))\n"
    code += "from qmimic_d2.config_files import train_net_script; print(train_net_script())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    found, script = (Path(line).resolve() for line in output.splitlines())
    assert found == (site / "qmimic_d2" / "configs" / CONFIG).resolve()
    assert script == (site / "qmimic_d2" / "train_net.py").resolve()
    assert script.read_text() == (ROOT / "train_net.py").read_text()


def test_checkout_finds_its_configs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(qmimic_d2.get_config_file(CONFIG)) == ROOT / "configs" / CONFIG


def test_license_is_apache_and_in_the_wheel(wheel, metadata):
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "The qmimic_d2 authors" in text
    with zipfile.ZipFile(wheel) as archive:
        (packed,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(packed).decode() == text
    assert "License :: OSI Approved :: Apache Software License" in metadata.get_all("Classifier")


def test_metadata(metadata):
    assert (metadata["Name"].replace("-", "_"), metadata["Version"]) == ("qmimic_d2", qmimic_d2.__version__)
    assert set(metadata["Requires-Python"].split(",")) == {">=3.9", "<3.14"}
    classifiers = metadata.get_all("Classifier")
    assert all(f"Programming Language :: Python :: {python}" in classifiers for python in PYTHONS)
    assert set(metadata.get_all("Provides-Extra")) == {
        *("train", "inference", "dev", "export", "report", "wandb", "mlflow")
    }
    required = {Requirement(text).name for text in metadata.get_all("Requires-Dist")}
    assert {"torch", "torchvision", "setuptools", "onnx", "jinja2"} <= required
    assert not [name for name in required if "detectron2" in name]  # an installed one is used as it is


def test_every_requirement_is_pinned_once_for_every_python(setup_arguments):
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    ]
    assert len(pins) > 40
    texts = setup_arguments["install_requires"] + sum(setup_arguments["extras_require"].values(), [])
    for python in PYTHONS:
        pinned = {}
        for pin in pins:
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert pin.name not in pinned, f"{pin.name} is pinned twice for Python {python}"
                pinned[pin.name] = str(pin.specifier)
        for requirement in map(Requirement, texts):
            version = pinned[requirement.name.lower()]
            assert version.startswith("==") and requirement.specifier.contains(version[2:]), (python, str(requirement))


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("target", ["demo", "test", "test-fast"])
def test_make_uses_the_given_environment(target):
    def planned(*variables):
        # MAKEFLAGS would hand the variables of the make that runs these tests down to this one.
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "PYTHON", "VENV")}
        command = ["make", "--dry-run", "--no-print-directory", target, *variables]
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout

    *_, job = planned().splitlines()
    assert "--venv '.venv'" in planned() and job.startswith(".venv/bin/python ")
    *_, job = planned("VENV=/data/env").splitlines()
    assert "--venv '/data/env'" in planned("VENV=/data/env") and job.startswith("/data/env/bin/python ")
    *_, job = planned("PYTHON=python3").splitlines()
    assert "--python 'python3'" in planned("PYTHON=python3") and job.startswith("python3 ")
    assert ".venv" not in planned("PYTHON=python3")
