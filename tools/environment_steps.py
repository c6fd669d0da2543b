"""
The steps that both kinds of environment have in common: pip, Detectron2's wheel, the final check, the stamp.
setup_environment.py, beside this file, takes them. Standard library alone.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from environment_state import (
    DEEPER_IMPORTS,
    DETECTRON2_WHEEL,
    DETECTRON2_WHEEL_PYTHON,
    NEWEST,
    OLDEST,
    OWNED_STAMP,
    OWNED_UNFINISHED,
    USERS_STAMP,
    USERS_UNFINISHED,
    SetupError,
    digest,
    is_supported,
    last_json,
    missing_shared_library,
    probe,
    run,
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

OR_OWN = "Or leave out PYTHON= for an environment of this project's own."


def say(message):
    print(f"set-up: {message}", flush=True)


class Environment:
    """
    A Python environment that is made or completed.

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

    def home(self, state):
        """Where this script keeps its own files in the environment."""
        return Path(state["prefix"] if self.owned else state["site_packages"])

    def stamp(self, state):
        return self.home(state) / ((OWNED_STAMP if self.owned else USERS_STAMP) + digest(state))

    def is_done(self, state):
        stamp = self.stamp(state)
        return stamp.is_file() and set(self.extras) <= set(stamp.read_text().split())

    def finish(self):
        """Leaves the stamp, which holds the extras; only after `verify`."""
        state = self.look()
        home, stamp = self.home(state), self.stamp(state)
        unfinished = home / (OWNED_UNFINISHED if self.owned else USERS_UNFINISHED)
        if os.access(home, os.W_OK):  # where it is not, only the check is repeated next time
            for old in home.glob((OWNED_STAMP if self.owned else USERS_STAMP) + "*"):
                if old != unfinished:
                    old.unlink()
            stamp.write_text(" ".join(self.extras))
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
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
            if self.owned:
                remedy = f"Remove {self.name} and run this again."
            else:
                remedy = f"What was there before was not touched; repair it. {OR_OWN}"
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
