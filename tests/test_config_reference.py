"""docs/config.md: every key is in it, with its default and its comment, and it is up to date."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from qmimic_d2 import add_qmimic_config
from qmimic_d2.config_files import get_config_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "generate_config_reference.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_config_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def page(generator):
    return generator.TARGET.read_text(encoding="utf-8")


def flatten(node, prefix=""):
    flat = {}
    for key, value in node.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return flat


def added_keys():
    stock, cfg = flatten(get_cfg()), get_cfg()
    add_qmimic_config(cfg)
    return {key: value for key, value in flatten(cfg).items() if key not in stock}


def rows_of(page):
    """{full name of a key: [type, default, meaning]}"""
    rows, node = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            node = line[3:].strip("`")
        elif line.startswith("| `") and node.isupper():
            key, *cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows[f"{node}.{key.strip('`')}"] = cells
    return rows


def test_page_is_up_to_date(generator, page):
    fresh = generator.render(generator.read_nodes(generator.SOURCE.read_text(encoding="utf-8")))
    assert page == fresh, "run: python tools/generate_config_reference.py"


def test_every_added_key_is_in_it_and_no_other(page):
    keys = added_keys()
    assert len(keys) > 20
    assert sorted(rows_of(page)) == sorted(keys)


def test_types_and_defaults_are_those_of_the_config(page):
    rows = rows_of(page)
    for key, value in added_keys().items():
        kind, default, meaning = rows[key]
        assert kind == type(value).__name__, key
        assert yaml.safe_load(default.strip("`")) == value, key
        assert len(meaning) > 10, key


def test_every_section_is_linked_and_there(page):
    sections = [line[3:].strip("`") for line in page.splitlines() if line.startswith("## `")]
    assert "MODEL.QMIMIC.MIMIC" in sections
    for section in sections:
        assert f"[`{section}`](#{section.replace('.', '').lower()})" in page


def test_example_is_a_config_of_this_package(page, tmp_path):
    example = page.split("```yaml\n")[1].split("```")[0]
    base = get_config_file("Base-FasterRCNN-VGG.yaml")
    (tmp_path / "student.yaml").write_text(example.replace("Base-FasterRCNN-VGG.yaml", base))
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.merge_from_file(str(tmp_path / "student.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert cfg.MODEL.QMIMIC.QUANTIZER.STRIDE == 0.5 and cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE == "teacher.yaml"


def run(monkeypatch, generator, tmp_path, *arguments, content=None):
    target = tmp_path / "config.md"
    if content is not None:
        target.write_text(content, encoding="utf-8")
    monkeypatch.setattr(generator, "TARGET", target)
    return generator.main(list(arguments)), target


def test_it_writes_the_page(monkeypatch, generator, page, tmp_path):
    status, target = run(monkeypatch, generator, tmp_path)
    assert status == 0 and target.read_text(encoding="utf-8") == page


@pytest.mark.parametrize("content", [None, "", "# Config reference\n"])
def test_check_fails_where_the_page_is_old_and_leaves_it(monkeypatch, generator, tmp_path, capsys, content):
    status, target = run(monkeypatch, generator, tmp_path, "--check", content=content)
    assert status == 1
    assert "python tools/generate_config_reference.py" in capsys.readouterr().err
    assert target.exists() == (content is not None) and (content is None or target.read_text() == content)


def test_check_passes_from_any_folder_without_the_package(tmp_path):
    command = [sys.executable, "-S", str(SCRIPT), "--check"]  # -S: no site-packages
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


SOURCE = '''
from detectron2.config import CfgNode as CN


def add_qmimic_config(config):
    """Not a comment."""
    if "A" in config:
        return
    config.A = _node()
    # A key of a node that is there already.
    config.OLD.KEY = 3
    _more(config.B.C)


def _node():
    made = CN()

    # What the node
    # is for.
    made.SUB = CN()
    # One of "x|y" and 2*3*4, see SUB.KEY_TWO, OLD.KEY and `a|*b`.
    # Over two lines.
    made.SUB.KEY_ONE = ["x"]  # not this one
    # No blank line stands between.
    made.SUB.KEY_TWO = True
    return made


def _more(node):
    # About the whole node.

    # About the key.
    node.NAME = ""
'''


def test_comments_are_found(generator):
    nodes = {node.name: node for node in generator.read_nodes(SOURCE)}
    assert list(nodes) == ["A.SUB", "OLD", "B.C"]
    assert [nodes[name].comment for name in nodes] == ["What the node is for.", "", "About the whole node."]
    keys = {f"{node.name}.{key.name}": key for node in nodes.values() for key in node.keys}
    assert {name: key.default for name, key in keys.items()} == {
        "A.SUB.KEY_ONE": ["x"],
        "A.SUB.KEY_TWO": True,
        "OLD.KEY": 3,
        "B.C.NAME": "",
    }
    assert keys["A.SUB.KEY_ONE"].comment.endswith("`a|*b`. Over two lines.")
    assert keys["A.SUB.KEY_TWO"].comment == "No blank line stands between."
    assert keys["OLD.KEY"].comment == "A key of a node that is there already."
    assert keys["B.C.NAME"].comment == "About the key."


def test_markdown_of_a_comment(generator):
    text = generator._markdown('One of "x|y", 2*3 <= 6, see SUB.KEY_TWO, LOSS_WEIGHT, FPN 1.0 and `a|*b "c"`.')
    assert text == 'One of `"x\\|y"`, 2\\*3 &lt;= 6, see `SUB.KEY_TWO`, `LOSS_WEIGHT`, FPN 1.0 and `a\\|*b "c"`.'


def test_literals_are_those_of_a_yaml(generator):
    for value, text in ((True, "True"), (1.0, "1.0"), (["a", 1], '["a", 1]'), ("", '""')):
        assert generator._literal(value) == text
        assert yaml.safe_load(text) == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("# About the key.\n", "\n", "B.C.NAME has no comment above it"),
        ('node.NAME = ""', "node.NAME = DEFAULT", "the default of B.C.NAME is no literal"),
    ],
)
def test_a_key_that_cannot_be_told_of_is_an_error(generator, old, new, message):
    with pytest.raises(ValueError, match=message):
        generator.read_nodes(SOURCE.replace(old, new))
