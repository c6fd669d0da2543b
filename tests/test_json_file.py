"""JSON files: what is read of them, whatever is in them."""

import json
import os

import pytest

from qmimic_d2.files import parse_json, read_json, write_json


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[1, 2.5, true, null]", [1, 2.5, True, None]),
        ("[NaN, Infinity, -Infinity, 1e309, -1e999]", [None] * 5),
        ('{"a": ' + "9" * 5000 + ', "b": 1e308}', {"a": None, "b": 1e308}),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_every_number_is_finite_and_fits_a_float(text, expected):
    assert parse_json(text) == expected


def test_what_was_written_is_read(tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"a": [1.0, float("nan")], "b": "\u00e9"})
    assert read_json(path) == {"a": [1.0, None], "b": "\u00e9"}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_no_json_is_an_error_that_names_the_file(tmp_path, data, words):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(str(path))
    assert "a.json" in str(caught.value) and words in str(caught.value)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in (("pipe.json", "no ordinary file"), (".", "no ordinary file"), ("absent.json", "is not there")):
        with pytest.raises(FileNotFoundError, match=words):
            read_json(str(tmp_path / name))


def test_deep_but_readable_content_is_read():
    assert parse_json("[" * 50 + "]" * 50) == json.loads("[" * 50 + "]" * 50)
