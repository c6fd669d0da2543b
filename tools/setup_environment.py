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
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from environment_browser import prepare_browser
from environment_state import (
    CONSTRAINTS,
    EXTRAS,
    OWNED_UNFINISHED,
    ROOT,
    USERS_LOCK,
    USERS_UNFINISHED,
    SetupError,
    constraints_of,
    damaged_distributions,
    distribution_of,
    find_python,
    is_owned,
    is_supported,
    missing_requirements,
    probe,
    release,
    requirement_name,
    run,
    too_old,
    wanted,
)
from environment_steps import OR_OWN, Environment, say

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
    """The state of an environment in which Python runs and pip is whole, else None."""
    state = probe(environment.python)
    if not state or not is_supported(state["version"]) or "pip" not in state["installed"]:
        return None
    damaged = map(distribution_of, damaged_distributions(state["site_packages"]))
    return None if "pip" in damaged else state


def make_venv(environment, folder):
    python, version = find_python(os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)]))
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


def remove_damaged(site_packages, spared=()):
    """
    Makes pip forget what an interruption left half-installed, so that it installs that again.

    Args:
        spared: names of distributions that are not this script's own.
    """
    for info in damaged_distributions(site_packages):
        if distribution_of(info) not in spared:
            say(f"{info.name[: -len('.dist-info')]} was left half-installed; installing it again")
            shutil.rmtree(info)


def install_owned(environment):
    state = environment.look()
    requirements = [requirement for _, requirement in wanted(environment.extras)]
    if state["found"]["cv2"] and "opencv-python" not in state["installed"]:
        requirements.remove("opencv-python")  # the headless build is there instead
    say(
        f"installing {len(requirements)} packages and what they need into {environment.name}; "
        "the first time this takes minutes and gigabytes"
    )
    for remains in Path(state["site_packages"]).glob("~*"):  # set aside by a pip that was killed while replacing
        shutil.rmtree(remains, ignore_errors=True)
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
            f"{environment.name} has {', '.join(old)}. Nothing there is replaced: upgrade it yourself. {OR_OWN}"
        )
    lock = Path(state["site_packages"]) / USERS_LOCK
    with locked(lock, environment) if state["writable"] else contextlib.nullcontext():
        state, resumed = take_up(environment)
        missing = missing_requirements(state, environment.extras)
        # Found, but its distribution is not: what an interruption left of it.
        missing += [r for r in resumed if r not in missing and requirement_name(r) not in state["installed"]]
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
        environment.verify(installed_here=missing + resumed)
        environment.finish()


def take_up(environment):
    """The state of a user's environment, and the requirements that an interrupted run was to install there."""
    state = environment.look()
    note = environment.home(state) / USERS_UNFINISHED
    if not note.is_file():
        return state, []
    note = json.loads(note.read_text())
    remove_damaged(state["site_packages"], spared=note["installed"])
    return environment.look(), note["missing"]


def leave_note(environment, state, missing):
    """For `take_up`. What an earlier note says was installed stays: the rest is this script's doing."""
    note = environment.home(state) / USERS_UNFINISHED
    before = (
        json.loads(note.read_text()) if note.is_file() else {"installed": sorted(state["installed"]), "missing": []}
    )
    before["missing"] = sorted({*before["missing"], *missing})
    draft = note.with_suffix(".draft")
    draft.write_text(json.dumps(before))
    os.replace(draft, note)


def refuse_where_pip_may_not(environment, state, missing):
    lacking = ", ".join(missing + ([] if state["found"]["detectron2"] else ["Detectron2"]))
    remedy = f"Name an environment made with `python3 -m venv`. {OR_OWN}"
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
    leave_note(environment, state, missing)
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
        prepare_owned(Environment(executable, True, list(EXTRAS), venv), folder)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Prepares the environment of `make demo` and `make test`.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--venv", help="environment to make, or to complete where this made it")
    which.add_argument("--python", help="interpreter of an environment that is there; nothing in it is replaced")
    parser.add_argument(
        "--extras",
        nargs="*",
        choices=EXTRAS,
        default=list(EXTRAS),
        help="extras of setup.py that --python must have; --venv has them all (default: all)",
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options.venv, options.python, options.extras)
        if "dev" in options.extras:
            prepare_browser(os.environ)
    except (SetupError, OSError) as error:
        say(error)
        return 1
    except KeyboardInterrupt:
        say("interrupted; run it again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
