"""Drives a headless Chromium over its DevTools protocol: as much of it as the tests of pages need."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
]
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0

TOO_WIDE = """
(() => {
  const width = document.documentElement.clientWidth, scrolled = document.documentElement.scrollWidth;
  const found = scrolled > width ? [`the page is ${scrolled} wide`] : [];
  for (const node of document.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect();
    if (box.width > 1 && (box.right > width + 0.5 || box.left < -0.5))
      found.push(`${node.outerHTML.slice(0, 80)} from ${box.left} to ${box.right}`);
  }
  return found;
})()
"""


class Tab:
    """A page in the browser. `problems` collects exceptions and errors that the page has logged."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_calls = 0
        self._loaded = asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        self.problems: list[str] = []

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data)
            elif data["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif data["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(data["params"]["exceptionDetails"]))
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                self.problems.append(data["params"]["entry"]["text"])

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._num_calls += 1
        number = self._num_calls
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        data = await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)
        assert "error" not in data, data
        return data["result"]

    async def open(self, url: str) -> None:
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), ANSWER_TIMEOUT_S)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, or of the promise that it is."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, condition: str, timeout_s: float = 20.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout_s
        while not await self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition} does not come true: {await self.text()}"
            await asyncio.sleep(0.05)

    async def text(self) -> str:
        """What can be read on the page."""
        return await self.evaluate("document.body.innerText")

    async def set_width(self, width: int, height: int = 900) -> None:
        """Have the page as wide as that, as a telephone has it below 700."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )

    async def too_wide(self) -> list[str]:
        """What reaches beyond the page's sides, as far as it can be seen."""
        return await self.evaluate(TOO_WIDE)

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()


@contextlib.asynccontextmanager
async def open_browser(profile: Path, *flags: str) -> AsyncIterator[Tab]:
    """A browser with an empty profile, further flags and one tab. Skips the test where there is no browser."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs chromium")
    command = [program, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                page = next(target for target in await answer.json() if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.send(f"{domain}.enable")
                yield tab
                await tab.close()
    finally:
        process.kill()
        process.wait(20)
