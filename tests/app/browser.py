"""A headless Chromium that a test steers over a pipe, with the DevTools protocol and without a driver."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import selectors
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_OPTIONS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
_SECONDS = 120.0


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome on the PATH."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser(chromium: str, folder: Path) -> Iterator[Tab]:
    """Start a browser with a profile in a folder, and yield its only tab."""
    commands, answers = os.pipe(), os.pipe()
    # The browser reads commands from file 3 and writes to file 4; high numbers here cannot be in their way.
    ours = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 64) for file in (commands[0], answers[1])]
    log = os.open(folder / "chromium.log", os.O_WRONLY | os.O_CREAT)
    duplicates = [(ours[0], 3), (ours[1], 4), (log, 2)]
    actions = [(os.POSIX_SPAWN_DUP2, *pair) for pair in duplicates]
    command = [chromium, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
    process = os.posix_spawn(chromium, command, os.environ, file_actions=actions, setpgroup=0)
    for file in (commands[0], answers[1], *ours, log):
        os.close(file)
    try:
        yield Tab(commands[1], answers[0])
    finally:
        os.close(commands[1])
        os.close(answers[0])
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)


class Tab:
    """A tab of the browser.

    Attributes:
        problems: Errors of the console, and exceptions of the page.
        requests: Addresses that the page requested.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer.get("method", ""), answer.get("params", {}))

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + _SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def open(self, address: str, width: int = 1280, height: int = 900, is_phone: bool = False) -> None:
        """Open an address in a viewport of CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self.call("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({address!r}) && document.readyState === 'complete'")

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input, as a person does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drag(self, points: list[tuple[float, float]], is_touch: bool = False) -> None:
        """Press at the first point, move over the others, and release, with the mouse or a finger."""
        for number, (x, y) in enumerate([*points, points[-1]]):
            end = number == len(points)
            if is_touch:
                kind = "touchEnd" if end else "touchMove" if number else "touchStart"
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[] if end else [{"x": x, "y": y}])
            else:
                kind = "mouseReleased" if end else "mouseMoved" if number else "mousePressed"
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; 8 is Shift."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                **(text if kind == "keyDown" else {}),
            )

    def screenshot(self, path: Path) -> None:
        """Write a PNG file of the page in its full length."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, method: str, values: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and values["entry"]["level"] == "error"):
            self.problems.append(json.dumps(values))
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def _read(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                assert selector.select(_SECONDS), "Chromium does not answer"
                data = os.read(self._from, 1 << 16)
                assert data, "Chromium has ended"
                self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))
