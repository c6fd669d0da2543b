"""
Headless Chromium for tests, driven over a pair of pipes by the DevTools protocol: no driver, no port, no package.

``chromium --remote-debugging-pipe`` reads JSON messages from file descriptor 3 and writes them to 4, each ended by a
zero byte: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
with mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
    from environment_browser import HOW_TO_INSTALL, find_browser

# Longest wait for an answer.
_SECONDS = 60.0

_KEYS = {
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27},
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
    "ArrowRight": {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "ArrowLeft": {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37},
}


def browser_or_skip() -> str:
    """Path of a browser; without one the test is skipped."""
    path = find_browser(os.environ)
    if path is None:
        pytest.skip(f"no browser is here: {HOW_TO_INSTALL}")
    return path


class Page:
    """
    One page of a running browser.

    Attributes:
        errors: of scripts, of the console, and of what could not be loaded.
        requests: addresses that the page asked for.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self.errors: List[str] = []
        self.requests: List[str] = []
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._events: List[Dict[str, Any]] = []
        self._session = ""
        self._number = 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Dict[str, Any]:
        """Sends a command; returns its result when it is there."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, width: int, height: int = 800, is_dark: bool = False) -> None:
        """Loads a file at a size of the window, in pixels; earlier errors and requests are forgotten."""
        self.errors, self.requests, self._events = [], [], []
        is_phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._next_message())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A real click of the mouse into the middle of an element."""
        where = json.dumps(selector)
        self.evaluate(f"document.querySelector({where}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({where}).getBoundingClientRect()"
        x, y = self.evaluate(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A real stroke of a key."""
        self.send("Input.dispatchKeyEvent", type="keyDown", **_KEYS[key])
        self.send("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in _KEYS[key].items() if k != "text"})

    def screenshot(self, path: Path, quality: int = 85, whole: bool = True) -> None:
        """A JPEG of the page, or a PNG, by the ending of the path."""
        kind = {"format": "png"} if path.suffix == ".png" else {"format": "jpeg", "quality": quality}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **kind)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, event: Dict[str, Any]) -> None:
        method, parameters = event.get("method", ""), event.get("params", {})
        self._events.append({"method": method})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(parameters["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def _next_message(self) -> Dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Its removal may fail: a browser's processes write until the last one has ended."""
    path = tempfile.mkdtemp(prefix="qmimic_d2_")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running_browser(executable: str) -> Iterator[Page]:
    """Starts a browser with a profile of its own; it ends with the block."""
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    with _folder() as profile:
        flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags.append("--no-sandbox")  # root and many containers cannot have it, and the pages are our own
        # The shell puts the pipes where the browser looks for them.
        redirect = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", redirect, executable, *flags],
            pass_fds=(read_commands, write_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            page = Page(write_commands, read_answers)
            yield page
            page._session = ""
            page.send("Browser.close")
            process.wait(timeout=_SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(write_commands)
            os.close(read_answers)
