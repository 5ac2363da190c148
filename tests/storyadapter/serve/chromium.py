"""A headless Chromium, by its debugging protocol over two pipes."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
_KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}


class Page:
    """One tab."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = os.fdopen(reading, "rb", buffering=0)
        self._writing = os.fdopen(writing, "wb", buffering=0)
        self._count = 0
        self._session: str | None = None
        self._buffer = b""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"never came true: {script}; {self.problems}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        more = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def tab_to(self, script: str, most: int = 40) -> None:
        """Press Tab until the focus is where a script says."""
        for _ in range(most):
            self.press("Tab")
            if self.value(f"document.activeElement.matches({json.dumps(script)})"):
                return
        raise AssertionError(f"the keyboard doesn't reach {script}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def names(self) -> list[tuple[str, str]]:
        """Role and name of what a screen reader tells."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node.get("role", {}).get("value", ""), node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = self._reading.read(1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        match event:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.problems.append(str(details))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error", "source": source} as entry}}:
                if source != "network":  # a picture that isn't drawn yet
                    self.problems.append(str(entry))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own."""
    assert PROGRAM is not None
    to_browser, from_test = os.pipe()
    to_test, from_browser = os.pipe()
    words = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    words += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--window-size=1000,1400"]
    # it reads commands from descriptor 3 and writes to 4
    command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *words]
    browser = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(to_test, from_test)
    finally:
        browser.kill()
        browser.wait()
