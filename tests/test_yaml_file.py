"""One YAML file as plain data: what is read, and what is refused."""

import os

import pytest
import yaml

from qmimic_d2.near_names import near_names
from qmimic_d2.yaml.arithmetic import compute
from qmimic_d2.yaml.file import read_yaml


def content_of(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(str(path))


def refusal(tmp_path, text):
    with pytest.raises(ValueError) as caught:
        content_of(tmp_path, text)
    message = str(caught.value)
    assert "a.yaml" in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", None),
        ("a: 1\nb: [1.5, true, null, x]\n", {"a": 1, "b": [1.5, True, None, "x"]}),
        ("a: &x [1, 2]\nb: *x\n", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1}\nb: {<<: *x, q: 2}\n", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("\ufeffa: é\n", {"a": "é"}),
        ("a: !!python/tuple [1, !!python/tuple [2]]\n", {"a": (1, (2,))}),
        ("a: [!!python/str x, !!python/unicode y, !!python/int '3', !!python/float '2', !!python/none '']\n",
         {"a": ["x", "y", 3, 2.0, None]}),
        ("a: [!!python/bool 'true', !!python/list [1], !!python/dict {b: 1}]\n", {"a": [True, [1], {"b": 1}]}),
        ('a: !!python/object/apply:eval ["[x * 2**(1.0/2) for x in [4, 8]]"]\n', {"a": [4 * 2**0.5, 8 * 2**0.5]}),
    ],
)  # fmt: skip
def test_plain_data(tmp_path, text, expected):
    assert content_of(tmp_path, text) == expected


def test_what_pyyaml_dumps_of_tuples_is_read_again(tmp_path):
    content = {"MODEL": {"SIZES": (32, (64.0, "x")), "NAMES": ["a"], "ON": True}}
    assert content_of(tmp_path, yaml.dump(content)) == content


CODE = [
    "!!python/object/apply:os.system ['touch MARK']",
    "!!python/object/new:os.system ['touch MARK']",
    "!!python/object/apply:subprocess.check_output [['touch', 'MARK']]",
    "!!python/object/apply:eval ['open(\"MARK\", \"w\")']",
    "!!python/object/apply:eval ['[__import__(\"os\").system(\"touch MARK\") for x in [1]]']",
    "!!python/object/apply:eval ['().__class__.__base__.__subclasses__()']",
    "!!python/object/apply:builtins.eval ['1']",
    "!!python/object/apply:exec ['1']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:yaml.YAMLObject {}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARK']",
]


@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_and_does_not_run(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    refusal(tmp_path, f"MODEL:\n  WEIGHTS: {code}\n")
    assert os.listdir(tmp_path) == ["a.yaml"]


@pytest.mark.parametrize("code", CODE[:1] + CODE[6:11])
def test_the_tag_and_its_line_are_named(tmp_path, code):
    message = refusal(tmp_path, f"MODEL:\n  WEIGHTS: {code}\n")
    assert code.partition(" ")[0] in message and "line 2" in message and "write the value itself" in message


def bomb(levels, width=10):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (bomb(9), "more than 100,000 values"),
        ("b0: &b0 {x: 1}\n" + "".join(f"b{n}: &b{n} {{p: *b{n - 1}}}\n" for n in range(1, 40)), "levels"),
        ("a: &a [*a]\n", "inside itself"),
        ("a: &a {b: {c: *a}}\n", "inside itself"),
        ("[" * 40 + "]" * 40, "32 levels"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("- " * 50_000 + "x", "nested too deeply"),
        ("a: " + "x" * 1_000_001, "more than 1,000,000 bytes"),
        ("a: [1\n", "ParserError"),
        ("a: *nowhere\n", "ComposerError"),
        ("\x00\x01", "ReaderError"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a: !!timestamp x\n", "AttributeError"),
        ("a: !!bool perhaps\n", "KeyError"),
        ("a: !!int x\n", "ValueError"),
        ("a: !mine x\n", "ConstructorError"),
        ("? [a]\n: 1\n", "ConstructorError"),
        ("a: 1\n---\nb: 2\n", "ComposerError"),
    ],
)  # fmt: skip
def test_what_is_no_config_is_refused(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


def test_a_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    for name in ("pipe.yaml", "loop.yaml", "."):
        with pytest.raises(FileNotFoundError, match="no ordinary file"):
            read_yaml(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_yaml(str(tmp_path / "absent.yaml"))


# --------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1 + 2 * 3 - -4 / 8", 7.5),
        ("7 // 2 + 7 % 4", 6),
        ("[[x, x * 2**(1.0/3)] for x in [32, 64]]", [[32, 32 * 2 ** (1 / 3)], [64, 64 * 2 ** (1 / 3)]]),
        ("[int(x * 0.1 * 640) for x in range(5, 8)]", [320, 384, 448]),
        ("(1, (2.5, 3))", (1, (2.5, 3))),
        ("[[x * y for y in [1, 2]] for x in [3, 4]]", [[3, 6], [4, 8]]),
        ("max(1, 2) + round(2.6) + float(1)", 6.0),
        ("[]", []),
    ],
)
def test_arithmetic(text, expected):
    result = compute(text)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1 +", "x", "'text'", "True", "None", "1j", "[1] * 3", "[1] + [2]", "1 if 1 else 2", "1 < 2"),
        *("lambda: 1", "{1: 2}", "open('x')", "(1).real", "[1][0]", "int('3')", "round(1.5, ndigits=0)"),
        *("[x for x in [1] if x]",),
        *("[x for x in 3]", "[x for x, y in [1]]", "9**9**9", "2**65", "10**16", "1e308 * 10", "1 / 0", "1 << 3"),
        *("range(10**6)", "range(10**30)", "[range(9999) for x in range(9)]", "(-1)**0.5", "-" * 5000 + "1"),
        *("+".join("1" * 999),),
        *("[" * 400 + "]" * 400, "int(1e400)", "f'{1}'", "*[1]", "(x := 1)", "__import__('os')"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        compute(text)


# --------------------------------------------------------------------------------------- near names


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("SOLVER.MAX_ITRE", ["SOLVER.MAX_ITER", "SEED"], ["SOLVER.MAX_ITER"]),
        ("solver.max_iter", ["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER"]),
        ("SOLVER.LOSS_WEIGHT", ["A.B.LOSS_WEIGHT", "SEED"], ["A.B.LOSS_WEIGHT"]),
        ("X.NAME", [f"SOME_LONG_SECTION_{n}.NAME" for n in range(4)], []),
        ("nothing", ["SEED"], []),
        ("a", [], []),
    ],
)
def test_near_names(name, known, expected):
    assert near_names(name, known) == expected
