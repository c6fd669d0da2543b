"""
What a Python environment is and has, and what follows from that. Nothing here changes anything;
setup_environment.py, beside this file, acts on it. Standard library alone.
"""

import csv
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 9), (3, 13)
# Python for a new environment: what this project was tested with comes first.
INTERPRETERS = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.9", "python3")

# (module, requirement, extra of setup.py or "" for always). What no `make` target runs, ruff, is not here.
REQUIREMENTS = (
    ("torch", "torch>=2.1", ""),
    ("torchvision", "torchvision>=0.16", ""),
    ("numpy", "numpy", ""),
    ("cv2", "opencv-python", ""),
    ("pycocotools", "pycocotools", ""),
    ("fvcore", "fvcore", ""),
    ("iopath", "iopath", ""),
    ("portalocker", "portalocker>=2.3", ""),
    ("yacs", "yacs", ""),
    ("scipy", "scipy", ""),
    ("sklearn", "scikit-learn", ""),
    ("tensorboard", "tensorboard", ""),
    ("pkg_resources", "setuptools<81", ""),
    # Detectron2's own: its wheel is installed with --no-deps, because it says numpy<2 without needing it.
    ("PIL", "Pillow>=7.1", ""),
    ("rich", "rich", ""),
    ("matplotlib", "matplotlib", ""),
    ("termcolor", "termcolor>=1.1", ""),
    ("tabulate", "tabulate", ""),
    ("cloudpickle", "cloudpickle", ""),
    ("tqdm", "tqdm>=4.29", ""),
    ("omegaconf", "omegaconf>=2.1,<2.4", ""),
    ("hydra", "hydra-core>=1.1", ""),
    ("packaging", "packaging", ""),
    ("onnx", "onnx", "export"),
    ("onnxruntime", "onnxruntime", "export"),
    ("jinja2", "jinja2", "report"),
    ("pytest", "pytest", "dev"),
    ("pytest_cov", "pytest-cov", "dev"),
    ("xdist", "pytest-xdist", "dev"),
)
EXTRAS = ("dev", "export", "report")

# The Python part of this wheel runs on every Python; its file name says 3.10 only.
DETECTRON2_WHEEL = "sal-detectron2==0.7.2"
DETECTRON2_WHEEL_PYTHON = "3.10"

# Imported for the final check besides the modules above: they fail where versions do not fit together.
DEEPER_IMPORTS = ("torchvision.ops", "pycocotools.mask", "sklearn.datasets", "detectron2.engine")

# Files in an environment that this set-up makes: each says that it is its own.
OWNED_UNFINISHED = ".qmimic_d2-setup-unfinished"
OWNED_STAMP = ".qmimic_d2-setup-"
# Files in site-packages of a user's environment.
USERS_UNFINISHED = ".qmimic_d2-installing"
USERS_STAMP = ".qmimic_d2-verified-"
USERS_LOCK = ".qmimic_d2-setup.lock"

# Runs in the environment's interpreter, and must at least parse in any other.
PROBE = r"""
import json, os, sys
answer = {"version": list(sys.version_info[:3]), "prefix": sys.prefix}
if sys.version_info >= (3, 9):
    import importlib.metadata, importlib.util, sysconfig
    sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]
    def found(name):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return False
        return spec is not None and spec.origin is not None  # a folder without code has no origin
    # Of an environment's interpreter: the one it was made with.
    answer["base"] = getattr(sys, "_base_executable", None) or sys.executable
    answer["found"] = dict((name, found(name)) for name in sys.argv[1:])
    answer["installed"] = installed = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # an interrupted pip left no metadata
            continue
        if name and version:
            installed.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    stdlib, purelib = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    answer["site_packages"] = purelib
    answer["writable"] = os.access(purelib, os.W_OK)
    answer["externally_managed"] = sys.prefix == sys.base_prefix and os.path.isfile(
        os.path.join(stdlib, "EXTERNALLY-MANAGED"))
print(json.dumps(answer))
"""
PROBED_BESIDES = ("detectron2", "pip", "venv", "ensurepip")


class SetupError(Exception):
    """What the user has to know and do, in full sentences."""


def run(command, lock=None):
    """
    Runs a command from the checkout.

    Args:
        command: program and arguments.
        lock: file descriptor that the process shares. Were only this script killed, the next set-up would wait
            until that process has ended too.

    Returns:
        Exit status, and standard output and error together.
    """
    process = subprocess.run(
        [str(part) for part in command],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=() if lock is None else (lock,),
    )
    return process.returncode, process.stdout


def last_json(output):
    """The last line, because a sitecustomize or a library may print above it; None where it is no JSON."""
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None


def probe(python):
    """What an interpreter is and has: a dict, or None where it does not run."""
    try:
        _, output = run([python, "-c", PROBE, *(module for module, _, _ in REQUIREMENTS), *PROBED_BESIDES])
    except OSError:
        return None
    state = last_json(output)
    return state if isinstance(state, dict) and "version" in state else None


def is_supported(version):
    return OLDEST <= tuple(version[:2]) <= NEWEST


def version_text(version):
    return ".".join(str(part) for part in version)


def release(version):
    """Leading numbers of a version, for comparison with a floor: "2.1.0a0+cu" -> (2, 1, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version).group().split(".") if part)


def requirement_name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower()


def wanted(extras):
    return [(module, requirement) for module, requirement, extra in REQUIREMENTS if not extra or extra in extras]


def missing_requirements(state, extras):
    return [requirement for module, requirement in wanted(extras) if not state["found"][module]]


def too_old(state, extras):
    """Installed distributions below this project's floor, as sentences' parts."""
    found = []
    for module, requirement in wanted(extras):
        floor = re.search(r">=([\d.]+)", requirement)
        version = state["installed"].get(requirement_name(requirement))
        if floor and version and state["found"][module] and release(version) < release(floor.group(1)):
            found.append(f"{requirement_name(requirement)} {version} (needed: {floor.group(1)} or later)")
    return found


def constraints_of(installed, pins):
    """
    Constraints under which pip cannot replace anything: what is installed as it is, and this project's
    pins for the rest.

    Args:
        installed: name -> version.
        pins: text of constraints.txt, or "" for none.
    """
    lines = [
        f"{name}=={version}"
        for name, version in sorted(installed.items())
        if re.match(r"\d+(!\d+)?(\.\d+)*((a|b|rc)\d+)?(\.?post\d+)?(\.?dev\d+)?(\+[\w.]+)?$", version)
    ]
    for line in pins.splitlines():
        name = line.partition("==")[0].strip()
        if "==" in line and not line.startswith("#") and name not in installed:
            lines.append(line)
    return "\n".join(lines) + "\n"


def missing_shared_library(error):
    """The library that an import error names, or None: "ImportError: libGL.so.1: cannot open ..."."""
    match = re.match(r"ImportError: (?:/\S*/)?(lib[^\s:]+\.so[^\s:]*): ", error)
    return match and match.group(1)


def digest(state):
    """Changes with whatever could make a finished set-up wrong."""
    parts = [str(ROOT), state["prefix"], version_text(state["version"])]
    parts += [f"{name}=={version}" for name, version in sorted(state["installed"].items())]
    parts += sorted(module for module, is_there in state["found"].items() if is_there)
    files = [CONSTRAINTS, ROOT / "setup.py", *sorted((ROOT / "tools").glob("*environment*.py"))]
    parts += [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def distribution_of(info):
    """ "scikit_learn-1.9.1.dist-info" -> "scikit-learn"."""
    return info.name.partition("-")[0].lower().replace("_", "-").replace(".", "-")


def is_owned(folder):
    return any(folder.glob(OWNED_STAMP + "*"))


def damaged_distributions(site_packages):
    """Distributions of which an interrupted pip left only a part: their .dist-info folders."""
    return [info for info in sorted(Path(site_packages).glob("*.dist-info")) if not is_whole(info)]


def is_whole(info):
    """
    Whether a distribution was installed to its end: pip writes INSTALLER after all of a wheel's files, and RECORD,
    with every file's size, last.
    """
    record = info / "RECORD"
    if not record.is_file() or not (info / "INSTALLER").is_file():
        return False
    with open(record, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            if len(row) != 3:
                return False
            path, _, size = row
            if path.endswith(".pyc"):
                continue
            try:
                actual = os.stat(info.parent / path).st_size
            except OSError:
                return False
            if size and int(size) != actual:
                return False
    return True


def find_python(search_path):
    """
    The interpreter to make an environment with. A name on PATH proves nothing: it has to run.

    Args:
        search_path: as in PATH.

    Returns:
        Its path and its version.

    Raises:
        SetupError: there is none; says what was seen and why it does not serve.
    """
    unsuitable = []
    for name in INTERPRETERS:
        for folder in search_path.split(os.pathsep):
            candidate = os.path.join(folder, name)
            state = probe(candidate) if os.access(candidate, os.X_OK) else None
            if state is None:
                continue
            version = version_text(state["version"])
            if not is_supported(state["version"]):
                unsuitable.append(f"{candidate} is Python {version}")
            elif not (state["found"]["venv"] and state["found"]["ensurepip"]):
                minor = version_text(state["version"][:2])
                unsuitable.append(f"{candidate} lacks the venv module (on Debian: apt install python{minor}-venv)")
            else:
                return state["base"] or candidate, version
    raise SetupError(
        f"no suitable Python on PATH; {version_text(OLDEST)} to {version_text(NEWEST)} with its venv module is "
        "needed. " + ("Seen: " + "; ".join(dict.fromkeys(unsuitable)) + "." if unsuitable else "None was seen.")
    )
