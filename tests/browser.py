"""Headless Chromium, driven over a pipe by its own protocol (CDP): pages that a server answers, as people use them.

`test_review.py` needs no driver, since its pages are files; here several people, uploads and downloads are wanted.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


class Browser:
    """A browser process; `page()` is a person of their own, with cookies and storage of their own."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", timeout: float = 60, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            while b"\0" in self._buffer:
                text, self._buffer = self._buffer.split(b"\0", 1)
                found = json.loads(text)
                if found.get("id") == self._number:
                    assert "error" not in found, f"{method}: {found['error']}"
                    return found["result"]
                self.events.append(found)
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, f"{method}: no answer of the browser within {timeout} s"
            self._buffer += os.read(self._read, 1 << 20)

    def page(self, address: str, width: int = 1100, height: int = 900) -> Page:
        """Open an address for a new person."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context, target)
        page.call("Page.enable")
        page.call("Runtime.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=address)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, context: str, target: str) -> None:
        self.browser, self._session, self._context, self._target = browser, session, context, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return the value of an expression, awaited if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, timeout: float = 90) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + timeout
        while not self.run(condition):
            assert time.monotonic() < until, f"{condition}: not within {timeout} s; the page says: {self.text('body')}"
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        """Return the shown text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file of this machine in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def fill(self, selector: str, value: str) -> None:
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('input'))")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def download_into(self, folder: Path) -> None:
        """Let downloads of this person go into a folder."""
        self.browser.call("Browser.setDownloadBehavior", behavior="allow", browserContextId=self._context,
                          downloadPath=str(folder))  # fmt: skip

    def screenshot(self, path: Path, **more: Any) -> None:
        found = self.call("Page.captureScreenshot", format="png", **more)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """Close the tab, as somebody does who leaves."""
        self.browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for the time of the context."""
    assert CHROMIUM is not None
    # the browser reads commands from its file 3 and writes to its file 4
    (theirs_in, write), (read, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        made = Browser(process, write, read)
        try:
            yield made
        finally:
            try:
                made.call("Browser.close", timeout=20)
            except (AssertionError, OSError):
                process.kill()
            process.wait(20)
            os.close(write)
            os.close(read)
