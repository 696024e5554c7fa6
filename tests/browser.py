"""A real browser for tests: Chromium over its debugging pipe, without any package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio",
    "--single-process", "--no-zygote", "--remote-debugging-pipe",
)  # fmt: skip

KEYS = {
    "Tab": 9, "Enter": 13, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37,
    "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
"""Keys that write nothing, by the number under which a browser knows them."""

AS_3_AND_4 = """
import os, sys
for number, high in zip(sys.argv[1:3], (103, 104)):  # first out of the way of 3 and 4
    os.dup2(int(number), high)
os.dup2(103, 3)
os.dup2(104, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a browser that reads from one file and writes into the other, as 3 and 4."""


def find_chromium() -> str | None:
    """Path of a Chromium, by the variable CHROMIUM or by name; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless Chromium that keeps its profile in a folder."""

    def __init__(self, chromium: str, profile: Path) -> None:
        self._count = 0
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        arguments = [chromium, *OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, str(to_browser), str(from_browser), *arguments],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._replies = os.fdopen(self._from, "rb", buffering=0)
        self._rest = b""
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        self._replies.close()

    def open(self, page: Path | str) -> None:
        """Load a file or an address and wait until it and its script have run."""
        self._ask("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Value of an expression in the page as soon as it is true of it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} is {found!r}; {self.complaints}"
            time.sleep(0.01)
        return found

    def run(self, script: str) -> Any:
        """Value of an expression in the page, awaited if it is a promise."""
        reply = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def show(self, width: int, *, dark: bool = False) -> None:
        """Show the page as wide as a window of `width` pixels does, light or dark."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=844, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self._ask("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """PNG of the whole page."""
        taken = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def accessible(self, selector: str) -> list[dict[str, str]]:
        """Role and name of all that a screen reader finds below the first element of a selector."""
        found = self._ask("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        place = {"objectId": found["result"]["objectId"]}
        node = self._ask("DOM.describeNode", **place)["node"]["backendNodeId"]
        nodes = {n["nodeId"]: n for n in self._ask("Accessibility.getFullAXTree")["nodes"]}
        first = next(n["nodeId"] for n in nodes.values() if n.get("backendDOMNodeId") == node)
        waiting, heard = [first], []
        while waiting:
            node = nodes[waiting.pop()]
            waiting += reversed([child for child in node["childIds"] if child in nodes])
            if not node["ignored"]:
                named = {key: node.get(key, {}).get("value", "") for key in ("role", "name")}
                heard.append(named)
        return heard

    def press(self, key: str) -> None:
        """Press and release a key: one that writes a character, or of `KEYS`."""
        code = KEYS.get(key)
        written: dict[str, str | int]
        written = {"text": key} if code is None else {"windowsVirtualKeyCode": code}
        if key == "Enter":
            written["text"] = "\r"
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, **written)

    def click(self, x: float, y: float) -> None:
        """Click at a place of the window, in pixels."""
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        request = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._to, json.dumps(request).encode() + b"\0")
        while True:
            message = json.loads(self._message())
            self._note(message)
            if message.get("id") == self._count:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        """Keep what the page writes into its console as a warning or an error."""
        told = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def _message(self) -> bytes:
        while b"\0" not in self._rest:
            received = self._replies.read(65536)
            assert received, "the browser has ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return message
