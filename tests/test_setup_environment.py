"""
tools/setup_environment.py and two modules that it imports. No test starts pip: `World` stands for the interpreters
and their pip, and remembers what was asked of them.
"""

import fcntl
import json
import os
import runpy
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
with mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
    import environment_state
    import environment_steps
    import setup_environment

EVERYTHING = {module: requirement for module, requirement, _ in environment_state.REQUIREMENTS}
BASE = "/usr/bin/python3.11"


class World:
    """
    Interpreters, by path: what each has, and how its pip behaves.

    Attributes:
        asked: pip's arguments and other commands, in order.
        import_errors: module -> error, as the final check sees it.
        pip_fails: called with pip's arguments; true where that call fails.
    """

    def __init__(self):
        self.states = {}
        self.asked = []
        self.constraints = []
        self.import_errors = {}
        self.pip_fails = lambda arguments: False

    def add(self, python, prefix, modules=(), installed=None, version=(3, 11, 7), **other):
        site_packages = Path(prefix) / "site-packages"
        site_packages.mkdir(parents=True, exist_ok=True)
        self.states[str(python)] = {
            "version": list(version),
            "prefix": str(prefix),
            "base": BASE,
            "found": {
                **dict.fromkeys([*EVERYTHING, *environment_state.PROBED_BESIDES], False),
                **dict.fromkeys(modules, True),
            },
            "installed": dict(installed or {}),
            "site_packages": str(site_packages),
            "writable": True,
            "externally_managed": False,
            **other,
        }

    def add_complete(self, python, prefix, without=()):
        """An environment that has everything but the modules `without`."""
        modules = [m for m in [*EVERYTHING, "detectron2", "pip"] if m not in without]
        names = [environment_state.requirement_name(EVERYTHING[m]) for m in modules if m in EVERYTHING]
        self.add(python, prefix, modules, {name: "99.0" for name in [*names, "pip"]})

    def run(self, command, lock=None):
        python, *arguments = [str(part) for part in command]
        if python not in self.states:
            raise FileNotFoundError(python)
        state = self.states[python]
        if arguments[0] == "-c" and arguments[1] == environment_state.PROBE:
            return 0, json.dumps(state)
        if arguments[0] == "-c" and arguments[1] == environment_steps.IMPORT_CHECK:
            wrong = {name: self.import_errors[name] for name in arguments[2:] if name in self.import_errors}
            return 0, json.dumps(wrong)
        if arguments[:2] == ["-m", "venv"]:
            self.asked.append("venv")
            self.add(f"{arguments[2]}/bin/python", arguments[2], ["pip"], {"pip": "23.2.1"})
            return 0, ""
        assert arguments[:3] == ["-m", "pip", "--disable-pip-version-check"]
        self.asked.append(" ".join(arguments[3:]))
        if "--constraint" in arguments:
            self.constraints.append(Path(arguments[arguments.index("--constraint") + 1]).read_text())
        if self.pip_fails(arguments):
            return 1, "the output of pip"
        if "--target" in arguments:
            self.unpack_detectron2(Path(arguments[arguments.index("--target") + 1]))
            state["found"]["detectron2"] = True
            state["installed"]["sal-detectron2"] = "0.7.2"
        for module, requirement in EVERYTHING.items():
            if requirement in arguments:
                state["found"][module] = True
                state["installed"].setdefault(environment_state.requirement_name(requirement), "5.0")
        if "uninstall" in arguments:
            del state["installed"][arguments[-1]]
        if "opencv-python-headless==5.0" in arguments:
            state["installed"]["opencv-python-headless"] = "5.0"
            self.import_errors.clear()
        return 0, ""

    @staticmethod
    def unpack_detectron2(folder):
        for path in ("detectron2/__init__.py", "detectron2/_C.cpython-310.so", "tools/__init__.py"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        (folder / "sal_detectron2-0.7.2.dist-info").mkdir()
        record = "detectron2/__init__.py,,0\ndetectron2/_C.cpython-310.so,,0\ntools/__init__.py,,0\n"
        (folder / "sal_detectron2-0.7.2.dist-info" / "RECORD").write_text(record)


@pytest.fixture
def world(monkeypatch, tmp_path):
    world = World()
    world.add(BASE, tmp_path / "base", ["venv", "ensurepip"])
    for module in (environment_state, environment_steps, setup_environment):
        monkeypatch.setattr(module, "run", world.run)
    monkeypatch.setattr(setup_environment, "find_python", lambda search_path: (BASE, "3.11.7"))
    monkeypatch.setattr(setup_environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(setup_environment, "prepare_browser", lambda environment: None)
    return world


def write_distribution(site_packages, name, files, record=True, installer=True):
    """files: path -> (text, size as RECORD has it)."""
    info = site_packages / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    for path, (text, _) in files.items():
        if text is not None:
            (site_packages / path).parent.mkdir(parents=True, exist_ok=True)
            (site_packages / path).write_text(text)
    if installer:
        (info / "INSTALLER").write_text("pip")
    if record:
        (info / "RECORD").write_text("".join(f"{path},sha256=x,{size}\n" for path, (_, size) in files.items()))
    return info


# --- Decisions -----------------------------------------------------------------------------------------------


def test_requirements_cover_setup_py():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    known = {requirement: extra for _, requirement, extra in environment_state.REQUIREMENTS}
    trackers = {"wandb", "mlflow"}
    always = {"train", "inference"}  # the set-up installs what they need, whatever it is asked for
    for requirement in arguments["install_requires"]:
        assert known[requirement] == ""
    for extra, requirements in arguments["extras_require"].items():
        for requirement in set(requirements) - {"ruff", *trackers}:  # no make target runs them
            assert known[requirement] in ("", extra) or extra == "inference"
    assert {*environment_state.EXTRAS, *always, *trackers} == set(arguments["extras_require"])


def test_probe_tells_what_this_interpreter_has():
    state = environment_state.probe(sys.executable)
    assert state["version"] == list(sys.version_info[:3])
    assert state["found"]["torch"] and state["found"]["detectron2"]
    assert state["installed"]["torch"]
    assert environment_state.missing_requirements(state, []) == []


def test_probe_of_what_does_not_run(tmp_path):
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert environment_state.probe(str(shim)) is None
    assert environment_state.probe(str(tmp_path / "absent")) is None


def test_find_python_passes_over_names_that_do_not_run(tmp_path):
    def script(folder, name, line):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / folder / name).chmod(0o755)

    script("shims", "python3.11", "exit 127")
    script("shims", "python3.12", """echo '{"version": [3, 14, 0]}'""")
    without = json.dumps({"version": [3, 13, 1], "found": {"venv": True, "ensurepip": False}})
    script("shims", "python3.13", f"echo '{without}'")
    with pytest.raises(environment_state.SetupError) as error:
        environment_state.find_python(str(tmp_path / "shims"))
    assert "3.9 to 3.13" in str(error.value) and "is Python 3.14.0" in str(error.value)
    assert "apt install python3.13-venv" in str(error.value)

    good = json.dumps({"version": [3, 10, 2], "base": "/base/python", "found": {"venv": True, "ensurepip": True}})
    script("good", "python3.10", f"echo '{good}'")
    path = os.pathsep.join([str(tmp_path / "shims"), str(tmp_path / "good")])
    assert environment_state.find_python(path) == ("/base/python", "3.10.2")


def test_missing_requirements_depend_on_the_extras(world, tmp_path):
    world.add_complete("python", tmp_path / "env", without=["cv2", "onnxruntime", "pytest"])
    state = world.states["python"]
    assert environment_state.missing_requirements(state, []) == ["opencv-python"]
    assert environment_state.missing_requirements(state, ["export"]) == ["opencv-python", "onnxruntime"]


@pytest.mark.parametrize("version, old", [("1.13.1+cu117", True), ("2.1.0a0+git", False), ("2.14.1", False)])
def test_too_old(world, tmp_path, version, old):
    world.add("python", tmp_path / "env", ["torch"], {"torch": version})
    found = environment_state.too_old(world.states["python"], [])
    assert found == ([f"torch {version} (needed: 2.1 or later)"] if old else [])


def test_constraints_keep_what_is_installed():
    pins = "# a comment==1\ntorch==2.14.1\nonnx==1.2; python_version < '3.10'\n"
    text = environment_state.constraints_of({"torch": "2.5.0+cpu", "odd": "0.1ubuntu1-x"}, pins)
    assert text == "torch==2.5.0+cpu\nonnx==1.2; python_version < '3.10'\n"
    assert environment_state.constraints_of({}, "") == "\n"


def test_missing_shared_library():
    error = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    assert environment_state.missing_shared_library(error) == "libGL.so.1"
    assert environment_state.missing_shared_library("ImportError: /usr/lib/libGL.so.1: too short") == "libGL.so.1"
    assert environment_state.missing_shared_library("ImportError: cannot import name 'x'") is None
    assert environment_state.missing_shared_library("") is None


def test_digest_changes_with_versions(world, tmp_path):
    world.add_complete("python", tmp_path / "env")
    before = environment_state.digest(world.states["python"])
    assert before == environment_state.digest(world.states["python"])
    world.states["python"]["installed"]["torch"] = "98.0"
    assert before != environment_state.digest(world.states["python"])


def test_damaged_distributions(tmp_path):
    write_distribution(tmp_path, "whole", {"whole/a.py": ("12345", 5), "whole/b.pyc": (None, "")})
    write_distribution(tmp_path, "file_absent", {"file_absent/a.py": (None, 5)})
    write_distribution(tmp_path, "file_short", {"file_short/a.py": ("123", 5)})
    write_distribution(tmp_path, "no_record", {}, record=False)
    write_distribution(tmp_path, "no_installer", {}, installer=False)
    (write_distribution(tmp_path, "cut_record", {}) / "RECORD").write_text("cut_record/a.p")
    damaged = environment_state.damaged_distributions(tmp_path)
    names = [environment_state.distribution_of(info) for info in damaged]
    assert names == ["cut-record", "file-absent", "file-short", "no-installer", "no-record"]


# --- An environment that the set-up makes --------------------------------------------------------------------


def test_new_environment_and_second_run(world, tmp_path, capsys):
    folder = tmp_path / "env"
    assert setup_environment.main(["--venv", str(folder)]) == 0
    venv, packages, detectron2, project = world.asked
    assert venv == "venv"
    assert all(requirement in packages for requirement in EVERYTHING.values())
    assert f"--constraint {ROOT / 'constraints.txt'}" in packages and "--use-pep517" in packages
    assert "--no-deps" in detectron2 and detectron2.endswith("sal-detectron2==0.7.2")
    assert "--no-deps" in project and project.endswith(f"--editable {ROOT}")
    site_packages = folder / "site-packages"
    assert [path.name for path in sorted(site_packages.iterdir())] == ["detectron2", "sal_detectron2-0.7.2.dist-info"]
    assert [path.name for path in (site_packages / "detectron2").iterdir()] == ["__init__.py"]
    record = site_packages / "sal_detectron2-0.7.2.dist-info" / "RECORD"
    assert record.read_text() == "detectron2/__init__.py,,0\n"
    assert all(line.startswith("set-up: ") for line in capsys.readouterr().out.splitlines())

    world.asked.clear()
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert world.asked == []
    assert capsys.readouterr().out.count("\n") == 1


def test_killed_while_making_the_environment(world, tmp_path):
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / environment_state.OWNED_UNFINISHED).touch()
    (folder / "lib").mkdir()
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert world.asked[0] == "venv" and not (folder / "lib").exists()


def test_killed_before_pip_was_whole(world, tmp_path):
    folder = tmp_path / "env"
    world.add(folder / "bin" / "python", folder, ["pip"], {"pip": "23.2.1"})
    (folder / environment_state.OWNED_UNFINISHED).touch()
    write_distribution(folder / "site-packages", "pip", {"pip/__main__.py": (None, 9)})
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert world.asked[0] == "venv"


def test_killed_while_installing(world, tmp_path, capsys):
    folder = tmp_path / "env"
    world.add(folder / "bin" / "python", folder, ["pip"], {"pip": "26.0", "torch": "2.14.1"})
    (folder / environment_state.OWNED_UNFINISHED).touch()
    half = write_distribution(folder / "site-packages", "torch", {"torch/x.py": ("1", 9)})
    whole = write_distribution(folder / "site-packages", "numpy", {"numpy/x.py": ("1", 1)})
    (folder / "site-packages" / "~etuptools").mkdir()
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert "venv" not in world.asked and "--use-pep517" not in world.asked[0]
    assert not half.exists() and whole.exists()
    assert not (folder / "site-packages" / "~etuptools").exists()
    assert not (folder / environment_state.OWNED_UNFINISHED).exists()
    assert "torch-1.0 was left half-installed" in capsys.readouterr().out


def test_failing_pip_shows_its_output_and_leaves_no_stamp(world, tmp_path, capsys):
    folder = tmp_path / "env"
    world.pip_fails = lambda arguments: True
    assert setup_environment.main(["--venv", str(folder)]) == 1
    assert "the output of pip" in capsys.readouterr().out
    assert (folder / environment_state.OWNED_UNFINISHED).exists()
    world.pip_fails = lambda arguments: False
    assert setup_environment.main(["--venv", str(folder)]) == 0


def test_failing_import_leaves_no_stamp(world, tmp_path, capsys):
    world.import_errors["torchvision"] = "RuntimeError: operator torchvision::nms does not exist"
    assert setup_environment.main(["--venv", str(tmp_path / "env")]) == 1
    assert "import torchvision: RuntimeError: operator" in capsys.readouterr().out
    assert (tmp_path / "env" / environment_state.OWNED_UNFINISHED).exists()


def test_opencv_without_its_libraries_is_replaced_by_the_headless_build(world, tmp_path, capsys):
    folder = tmp_path / "env"
    world.import_errors["cv2"] = "ImportError: libGL.so.1: cannot open shared object file"
    assert setup_environment.main(["--venv", str(folder)]) == 0
    uninstall, install = world.asked[-2:]
    assert uninstall == "uninstall --yes opencv-python"
    assert install == "install --no-deps opencv-python-headless==5.0"
    assert "needs libGL.so.1" in capsys.readouterr().out
    # The next refresh must not bring the other build back.
    next(folder.glob(environment_state.OWNED_STAMP + "*")).rename(folder / environment_state.OWNED_UNFINISHED)
    world.asked.clear()
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert "opencv-python" not in world.asked[0].split()


def test_folder_with_other_things_is_not_touched(world, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    assert setup_environment.main(["--venv", str(tmp_path / "home")]) == 1
    assert (tmp_path / "home" / "thesis.tex").exists() and world.asked == []
    assert "neither empty nor" in capsys.readouterr().out


def test_venv_that_the_user_made_is_treated_as_the_users(world, tmp_path, capsys):
    folder = tmp_path / "env"
    world.add_complete(folder / "bin" / "python", folder)
    assert setup_environment.main(["--venv", str(folder)]) == 0
    assert world.asked == []
    assert "was not made by this set-up" in capsys.readouterr().out


def test_second_set_up_waits_for_the_first(world, tmp_path, capsys):
    environment = environment_steps.Environment("python", True, [], ".venv")
    entered = threading.Event()

    def second():
        with setup_environment.locked(tmp_path / ".venv.lock", environment):
            entered.set()

    with open(tmp_path / ".venv.lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(timeout=10)
    assert entered.is_set() and environment.lock is None
    assert "another set-up is at work on .venv" in capsys.readouterr().out


# --- An environment that the user has ------------------------------------------------------------------------


def test_complete_environment_is_left_alone(world, tmp_path):
    world.add_complete("/their/python", tmp_path / "env")
    assert setup_environment.main(["--python", "/their/python"]) == 0
    assert world.asked == []
    assert list((tmp_path / "env" / "site-packages").glob(environment_state.USERS_STAMP + "*"))
    world.import_errors["torch"] = "ImportError: would be seen if the imports were checked again"
    assert setup_environment.main(["--python", "/their/python", "--extras", "report"]) == 0


def test_only_what_is_missing_is_installed_and_nothing_replaced(world, tmp_path):
    world.add_complete("/their/python", tmp_path / "env", without=["yacs", "onnx"])
    world.states["/their/python"]["installed"]["torch"] = "2.5.0+cpu"
    assert setup_environment.main(["--python", "/their/python", "--extras", "report"]) == 0
    (install,) = world.asked
    assert install.split()[-1] == "yacs" and "onnx" not in install and "--editable" not in install
    (constraints,) = world.constraints
    assert "torch==2.5.0+cpu\n" in constraints and "torch==2.14.1" not in constraints
    assert "yacs==0.1.8" in constraints


def test_detectron2_is_installed_only_where_there_is_none(world, tmp_path):
    world.add_complete("/their/python", tmp_path / "env", without=["detectron2"])
    assert setup_environment.main(["--python", "/their/python"]) == 0
    (install,) = world.asked
    assert install.endswith("sal-detectron2==0.7.2") and "--no-deps" in install


def test_folder_in_the_way_of_detectron2_is_not_removed(world, tmp_path, capsys):
    world.add_complete("/their/python", tmp_path / "env", without=["detectron2"])
    theirs = tmp_path / "env" / "site-packages" / "detectron2" / "notes.txt"
    theirs.parent.mkdir()
    theirs.touch()
    assert setup_environment.main(["--python", "/their/python"]) == 1
    assert theirs.exists() and "is in the way" in capsys.readouterr().out


def test_pins_that_do_not_fit_are_dropped(world, tmp_path, capsys):
    world.add_complete("/their/python", tmp_path / "env", without=["cv2"])
    world.pip_fails = lambda arguments: len(world.asked) == 1
    assert setup_environment.main(["--python", "/their/python"]) == 0
    tested, free = world.constraints
    assert "opencv-python==" in tested and "opencv-python==" not in free and "numpy==99.0" in free
    assert "letting pip choose" in capsys.readouterr().out


def test_killed_while_installing_into_the_users_environment(world, tmp_path):
    site_packages = tmp_path / "env" / "site-packages"
    world.add_complete("/their/python", tmp_path / "env", without=["yacs"])
    world.pip_fails = lambda arguments: True
    assert setup_environment.main(["--python", "/their/python"]) == 1
    # Now its module is there, half; so is one of the user's own, which stays as it is.
    world.states["/their/python"]["found"]["yacs"] = True
    half = write_distribution(site_packages, "yacs", {"yacs/x.py": ("1", 9)})
    theirs = write_distribution(site_packages, "torch", {"torch/x.py": ("1", 9)})
    world.pip_fails = lambda arguments: False
    world.asked.clear()
    assert setup_environment.main(["--python", "/their/python"]) == 0
    assert world.asked[0].split()[-1] == "yacs"
    assert not half.exists() and theirs.exists()
    assert not (site_packages / environment_state.USERS_UNFINISHED).exists()


def test_users_broken_opencv_is_not_replaced(world, tmp_path, capsys):
    world.add_complete("/their/python", tmp_path / "env")
    world.import_errors["cv2"] = "ImportError: libGL.so.1: cannot open shared object file"
    assert setup_environment.main(["--python", "/their/python"]) == 1
    assert world.asked == []
    assert "import cv2: ImportError: libGL.so.1" in capsys.readouterr().out


def test_setuptools_without_pkg_resources_stays(world, tmp_path, capsys):
    world.add_complete("/their/python", tmp_path / "env", without=["pkg_resources"])
    world.states["/their/python"]["installed"]["setuptools"] = "82.0"
    assert setup_environment.main(["--python", "/their/python"]) == 0
    assert world.asked == []
    assert "setuptools 82.0 there has no pkg_resources" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, told",
    [
        ({"externally_managed": True}, "PEP 668"),
        ({"writable": False}, "is not writable"),
        ({"version": [3, 8, 18]}, "is Python 3.8.18; this project runs on 3.9 to 3.13"),
        ({"version": [3, 14, 0]}, "is Python 3.14.0; this project runs on 3.9 to 3.13"),
        ({"installed": {"torch": "1.13"}}, "torch 1.13 (needed: 2.1 or later)"),
    ],
)
def test_refusals_change_nothing(world, tmp_path, capsys, change, told):
    world.add_complete("/their/python", tmp_path / "env", without=["yacs"])
    world.states["/their/python"].update(change)
    assert setup_environment.main(["--python", "/their/python"]) == 1
    assert told in capsys.readouterr().out and world.asked == []


def test_environment_without_pip(world, tmp_path, capsys):
    world.add_complete("/their/python", tmp_path / "env", without=["yacs", "pip"])
    assert setup_environment.main(["--python", "/their/python"]) == 1
    assert "/their/python -m ensurepip" in capsys.readouterr().out


def test_python_that_is_absent_or_does_not_run(world, monkeypatch, capsys):
    assert setup_environment.main(["--python", "/absent/python"]) == 1
    assert "does not run" in capsys.readouterr().out
    monkeypatch.setattr(setup_environment.shutil, "which", lambda name: None)
    assert setup_environment.main(["--python", "pyton3"]) == 1
    assert "PYTHON=pyton3: there is no such program" in capsys.readouterr().out


def test_interruption_says_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_environment, "prepare", mock.Mock(side_effect=KeyboardInterrupt))
    assert setup_environment.main(["--venv", str(tmp_path / "env")]) == 130
    assert "run it again to go on" in capsys.readouterr().out


# --- A browser for the tests of the report page --------------------------------------------------------------


@pytest.mark.parametrize("extras, times", [(["dev", "report"], 1), (["report"], 0)])
def test_only_tests_need_a_browser(world, tmp_path, monkeypatch, extras, times):
    prepare = mock.Mock()
    monkeypatch.setattr(setup_environment, "prepare_browser", prepare)
    assert setup_environment.main(["--venv", str(tmp_path / "env"), "--extras", *extras]) == 0
    assert prepare.call_count == times
