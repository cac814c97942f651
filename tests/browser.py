"""A headless Chromium that tests look at pages with, and ask: over pipes, by its own protocol (Chrome DevTools), without a library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    """One page at a time; `problems` is what it complained of, `requested` the addresses that it asked for."""

    def __init__(self, profile: Path) -> None:
        asks, self._to = os.pipe()
        self._from, answers = os.pipe()
        command = f'exec "$0" "$@" 3<&{asks} 4>&{answers}'  # where Chromium reads and writes
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(asks, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asks)
        os.close(answers)
        self._sent, self._session, self._rest = 0, "", b""
        self.problems: list[str] = []
        self.requested: list[str] = []
        target = next(t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, address: str, *, until: str, width: int, height: int, seconds: float = 60) -> str:
        """The page's HTML once `until`, an expression, is true there."""
        self.problems, self.requested = [], []
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **screen)
        self._ask("Page.navigate", url="about:blank")  # else another fragment of an address is the same page
        self._ask("Page.navigate", url=address)
        end = time.monotonic() + seconds
        while not self.value(until):
            if time.monotonic() > end:
                raise AssertionError(
                    f"{until} is not so after {seconds:.0f} s: {self.value('document.body.innerText')}"
                )
            time.sleep(0.2)
        return str(self.value("document.documentElement.outerHTML"))

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression in the page; None where it fails."""
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True).get("result", {}).get("value")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        asked = {"id": self._sent, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while (heard := self._hear()).get("id") != self._sent:
            self._note(heard.get("method"), heard.get("params", {}))
        return heard.get("result", {})  # a page that is being left answers with an error

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 16)
            assert read, "Chromium has ended"
            self._rest += read
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.problems.append(" ".join(str(said.get("value", said.get("description"))) for said in params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
