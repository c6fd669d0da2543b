"""Imports point one way, and the house rules that a parser can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qmimic_d2"

# From the ground up. A module stands on the layer of its longest prefix here, and imports nothing above it.
# What is not named stands on the ground: config, config_files, checkpoint, data and the like.
LAYERS = [
    [],
    ["modeling", "diagnostics"],  # quantizers, hooks, pooling, backbones: everything that is not named below
    ["modeling.mimic"],
    ["modeling.trunk_adapter"],
    ["modeling.attach"],
    ["modeling.meta_arch"],
    ["lazy_config", "analysis", "evaluation", "export"],
    ["engine", "inference"],
    ["report"],
    ["distill"],
    ["cli", "__main__"],
]
LAYER_OF = {f"qmimic_d2.{name}": index for index, names in enumerate(LAYERS) for name in names}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def is_package(name):
    return SOURCES[name].name == "__init__.py"


def layer(name):
    while name and name not in LAYER_OF:
        name = name.rpartition(".")[0]
    return LAYER_OF.get(name, 0)


def imports(name):
    """Modules of the package that a module imports, wherever in it: the module or package itself, not its names."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                keep = len(parts) - node.level + is_package(name)
                base = ".".join([*parts[:keep], *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base)
    return sorted(each for each in found if each.split(".")[0] == "qmimic_d2" and each != name)


def test_the_package_is_found():
    assert {"qmimic_d2", "qmimic_d2.config", "qmimic_d2.modeling.quantizer"} <= set(SOURCES)
    assert imports("qmimic_d2.modeling.quantizer_hook") == ["qmimic_d2.modeling.quantizer"]
    assert "qmimic_d2.modeling" in imports("qmimic_d2")
    assert layer("qmimic_d2.config") < layer("qmimic_d2.modeling.backbone.vgg") < layer("qmimic_d2.modeling.mimic")


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name):
    for imported in imports(name):
        assert imported in SOURCES, f"{name} imports {imported}, which is not there"
        if is_package(name) and imported.startswith(f"{name}."):
            continue
        if imported == "qmimic_d2":  # which imports data and models
            assert layer(name) == len(LAYERS) - 1, f"{name} imports the package's top; name the module it needs"
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which stands above it"


def test_no_module_imports_itself_through_others():
    def follow(name, path):
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name in done:
            return
        for imported in imports(name):
            # a package's own modules run before the rest of its __init__
            if not imported.startswith(f"{name}."):
                follow(imported, [*path, name])
        done.add(name)

    done = set()
    for name in SOURCES:
        follow(name, [])


@pytest.mark.parametrize("name", SOURCES)
def test_house_rules(name):
    text = SOURCES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{name} has more than 400 lines; a file holds one concept"
    assert ast.get_docstring(TREES[name]) or not TREES[name].body, f"{name} has no docstring"
    for node in ast.walk(TREES[name]):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{place}: star import"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name.startswith("qmimic_d2.cli"), f"{place}: print; use the module's logger"
        if isinstance(node, ast.Assert):
            assert "cfg" not in names_in(node), f"{place}: a user's mistake in the config is no assertion; raise"
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and is_keyword_only(node):
            assert "cfg" not in names_in(node), f"{place}: cfg is read by from_config, not by __init__"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not MACHINE_PATH.search(node.value), f"{place}: a path of one machine: {node.value!r}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_files_of_tests_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{path.name} has {lines} lines; split it by behaviour"


MACHINE_PATH = re.compile(r"(?<![\w.:~/])(/(home|root|Users|mnt|media|opt|work|workspace|tmp|scratch)/|[A-Z]:\\\\?\w)")


def names_in(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def is_keyword_only(function):
    arguments = function.args
    return bool(arguments.kwonlyargs) and len(arguments.posonlyargs + arguments.args) == 1


def test_paths_of_a_machine_are_recognized():
    for path in ("/" "home/user/data", "in /tmp/x", "C:\\data", "'/" "root/.cache'"):
        assert MACHINE_PATH.search(path), path
    for path in ("configs/" "home/x.yaml", "https://host/tmp/x", "a/opt/b", "~/tmp/x", "./" "work/x", "s3://" "root/x"):
        assert not MACHINE_PATH.search(path), path


# What a family is known by: Detectron2's classes, the nodes of its heads, its modules.
FAMILY_CLASSES = {"GeneralizedRCNN", "RetinaNet", "FCOS", "DenseDetector", "ProposalNetwork", "PanopticFPN"}
FAMILY_TEXTS = {"ROI_HEADS", "RETINANET", "FCOS", "roi_heads", "head", "head_in_features", *FAMILY_CLASSES}


def decisions_of_family(tree):
    """
    Lines that decide which family a detector is, wherever a name or text of a family is compared or looked up.

    Only one use of a family's class is no decision: to derive a registered class from it.
    """
    bases = {id(each) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for each in node.bases}
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "attr", "")) if id(node) not in bases else ""
        is_node_of_cfg = getattr(getattr(node, "value", None), "attr", "") == "MODEL"
        if name in FAMILY_CLASSES and not is_node_of_cfg:
            yield node.lineno
        is_test = isinstance(node, ast.Compare) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
        )
        if is_test and any(isinstance(each, ast.Constant) and each.value in FAMILY_TEXTS for each in ast.walk(node)):
            yield node.lineno


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "qmimic_d2.modeling.family"])
def test_one_module_decides_the_family(name):
    places = [f"{name}:{line}" for line in decisions_of_family(TREES[name])]
    assert not places, f"{places} decide the family of a detector; ask qmimic_d2.modeling.family"


def test_decisions_of_family_are_recognized():
    home = "qmimic_d2.modeling.family"
    assert len(list(decisions_of_family(TREES[home]))) > 5
    for text in ("isinstance(model, FCOS)", "x is m.RetinaNet", "{GeneralizedRCNN: 1}", "hasattr(model, 'roi_heads')",
                 "section == 'FCOS'", "name in ('RETINANET', 'FCOS')"):
        assert list(decisions_of_family(ast.parse(text))), text
    for text in ("class QuantFCOS(FCOS): pass", "from x import FCOS", "cfg.MODEL.FCOS", "model.roi_heads"):
        assert not list(decisions_of_family(ast.parse(text))), text
