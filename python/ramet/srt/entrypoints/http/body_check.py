"""Owns the main process's side of checking large bodies: the helper processes, their queues, deadlines and ends.

What they run is entrypoints/body_process.py.
"""

import asyncio
import contextlib
import logging
import os
import struct
import sys
from collections.abc import Sequence

import msgspec

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.utils.python_path import child_python_path

logger = logging.getLogger(__name__)

CHECK_MODULE = "ramet.srt.entrypoints.body_process"
CHECK_TIMEOUT_S = 15.0  # for one body, the start of the process included
QUEUE_TIMEOUT_S = 30.0
MAX_QUEUED = 256
LARGE_BYTES = 1 << 20  # such bodies have a process of their own: others don't wait for them
WRITE_BYTES = 256 << 10
LENGTH = struct.Struct("!Q")


class BodyQuestion(msgspec.Struct, kw_only=True):
    """What goes to the helper before a body."""

    path: str
    num_bytes: int
    vocab_size: int
    max_req_len: int


class BodyVerdict(msgspec.Struct, kw_only=True):
    """What comes back."""

    message: str | None = None  # None: nothing is wrong that the helper looks for
    param: str | None = None
    code: str | None = None
    status_code: int = 400


class BodyChecker:
    """Two helper processes, each started at the first body that it has to look at."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._helpers = {is_large: _Helper() for is_large in (False, True)}

    async def check(self, path: str, pieces: Sequence[bytes], max_req_len: int) -> None:
        """Let a helper parse a body for a route.

        Raises:
            RequestError: that says what is wrong with it.
            ServiceError: if there are too many others, or it takes too long.
        """
        num_bytes = sum(map(len, pieces))
        question = BodyQuestion(path=path, num_bytes=num_bytes, vocab_size=self.vocab_size, max_req_len=max_req_len)
        verdict = await self._helpers[num_bytes > LARGE_BYTES].ask(question, pieces)
        if verdict.message is not None:
            raise RequestError(verdict.message, param=verdict.param, code=verdict.code, status_code=verdict.status_code)

    async def close(self) -> None:
        """End the helpers."""
        for helper in self._helpers.values():
            await helper.end()


class _Helper:
    """One process, which looks at one body after the other."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._num_queued = 0

    async def ask(self, question: BodyQuestion, pieces: Sequence[bytes]) -> BodyVerdict:
        if self._num_queued >= MAX_QUEUED:
            raise ServiceError("too many large requests wait to be looked at")
        self._num_queued += 1
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT_S):
                await self._lock.acquire()
        except TimeoutError:
            raise ServiceError("too many large requests wait to be looked at") from None
        finally:
            self._num_queued -= 1
        try:
            return await self._ask_now(question, pieces)
        finally:
            self._lock.release()

    async def _ask_now(self, question: BodyQuestion, pieces: Sequence[bytes]) -> BodyVerdict:
        is_done = False
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                verdict = await self._exchange(question, pieces)
            is_done = True
            return verdict
        except TimeoutError:
            raise RequestError(f"the body takes more than {CHECK_TIMEOUT_S:g} s to be looked at") from None
        except ServiceError:
            raise
        except (
            OSError,
            RuntimeError,
            asyncio.IncompleteReadError,
            msgspec.DecodeError,
        ) as error:  # uvloop's is the second
            logger.warning("the process that looks at large bodies has ended: %r", error)
            raise RequestError("the body is too much to be parsed") from None
        finally:
            if not is_done:  # whatever it still does is of no use, and its pipe is out of step
                await self.end()

    async def _exchange(self, question: BodyQuestion, pieces: Sequence[bytes]) -> BodyVerdict:
        if self._process is None or self._process.returncode is not None:
            self._process = await _start()
        writer, reader = self._process.stdin, self._process.stdout
        assert writer is not None and reader is not None
        head = msgspec.msgpack.encode(question)
        writer.write(LENGTH.pack(len(head)) + head)
        for piece in pieces:
            for start in range(0, len(piece), WRITE_BYTES):
                writer.write(piece[start : start + WRITE_BYTES])
                await writer.drain()
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await reader.readexactly(length), type=BodyVerdict)

    async def end(self) -> None:
        """Kill the process, if there is one; the next body starts another."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _start() -> asyncio.subprocess.Process:
    """Raises ServiceError if there can be no process now."""
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", CHECK_MODULE,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": child_python_path()},
        )  # fmt: skip
    except OSError as error:
        raise ServiceError(f"the process that looks at large bodies can't be started: {error}") from None
