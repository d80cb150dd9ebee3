"""Chromium without a window, spoken to over its debugging protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One tab; it keeps what the page said on its console and what it asked the network for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") != number:
                self.events.append(message)
                continue
            assert "error" not in message, message["error"]
            return dict(message["result"])

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript is worth in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, value: Any) -> None:
        """Waits until an expression is worth this."""
        end = time.monotonic() + 60
        while (found := self.evaluate(expression)) != value:
            assert time.monotonic() < end, f"{expression} is {found!r}, not {value!r}"
            time.sleep(0.05)

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Opens a file in a window of this width, once its figures are drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 120
        ready = "location.protocol === 'file:' && document.readyState === 'complete'"
        while not self.evaluate(f"{ready} && [...document.querySelectorAll('.plot')].every(p => p.children.length)"):
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def said(self) -> list[str]:
        """Errors and warnings of the page's console."""
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                found.append(str(event["params"]["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(str(event["params"]["entry"]))
        return found

    def asked(self) -> list[str]:
        """Addresses of everything that the page loaded, other than itself."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent[1:] if not url.startswith("data:")]

    def picture(self, path: Path) -> None:
        """Writes the whole page, however long, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own, which is ended with the block.

    Args:
        folder: for its profile.
    """
    assert BINARY is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
    port = folder / "DevToolsActivePort"
    process = subprocess.Popen(
        [BINARY, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not port.is_file() or len(port.read_text().split()) < 2:
            assert process.poll() is None, "Chromium did not start"
            assert time.monotonic() < end, "Chromium is not ready"
            time.sleep(0.05)
        number, path = port.read_text().split()
        with connect(f"ws://127.0.0.1:{number}{path}", max_size=None, compression=None) as whole:
            whole.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(whole.recv(timeout=60))["result"]["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        url = f"ws://127.0.0.1:{number}/devtools/page/{tab}"
        with connect(url, max_size=None, compression=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)
