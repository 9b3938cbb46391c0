"""A browser to look at pages with."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Browser:
    """A WebDriver session of headless Chromium: https://www.w3.org/TR/webdriver2/"""

    url: str

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        """Open a page and wait until its script is through, well or ill."""
        self.ask("/url", {"url": page.as_uri()})
        deadline = time.monotonic() + 60
        while not self.run("return document.documentElement.dataset.plots"):
            assert time.monotonic() < deadline, "the page's script did not end"
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        return self.ask("/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **params: Any) -> Any:
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": params})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged of a kind since the last look."""
        return list(self.ask("/se/log", {"type": kind}))

    def errors(self) -> list[str]:
        """Console messages since the last look. A page that is well writes none."""
        return [entry["message"] for entry in self.log("browser")]

    def requests(self) -> list[str]:
        """The URLs that pages asked for since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        missing = "chromedriver" if chromium else "Chromium"
        pytest.skip(f"{missing} is not installed: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
    root = Browser(f"http://127.0.0.1:{port}")
    try:
        session = started(root, chromium, tmp_path_factory.mktemp("profile"))
        yield session
        session.ask("", method="DELETE")
    finally:
        process.terminate()
        process.wait(timeout=20)


def started(root: Browser, chromium: str, profile: Path) -> Browser:
    options = {
        "binary": chromium,
        "args": [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            "--disable-dev-shm-usage",
            "--window-size=1400,1000",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ],
    }
    wanted = {
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    for _ in range(100):
        try:
            session = root.ask("/session", {"capabilities": {"alwaysMatch": wanted}})
            return Browser(f"{root.url}/session/{session['sessionId']}")
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise RuntimeError(error.read().decode()[:2000]) from error
            time.sleep(0.1)
    raise TimeoutError("chromedriver does not answer")
