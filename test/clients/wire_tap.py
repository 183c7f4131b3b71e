"""Owns the ear between a client and the server: passes bytes on both ways and keeps each request with its answer."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_KEPT_BYTES = 40_000


class WireTap:
    """Listens on a port of its own and forwards to `url`; exchanges are appended to `file`, one JSON object a line.

    An exchange is what a connection carried one way and then the other: no client here sends a request before the
    answer to its last one has ended.
    """

    def __init__(self, url: str, file: Path):
        self._target = urlsplit(url)
        self._file = file.open("w")
        self._kept: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(10)

    def num_answered(self, sent: str, answered: str) -> int:
        """How many exchanges so far begin with these texts, those of open connections included."""
        texts = (sent.encode(), answered.encode())
        return sum(
            one["sent"].startswith(texts[0]) and one["answered"].startswith(texts[1])
            for one in [*self._kept, *self._open]
        )

    def close(self) -> None:
        """Stop, and keep what open connections have carried."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        for exchange in list(self._open):
            self._keep(exchange)
        self._file.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:
            writer.close()
            return
        exchange: dict[str, Any] = {"begun": time.time(), "sent": b"", "answered": b""}
        self._open.append(exchange)

        async def pump(source: asyncio.StreamReader, drain: asyncio.StreamWriter, way: str) -> None:
            while data := await source.read(1 << 16):
                if way == "sent" and exchange["answered"]:
                    self._keep(exchange)
                exchange[way] += data
                drain.write(data)
                await drain.drain()
            drain.close()

        try:
            await asyncio.gather(pump(reader, onward[1], "sent"), pump(onward[0], writer, "answered"))
        except OSError:  # one of them has gone; the other one is told
            writer.close()
            onward[1].close()
        self._open.remove(exchange)
        self._keep(exchange)

    def _keep(self, exchange: dict[str, Any]) -> None:
        if exchange["sent"]:
            self._kept.append(dict(exchange))
            texts = {way: exchange[way][:MAX_KEPT_BYTES].decode(errors="replace") for way in ("sent", "answered")}
            self._file.write(json.dumps({"begun": exchange["begun"], "ended": time.time(), **texts}) + "\n")
            self._file.flush()
        exchange.update(begun=time.time(), sent=b"", answered=b"")


def exchanges(file: Path) -> list[dict[str, Any]]:
    """What a tap has kept, in the order in which the answers ended."""
    return [json.loads(line) for line in file.read_text().splitlines()]
