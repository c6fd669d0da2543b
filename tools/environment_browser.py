"""
The browser that tests of the report page drive. setup_environment.py, beside this file, has it installed where it
may; without one those tests are skipped. Standard library alone.
"""

import os
import shutil
import sys

from environment_state import run
from environment_steps import say

# Names it goes by on PATH, and where macOS keeps it.
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
HOW_TO_INSTALL = "install Chromium (on Debian: apt install chromium) or Chrome, or name one with CHROMIUM=/path/to/it"

# A machine without a network is to say so soon.
_APT_OPTIONS = ("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=120")


def find_browser(environment):
    """
    A browser that runs: a name on PATH proves nothing.

    Args:
        environment: variables; CHROMIUM names a browser, the empty string none at all.

    Returns:
        Its path, or None.

    Raises:
        FileNotFoundError: CHROMIUM names what does not run.
    """
    named = environment.get("CHROMIUM")
    if named is None:
        return next(filter(runs, filter(None, map(shutil.which, BROWSERS))), None)
    path = shutil.which(named) if named else None
    if named and not (path and runs(path)):
        raise FileNotFoundError(f"CHROMIUM is {named!r}, which does not run as a browser")
    return path


def runs(path):
    try:
        return run([path, "--version"])[0] == 0
    except OSError:
        return False


def prepare_browser(environment):
    """
    Installs Debian's Chromium where there is no browser and apt is ours to use. Never fails: only the tests of the
    report page need it.
    """
    try:
        found = find_browser(environment)
    except FileNotFoundError as error:
        say(f"{error}: the tests of the report page will fail")
        return
    if found or environment.get("CHROMIUM") == "":
        return
    skipped = "the tests of the report page in a browser will be skipped"
    if not is_debian_root():
        say(f"no browser is here: {skipped}. To have them run, {HOW_TO_INSTALL}")
        return
    say("installing chromium with apt-get, for the tests of the report page")
    quiet = [*("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q"), *_APT_OPTIONS]
    run([*quiet, "update"])  # what it does not get, the next step misses
    status, output = run([*quiet, "install", "--no-install-recommends", "chromium"])
    if status or find_browser(environment) is None:
        last = (output.strip().splitlines() or ["it said nothing"])[-1]
        say(f"apt-get installed no chromium ({last}): {skipped}. To have them run, {HOW_TO_INSTALL}")


def is_debian_root():
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None
