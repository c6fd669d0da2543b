"""Files that are there completely or not at all."""

import os

import pytest

from qmimic_d2.whole_file import whole_file


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "model.onnx"
    with whole_file(str(target)) as partial:
        assert os.path.dirname(partial) == str(tmp_path) and partial.endswith(".onnx")
        with open(partial, "w") as file:
            file.write("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(error):
        with whole_file(str(target)) as partial:
            with open(partial, "w") as file:
                file.write("ha")
            raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_block_that_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        with whole_file(str(tmp_path / "model.onnx")):
            pass
    assert os.listdir(tmp_path) == []


def test_two_processes_do_not_write_into_each_others(tmp_path, monkeypatch):
    target = tmp_path / "maps.pth"
    with whole_file(str(target)) as first:
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            with whole_file(str(target)) as second:
                assert second != first
                with open(first, "w") as file:
                    file.write("first")
                with open(second, "w") as file:
                    file.write("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["maps.pth"]
