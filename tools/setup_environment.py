#!/usr/bin/env python3
"""
Prepares the Python environment that `make demo` and `make test` run in; docs/install.md tells users how it
decides. It needs the standard library alone. Any Python from 3.9 on may run it; it finds the one to use itself.

`--venv FOLDER`  an environment made and owned by this script: every version is the one in constraints.txt.
`--python EXE`   the user's environment: only what is missing is installed, and nothing is ever replaced.

A run that was killed is taken up by the next one. A run that finds its stamp changes nothing and ends at once.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from environment_state import (
    CONSTRAINTS,
    DEEPER_IMPORTS,
    DETECTRON2_WHEEL,
    DETECTRON2_WHEEL_PYTHON,
    EXTRAS,
    NEWEST,
    OLDEST,
    OWNED_STAMP,
    OWNED_UNFINISHED,
    ROOT,
    VERIFIED_STAMP,
    SetupError,
    constraints_of,
    damaged_distributions,
    digest,
    find_python,
    is_owned,
    is_supported,
    last_json,
    missing_requirements,
    missing_shared_library,
    probe,
    release,
    run,
    too_old,
    version_text,
    wanted,
)

IMPORT_CHECK = r"""
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = "%s: %s" % (type(error).__name__, error)
print(json.dumps(failed))
"""


def say(message):
    print(f"set-up: {message}", flush=True)


class Environment:
    """
    One environment and the steps that both kinds have in common.

    Args:
        python: its interpreter.
        owned: whether this script made it and may replace what is in it.
        extras: extras of setup.py that are wanted.
        name: how the user calls it.
    """

    def __init__(self, python, owned, extras, name):
        self.python = python
        self.owned = owned
        self.extras = extras
        self.name = name
        self.lock = None

    def look(self):
        state = probe(self.python)
        if state is None:
            raise SetupError(f"{self.name} does not run as a Python interpreter.")
        if not is_supported(state["version"]):
            raise SetupError(
                f"{self.name} is Python {version_text(state['version'])}; this project runs on "
                f"{version_text(OLDEST)} to {version_text(NEWEST)}."
            )
        return state

    def pip(self, *arguments):
        """Runs pip; raises with its output where it fails."""
        status, output = self.try_pip(*arguments)
        if status:
            raise SetupError(f"pip failed in {self.name} with this output:\n{output}\nset-up: run it again to go on.")

    def try_pip(self, *arguments):
        return run([self.python, "-m", "pip", "--disable-pip-version-check", *arguments], self.lock)

    def stamp(self, state):
        prefix = OWNED_STAMP if self.owned else VERIFIED_STAMP
        return Path(state["prefix"]) / (prefix + digest(state, self.extras))

    def is_done(self, state):
        return self.stamp(state).is_file() and state["found"]["detectron2"]

    def finish(self):
        """Leaves the stamp; only after `verify`."""
        state = self.look()
        stamp = self.stamp(state)
        try:
            for old in stamp.parent.glob((OWNED_STAMP if self.owned else VERIFIED_STAMP) + "*"):
                if old.name != OWNED_UNFINISHED:
                    old.unlink()
            stamp.write_text("Left by tools/setup_environment.py of qmimic_d2 after every import was seen to work.\n")
            with contextlib.suppress(FileNotFoundError):
                (stamp.parent / OWNED_UNFINISHED).unlink()
        except OSError:
            if self.owned:
                raise
            # A user's environment that is read-only only costs the check again next time.
        self.report_ready(state)

    def report_ready(self, state):
        detectron2 = next((n for n in ("detectron2", "sal-detectron2") if n in state["installed"]), "")
        detectron2 = f"{detectron2 or 'detectron2'} {state['installed'].get(detectron2, '(not from pip)')}"
        torch = f"torch {state['installed'].get('torch', '(not from pip)')}"
        say(f"{self.name} is ready: Python {version_text(state['version'])}, {torch}, {detectron2}")

    def install_detectron2(self, state):
        """
        Installs the wheel beside site-packages first and moves it there last, so that an interruption leaves
        either no Detectron2 or a whole one.
        """
        say(f"installing Detectron2 ({DETECTRON2_WHEEL}) into {self.name}")
        site_packages = Path(state["site_packages"])
        staging = site_packages / ".qmimic_d2-detectron2"
        shutil.rmtree(staging, ignore_errors=True)
        self.pip(
            *("install", "--no-deps", "--only-binary=:all:", "--python-version", DETECTRON2_WHEEL_PYTHON),
            *("--target", staging, DETECTRON2_WHEEL),
        )
        keep_python_part(staging)
        for item in sorted(staging.iterdir(), key=lambda path: path.name == "detectron2"):
            target = site_packages / item.name
            if target.exists() and (self.owned or item.name.endswith(".dist-info")):
                shutil.rmtree(target)
            if target.exists():
                raise SetupError(f"{target} is in the way: it holds no Detectron2. Remove it and run this again.")
            os.rename(item, target)
        shutil.rmtree(staging)

    def verify(self, installed_here):
        """
        Imports everything in a process of its own.

        Args:
            installed_here: requirements that this run installed. OpenCV among them may be replaced by its
                headless build, where a machine lacks the libraries of the other.
        """
        failed = self.failing_imports()
        library = missing_shared_library(failed.get("cv2", ""))
        if library and "opencv-python" in installed_here:
            version = self.look()["installed"]["opencv-python"]
            say(f"opencv-python needs {library}, which this machine lacks: using opencv-python-headless {version}")
            self.pip("uninstall", "--yes", "opencv-python")
            self.pip("install", "--no-deps", f"opencv-python-headless=={version}")
            failed = self.failing_imports()
        if failed:
            lines = "".join(f"\n  import {name}: {error}" for name, error in failed.items())
            remedy = (
                f"Remove {self.name} and run this again."
                if self.owned
                else (
                    "What was there before was not touched; repair it, or leave out PYTHON= for an environment of its own."
                )
            )
            raise SetupError(f"not everything imports in {self.name}:{lines}\n{remedy}")

    def failing_imports(self):
        state = self.look()
        modules = [module for module, _ in wanted(self.extras) if module != "pkg_resources" or state["found"][module]]
        status, output = run([self.python, "-c", IMPORT_CHECK, *modules, *DEEPER_IMPORTS], self.lock)
        failed = last_json(output)
        if failed is None:
            raise SetupError(f"{self.name} stopped with status {status} while importing:\n{output}")
        return failed


def keep_python_part(staging):
    """
    Takes out of the Detectron2 wheel what must not reach an environment: its extension, compiled against
    another torch, and a top-level package with the name "tools".
    """
    unwanted = re.compile(r"(tools/|detectron2/_C\.)")
    shutil.rmtree(staging / "tools", ignore_errors=True)
    for extension in (staging / "detectron2").glob("_C.*"):
        extension.unlink()
    for record in staging.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines(True)
        record.write_text("".join(line for line in lines if not unwanted.match(line)), encoding="utf-8")


# --- An environment that this script makes -------------------------------------------------------------------


def prepare_owned(environment, folder):
    """Makes or completes the environment in `folder`, with the versions of constraints.txt throughout."""
    state = probe(environment.python)
    if state and is_supported(state["version"]) and environment.is_done(state):
        environment.report_ready(state)
        return
    with locked(Path(f"{folder}.lock"), environment):
        state = working_state(environment)
        if state and environment.is_done(state):  # by the set-up that held the lock
            environment.report_ready(state)
            return
        was_interrupted = (folder / OWNED_UNFINISHED).is_file()
        if state is None:
            make_venv(environment, folder)
            state = environment.look()
        (folder / OWNED_UNFINISHED).touch()
        if was_interrupted:
            remove_damaged(state["site_packages"])
        install_owned(environment)
        environment.finish()


def working_state(environment):
    """The state of an environment in which Python and pip run, else None."""
    state = probe(environment.python)
    works = state and is_supported(state["version"]) and environment.try_pip("--version")[0] == 0
    return state if works else None


def make_venv(environment, folder):
    python, version = find_python()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNED_UNFINISHED).touch()
    for item in folder.iterdir():
        if item.name == OWNED_UNFINISHED:  # stays, so that the folder is known as this script's own throughout
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
    say(f"making {environment.name} with {python} (Python {version})")
    status, output = run([python, "-m", "venv", folder], environment.lock)
    if status:
        raise SetupError(f"{python} -m venv failed with this output:\n{output}")


def remove_damaged(site_packages):
    """Makes pip forget what an interruption left half-installed, so that it installs that again."""
    for info in damaged_distributions(site_packages):
        say(f"{info.name[: -len('.dist-info')]} was left half-installed; installing it again")
        shutil.rmtree(info)
    for remains in Path(site_packages).glob("~*"):  # what pip had set aside while it replaced something
        shutil.rmtree(remains, ignore_errors=True)


def install_owned(environment):
    state = environment.look()
    requirements = [requirement for _, requirement in wanted(environment.extras)]
    if state["found"]["cv2"] and "opencv-python" not in state["installed"]:
        requirements.remove("opencv-python")  # the headless build is there instead
    say(
        f"installing {len(requirements)} packages and what they need into {environment.name}; "
        "the first time this takes minutes and gigabytes"
    )
    # pip before 25 falls back to running setup.py itself where the wheel package is absent.
    build = ["--use-pep517"] if release(state["installed"].get("pip", "0")) < (25,) else []
    environment.pip("install", *build, "--constraint", CONSTRAINTS, *requirements)
    if not state["found"]["detectron2"]:
        environment.install_detectron2(state)
    say(f"installing this project into {environment.name}, editable")
    environment.pip("install", *build, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    environment.verify(installed_here=requirements)


# --- An environment that the user has ------------------------------------------------------------------------


def prepare_users(environment):
    """Installs what is missing, and nothing else; this project is not installed, as it runs from the checkout."""
    state = environment.look()
    if environment.is_done(state):
        environment.report_ready(state)
        return
    old = too_old(state, environment.extras)
    if old:
        raise SetupError(
            f"{environment.name} has {', '.join(old)}. Nothing there is replaced: upgrade it yourself, or leave "
            "out PYTHON= for an environment of its own."
        )
    lock = Path(state["prefix"]) / ".qmimic_d2-setup.lock"
    with locked(lock, environment) if os.access(state["prefix"], os.W_OK) else contextlib.nullcontext():
        state = environment.look()
        missing = missing_requirements(state, environment.extras)
        if "setuptools<81" in missing and "setuptools" in state["installed"]:
            missing.remove("setuptools<81")
            say(
                f"setuptools {state['installed']['setuptools']} there has no pkg_resources, so detectron2.model_zoo "
                "does not import; left as it is"
            )
        if missing or not state["found"]["detectron2"]:
            refuse_where_pip_may_not(environment, state, missing)
        if missing:
            install_missing(environment, state, missing)
        if not state["found"]["detectron2"]:
            environment.install_detectron2(state)
        environment.verify(installed_here=missing)
        environment.finish()


def refuse_where_pip_may_not(environment, state, missing):
    lacking = ", ".join(missing + ([] if state["found"]["detectron2"] else ["Detectron2"]))
    remedy = "Leave out PYTHON= for an environment of its own, or name one made with `python3 -m venv`."
    if state["externally_managed"]:
        raise SetupError(
            f"{environment.name} belongs to the operating system, which does not let pip install there (PEP 668). "
            f"It lacks {lacking}. {remedy}"
        )
    if not state["writable"]:
        raise SetupError(f"{environment.name} lacks {lacking}, and {state['site_packages']} is not writable. {remedy}")
    if not state["found"]["pip"]:
        raise SetupError(
            f"{environment.name} lacks {lacking}, and has no pip to install it. Add pip with "
            f"`{environment.python} -m ensurepip`. {remedy}"
        )


def install_missing(environment, state, missing):
    say(f"installing into {environment.name}, where they are missing: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        arguments = ("install", "--constraint", constraints, *missing)
        constraints.write_text(constraints_of(state["installed"], CONSTRAINTS.read_text(encoding="utf-8")))
        status, _ = environment.try_pip(*arguments)
        if status:
            say("the tested versions do not fit what is there; letting pip choose versions that do")
            constraints.write_text(constraints_of(state["installed"], ""))
            environment.pip(*arguments)


# --- Command line --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path, environment):
    """One set-up at a time for one environment; `make demo` and `make test` may be started together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up is at work on {environment.name}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        environment.lock = file.fileno()
        try:
            yield
        finally:
            environment.lock = None


def prepare(venv, python, extras):
    if python:
        path = shutil.which(python)
        if path is None:
            raise SetupError(f"PYTHON={python}: there is no such program.")
        # Not resolved: an environment's python is a link, and where it points to there is none of it.
        prepare_users(Environment(os.path.abspath(path), False, extras, python))
        return
    folder = Path(os.path.abspath(os.path.expanduser(venv)))
    executable = str(folder / "bin" / "python")
    if folder.is_dir() and any(folder.iterdir()) and not is_owned(folder):
        if probe(executable) is None:
            raise SetupError(f"{venv} is neither empty nor a Python environment. Name another with VENV=.")
        say(f"{venv} was not made by this set-up: it is used as with PYTHON={venv}/bin/python")
        prepare_users(Environment(executable, False, extras, venv))
    else:
        prepare_owned(Environment(executable, True, extras, venv), folder)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Prepares the environment of `make demo` and `make test`.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--venv", help="environment to make, or to complete where this made it")
    which.add_argument("--python", help="interpreter of an environment that is there; nothing in it is replaced")
    parser.add_argument("--extras", default=",".join(EXTRAS), help="extras of setup.py (default: %(default)s)")
    options = parser.parse_args(arguments)
    extras = [extra for extra in options.extras.split(",") if extra]
    if not set(extras) <= set(EXTRAS):
        parser.error(f"--extras: known are {', '.join(EXTRAS)}")
    try:
        prepare(options.venv, options.python, extras)
    except SetupError as error:
        say(error)
        return 1
    except KeyboardInterrupt:
        say("interrupted; run it again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
