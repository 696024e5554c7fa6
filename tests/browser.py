"""A real browser for tests: Chromium over its debugging pipe, without any package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio",
    "--single-process", "--no-zygote", "--remote-debugging-pipe",
)  # fmt: skip

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
        self._ask("Page.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        self._replies.close()

    def open(self, page: Path) -> None:
        """Load a file and wait until it and its script have run."""
        self._ask("Page.navigate", url=page.as_uri())
        while self.run("document.readyState") != "complete":
            pass

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
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """PNG of the whole page."""
        taken = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def press(self, key: str) -> None:
        """Press and release a key that writes one character."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, text=key)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        request = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._to, json.dumps(request).encode() + b"\0")
        while True:
            message = json.loads(self._message())
            if message.get("id") == self._count:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _message(self) -> bytes:
        while b"\0" not in self._rest:
            received = self._replies.read(65536)
            assert received, "the browser has ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return message
