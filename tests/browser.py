"""A real browser for tests: headless Chromium, driven over the WebDriver protocol.

Nothing but the standard library; where Chromium or its driver is not installed, `missing()` says
so and tests skip.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
          "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def missing() -> str:
    """Why there is no browser, or ""."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    if not shutil.which("chromedriver"):
        return "no chromedriver is installed (Debian: apt-get install chromium-driver)"
    return ""


class Browser:
    """One window. Use as a context manager; every call is synchronous."""

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory()
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                self.base = f"http://127.0.0.1:{found[1]}/session"
                break
        else:
            raise RuntimeError("chromedriver did not start")
        options = {"binary": shutil.which("chromium") or shutil.which("google-chrome"),
                   "args": [*_FLAGS, f"--user-data-dir={self.profile.name}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self.base += "/" + answer["sessionId"]
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(10)
            self.driver.stdout.close()
            self.profile.cleanup()

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = Request(self.base + path, data, {"Content-Type": "application/json"},
                          method=method)
        try:
            with urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments):
        """The value that a function body in JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def log(self) -> list[str]:
        """Messages of the console since the last call, worst things first."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def resize(self, width: int, height: int = 900, *, phone: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=2 if phone else 1, mobile=phone)

    def dark(self, on: bool) -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if on else "light"}])

    def devtools(self, command: str, **parameters):
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})
