"""Files that are there completely or not at all."""

import os
import stat

import pytest

from qmimic_d2.files import remove_leftovers, whole_file


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


def test_one_process_writes_one_file_twice_at_a_time(tmp_path):
    with whole_file(str(tmp_path / "a.json")) as first, whole_file(str(tmp_path / "a.json")) as second:
        assert first != second
        for path in (first, second):
            with open(path, "w") as file:
                file.write(path)
    assert os.listdir(tmp_path) == ["a.json"]


def test_content_and_name_are_on_the_disk_in_turn(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source, target):
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.chdir(tmp_path)
    for path in ("a.json", str(tmp_path / "b.json")):
        with whole_file(path) as partial, open(partial, "w") as file:
            file.write("x")
    assert done == ["file", "name", "folder"] * 2


def test_leftovers_are_hidden_end_unlike_the_file_and_can_be_removed(tmp_path):
    kept = ["model.pth", ".part", ".x.part", ".lock", "a.part", "last_checkpoint"]
    for name in kept:
        (tmp_path / name).touch()
    for keeps_ending in (True, False):
        with pytest.raises(KeyError), whole_file(str(tmp_path / "model.pth"), keeps_ending=keeps_ending) as partial:
            raise KeyError
        open(partial, "w").close()  # as after SIGKILL
        assert os.path.basename(partial).startswith(".") and partial.endswith(".pth") == keeps_ending
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
