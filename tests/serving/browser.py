"""Chromium without a window, driven through two pipes in its DevTools protocol: JSON between zero bytes."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which needs rights that root in a container has not
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One page; what the browser says of it meanwhile is kept in `events`."""

    to_browser: int
    from_browser: int
    events: list[dict[str, Any]] = field(default_factory=list)
    session: str | None = None
    password: str | None = None  # for the servers that ask for one
    _received: bytes = b""
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def call(self, method: str, **params: Any) -> Any:
        number = self._send(method, params)
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _send(self, method: str, params: dict[str, Any]) -> int:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        return number

    def _read(self, timeout_s: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while b"\0" not in self._received:
            ready, _, _ = select.select([self.from_browser], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {timeout_s} s"
            part = os.read(self.from_browser, 1 << 20)
            assert part, "the browser has ended"
            self._received += part
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._take(message["method"], message["params"])
        return message

    def _take(self, method: str, params: dict[str, Any]) -> None:
        self.events.append({"method": method, **params})
        if method == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": params["requestId"]})
        elif method == "Fetch.authRequired":
            answer = {"response": "CancelAuth"}
            if self.password is not None:
                answer = {"response": "ProvideCredentials", "username": "any", "password": self.password}
            self._send(
                "Fetch.continueWithAuth", {"requestId": params["requestId"], "authChallengeResponse": answer}
            )

    def open(self, url: str) -> None:
        """Returns when it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events), url)

    def run(self, expression: str) -> Any:
        """What an expression of JavaScript comes to, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector: str) -> str | None:
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent")

    def type(self, selector: str, text: str) -> None:
        """Types into a field, in place of what is there."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def wait_for[T](self, read: Callable[[], T], what: str, timeout_s: float = 60.0) -> T:
        """Asks again and again, between two things that the browser says, until there is an answer."""
        end = time.monotonic() + timeout_s
        while not (value := read()):
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}; {self.problems()}"
            self.run("new Promise(requestAnimationFrame)")
        return value

    def problems(self) -> list[Any]:
        """Errors and warnings of the page, refusals of its policy among them."""
        found: list[Any] = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["exceptionDetails"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(event["args"])
            elif event["method"] == "Log.entryAdded":
                found.append(event["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """The URLs of everything that was asked for."""
        return [
            event["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]

    def look(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Gives the page a size and a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Writes what is shown, the whole page, as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_browser(browser: str, profile: Path) -> Iterator[Page]:
    """Starts a browser with one empty page; it is ended afterwards."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    # The browser reads at 3 and writes at 4; the shell puts the pipes there, wherever they were.
    shell = f'exec "$@" 3<&{commands} 4>&{answers}'
    command = ["bash", "-c", shell, "browser", browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with open(profile / "log", "wb") as log:
        process = subprocess.Popen(command, pass_fds=(commands, answers), stdout=log, stderr=log)
    os.close(commands)
    os.close(answers)
    page = Page(to_browser, from_browser)
    try:
        targets = page.call("Target.getTargets")["targetInfos"]
        [target] = [info["targetId"] for info in targets if info["type"] == "page"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Fetch.enable", handleAuthRequests=True)
        yield page
        page.session = None
        page.call("Browser.close")
        process.wait(30)
    finally:
        os.close(to_browser)  # a browser whose pipe has ended ends, and its children with it
        os.close(from_browser)
        if process.poll() is None:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
