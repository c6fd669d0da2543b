"""One writer in a folder."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_training import ROOT

from qmimic_d2.folder_lock import FolderInUseError, alone_in, hold_folder

HOLDER = """
import os, sys, time
from folder_lock import hold_folder
hold_folder(sys.argv[1])
if os.fork() == 0:  # as a data-loader worker; it has let go when it runs
    print("held", flush=True)
time.sleep(600)
"""


def test_a_second_block_is_refused_until_the_first_ends(tmp_path):
    with alone_in(str(tmp_path)):
        with pytest.raises(FolderInUseError, match=f"at work in .* .process {os.getpid()} on .*; wait for its end"):
            with alone_in(str(tmp_path)):
                pass
        with alone_in(str(tmp_path / "..")):
            pass
    with alone_in(str(tmp_path)):
        pass


def test_a_process_may_hold_it_twice(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    hold_folder(str(folder))
    monkeypatch.chdir(tmp_path)
    hold_folder(os.path.join("a", "b"))
    with alone_in(str(folder)):  # a second run of the same process
        pass
    with pytest.raises(FolderInUseError), alone_in(str(tmp_path)):
        with alone_in(str(tmp_path)):
            pass


def test_a_killed_holder_lets_go_though_a_forked_child_lives(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    package = {"PYTHONPATH": str(ROOT / "qmimic_d2")}  # the module alone, which starts at once
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=package, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} on "):
            with alone_in(str(tmp_path)):
                pass
        holder.kill()
        holder.wait()
        with alone_in(str(tmp_path)):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_damaged_lock_file_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x1b[31m\x00" * 100)
    with alone_in(str(tmp_path)):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    import portalocker

    def no_locks(file, flags):
        raise portalocker.LockException("No locks available")

    monkeypatch.setattr(portalocker, "lock", no_locks)
    with alone_in(str(tmp_path)):
        assert "cannot be locked (No locks available): take care that one run alone writes there" in caplog.text
