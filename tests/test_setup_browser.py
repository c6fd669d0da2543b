"""tools/environment_browser.py: a browser for the tests of the report page. No test starts a program."""

import pytest

import environment_browser


class Machine:
    """
    Programs by name on PATH.

    Attributes:
        programs: name -> exit status.
        asked: commands, in order.
        brings: programs that apt-get install brings.
    """

    def __init__(self, monkeypatch, **programs):
        self.programs = {name.replace("_", "-"): status for name, status in programs.items()}
        self.asked = []
        self.brings = {}
        monkeypatch.setattr(environment_browser.shutil, "which", lambda name: name if name in self.programs else None)
        monkeypatch.setattr(environment_browser, "run", self.run)
        monkeypatch.setattr(environment_browser.os, "geteuid", lambda: 0)
        monkeypatch.setattr(environment_browser.sys, "platform", "linux")

    def run(self, command, lock=None):
        if command[0] == "env":
            self.asked.append(" ".join(part for part in command if part in ("update", "install", "chromium")))
            self.programs.update(self.brings if "install" in command else {})
            return self.programs["apt-get"], "E: Unable to locate package chromium\n"
        if self.programs[command[0]] is None:
            raise PermissionError(command[0])
        return self.programs[command[0]], ""


def test_the_browser_is_one_that_runs(monkeypatch):
    Machine(monkeypatch, chromium=1, chromium_browser=None, google_chrome=0)
    assert environment_browser.find_browser({}) == "google-chrome"
    assert environment_browser.find_browser({"CHROMIUM": ""}) is None
    assert environment_browser.find_browser({"CHROMIUM": "google-chrome"}) == "google-chrome"
    for name in ("chromium", "absent"):
        with pytest.raises(FileNotFoundError, match=f"CHROMIUM is '{name}', which does not run"):
            environment_browser.find_browser({"CHROMIUM": name})


def test_a_browser_that_is_there_is_used(monkeypatch, capsys):
    machine = Machine(monkeypatch, chromium=0, apt_get=0)
    environment_browser.prepare_browser({})
    environment_browser.prepare_browser({"CHROMIUM": ""})
    assert machine.asked == [] and capsys.readouterr().out == ""
    environment_browser.prepare_browser({"CHROMIUM": "absent"})
    assert machine.asked == [] and "which does not run as a browser" in capsys.readouterr().out


def test_root_with_apt_gets_chromium(monkeypatch, capsys):
    machine = Machine(monkeypatch, apt_get=0)
    machine.brings = {"chromium": 0}
    environment_browser.prepare_browser({})
    assert machine.asked == ["update", "install chromium"]
    assert capsys.readouterr().out == "set-up: installing chromium with apt-get, for the tests of the report page\n"


def test_without_a_browser_it_says_what_to_install_and_goes_on(monkeypatch, capsys):
    machine = Machine(monkeypatch, apt_get=100)
    environment_browser.prepare_browser({})
    output = capsys.readouterr().out
    assert "Unable to locate package chromium" in output and "will be skipped" in output and "CHROMIUM=" in output
    machine.asked.clear()
    monkeypatch.setattr(environment_browser.os, "geteuid", lambda: 1000)
    environment_browser.prepare_browser({})
    assert machine.asked == [] and "apt install chromium" in capsys.readouterr().out
    monkeypatch.setattr(environment_browser.sys, "platform", "darwin")
    assert not environment_browser.is_debian_root()
