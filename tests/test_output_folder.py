"""An OUTPUT_DIR that a run cannot write to is refused before the run, and what the check makes is gone again."""

import os
from pathlib import Path

import pytest

from qmimic_d2.engine.checks.output_folder import check_output_dir


def entries(folder):
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("name", ["new", "new/of/a run/ünïcode", "there", "there/new"])
def test_a_usable_folder_is_left_as_it_was(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "log.txt").write_text("earlier\n")
    before = entries(tmp_path)
    check_output_dir(str(tmp_path / name))
    assert entries(tmp_path) == before


def test_a_relative_folder_and_one_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    for name in ("./output", "there/../output", "link/output"):
        check_output_dir(name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "there"]


def make_file(path):
    path.write_text("a file")


def make_dangling_link(path):
    path.symlink_to("nowhere")


UNUSABLE = {
    "file": (make_file, "it is no folder"),
    "fifo": (os.mkfifo, "it is no folder"),
    "dangling link": (make_dangling_link, "leads nowhere"),
}


@pytest.mark.parametrize("below", ["", "run/1"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_folder(tmp_path, kind, below):
    make, words = UNUSABLE[kind]
    make(tmp_path / "output")
    path = str(tmp_path / "output" / below)
    with pytest.raises(ValueError) as refused:
        check_output_dir(path)
    message = str(refused.value)
    assert f"OUTPUT_DIR is {path!r}" in message and words in message and "Name a folder" in message
    assert [each.name for each in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize(
    "value, words",
    [
        ("", "name a folder"),
        ("  ", "name a folder"),
        ("s3://bucket/run", "an address"),
        ("a\0b", "choose a name"),
        ("x" * 300, "too long"),
        ("/proc/version/run", "no folder"),
    ],
)
def test_what_names_no_folder(tmp_path, monkeypatch, value, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        check_output_dir(value)
    assert f"OUTPUT_DIR is {value!r}" in str(refused.value) and words in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is .*Permission denied.*that you may write to"):
        check_output_dir(str(tmp_path / "output"))


def test_a_full_disk(tmp_path, monkeypatch):
    def refuse(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ValueError, match="OUTPUT_DIR is .*No space left on device"):
        check_output_dir(str(tmp_path / "output"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, make",
    [
        ("metrics.json", Path.mkdir),
        ("log.txt", os.mkfifo),
        ("config.yaml", make_dangling_link),
        ("inference", make_file),
        ("model_final.pth", Path.mkdir),
    ],
)
def test_a_name_that_the_run_needs_is_taken(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError) as refused:
        check_output_dir(str(tmp_path))
    assert "OUTPUT_DIR" in str(refused.value) and str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("name", ["a\x1b[31mred", "two\nlines", "\x07"])
def test_characters_that_act_on_a_terminal(tmp_path, name):
    path = str(tmp_path / name)
    with pytest.raises(ValueError) as refused:
        check_output_dir(path)
    assert str(refused.value).startswith(f"OUTPUT_DIR is {path!r}") and str(refused.value).isprintable()
    assert list(tmp_path.iterdir()) == []
