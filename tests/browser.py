"""A headless Chromium driven over a pipe by its DevTools protocol: as much as it takes to see a page as its reader does."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

PATIENCE_S = 180.0
ATTEMPTS = 3
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
"""Chromium reads commands from descriptor 3 and answers on 4."""


class BrowserError(RuntimeError):
    """The browser itself failed: nothing is said about the page."""


def chromium() -> str | None:
    """The browser on this machine, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One running browser. Use `running`."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.process, self._to, self._back = process, to, back
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command, and its answer; events that come meanwhile are kept."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        try:
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._to, data) :]
        except OSError as error:
            raise BrowserError(f"{method}: {error}") from error
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message; an event is kept too."""
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._back, 1 << 20) if ready else b""
            if not data:
                raise BrowserError("The browser closed its pipe." if ready else f"The browser said nothing for {PATIENCE_S} s.")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def wait(self, event: str) -> None:
        while not any(message["method"] == event for message in self.events):
            self.receive()


class Tab:
    """A page as seen on a screen of some width, in light or dark."""

    def __init__(self, browser: Browser, url: str, width: int, dark: bool) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.events.clear()
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        browser.wait("Page.loadEventFired")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings of the console, and exceptions, so far."""
        self.evaluate("1")  # whatever is on its way has come before the answer
        return [event["params"] for event in self._browser.events if complaint(event)]

    def requests(self) -> list[str]:
        """Whatever the page asked for."""
        sent = (event["params"] for event in self._browser.events if event["method"] == "Network.requestWillBeSent")
        return [params["request"]["url"] for params in sent]

    def screenshot(self, path: Path) -> None:
        """The whole page, as far down as it goes."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))


def complaint(event: dict[str, Any]) -> bool:
    params = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            return True
        case "Runtime.consoleAPICalled":
            return params["type"] in ("error", "warning", "assert")
        case "Log.entryAdded":
            return params["entry"]["level"] in ("error", "warning")
    return False


Seen = TypeVar("Seen")


def browse(do: Callable[[Browser], Seen]) -> Seen:
    """What `do` finds in a browser. Where one fails for reasons of its own, another is asked; where there is none, the test is
    skipped."""
    executable = chromium()
    if executable is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    for _ in range(1, ATTEMPTS):
        with contextlib.suppress(BrowserError), running(executable) as browser:
            return do(browser)
    with running(executable) as browser:
        return do(browser)


@contextlib.contextmanager
def running(executable: str) -> Iterator[Browser]:
    """A browser that has answered. One that does not start, for reasons of its own, is started again."""
    for attempt in range(1, ATTEMPTS + 1):
        with contextlib.ExitStack() as stack:
            browser = start(executable, stack)
            try:
                browser.call("Browser.getVersion")
            except BrowserError:
                if attempt == ATTEMPTS:
                    raise
                continue
            yield browser
            return


def start(executable: str, stack: contextlib.ExitStack) -> Browser:
    """Start it; leaving `stack` ends it and removes its profile."""
    profile = stack.enter_context(tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True))
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]  # out of the way of 3 and 4
    command = [sys.executable, "-c", LAUNCH, *map(str, high), executable, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command,
        pass_fds=high,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    stack.callback(end, process, (to, back))
    return Browser(process, to, back)


def end(process: subprocess.Popen[bytes], descriptors: tuple[int, ...]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
    for fd in descriptors:
        os.close(fd)
