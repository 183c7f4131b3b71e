"""Python loads this at the start of every process of a server whose requests profile_first_token.py follows.

It wraps the functions at a request's hops, as their modules are imported, and writes the time of each call to the file
that HOPS_FILE names: one line, the hop and time.monotonic_ns(), which all processes of a host share. A hop that hands
on to another process is noted before it does: the other one may be faster. The server's own code knows nothing of this.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

FILE = os.open(os.environ["HOPS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(hop: str) -> None:
    os.write(FILE, b"%s %d\n" % (hop.encode(), time.monotonic_ns()))


def at_begin(holder: Any, name: str, hop: str) -> None:
    """Note each call of a function."""
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        note(hop)
        return original(*args, **kwargs)

    setattr(holder, name, wrapped)


def at_end(holder: Any, name: str, hop: str) -> None:
    """Note each return of a function."""
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note(hop)
        return result

    setattr(holder, name, wrapped)


def at_end_of_task(holder: Any, name: str, hop: str) -> None:
    """Note each return of a coroutine function."""
    original = getattr(holder, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        note(hop)
        return result

    setattr(holder, name, wrapped)


def watch_messages(module: ModuleType) -> None:
    """Every message between two processes is encoded in one of them and decoded in the other."""
    written = {"TokenizedGenerateReqInput": "request made", "BatchStrOutput": "text made"}
    read = {
        "TokenizedGenerateReqInput": "the scheduler has it",
        "BatchTokenIDOutput": "the detokenizer has it",
        "BatchStrOutput": "the main process has it",
    }
    encode, decode = module.encode, module.decode

    def noted_encode(message: Any) -> bytes:
        data = encode(message)
        if (hop := written.get(type(message).__name__)) is not None:
            note(hop)
        return data

    def noted_decode(data: bytes) -> Any:
        message = decode(data)
        if (hop := read.get(type(message).__name__)) is not None:
            note(hop)
        return message

    module.encode, module.decode = noted_encode, noted_decode


def watch_cycle(module: ModuleType) -> None:
    """Headers are read when an answer's object is made; that sends its first bytes of a body when there is a token."""

    send = module.RequestResponseCycle.send

    @functools.wraps(send)
    async def noted_send(cycle: Any, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            note("answer made")
        await send(cycle, message)

    module.RequestResponseCycle.send = noted_send
    at_begin(module.RequestResponseCycle, "__init__", "headers read")


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "uvicorn.protocols.http.h11_impl": watch_cycle,
    "ramet.srt.utils.http_guard": lambda module: at_begin(module.GuardedProtocol, "data_received", "request received"),
    "ramet.srt.entrypoints.http.http_body": lambda module: at_end_of_task(module._Reading, "read", "body read"),
    "ramet.srt.entrypoints.generate_request": lambda module: at_begin(
        module.GenerateReqInput, "sequence_inputs", "body validated"
    ),
    "ramet.srt.entrypoints.openai.serving_base": lambda module: at_begin(
        module.OpenAIServing, "check_body", "body validated"
    ),
    "ramet.srt.managers.prepare_requests": lambda module: at_end(module, "prepare_requests", "prompt tokenised"),
    "ramet.srt.managers.io_struct": watch_messages,
    "ramet.srt.managers.batch_planner": lambda module: at_end(module.BatchPlanner, "plan", "pass planned"),
    "ramet.srt.managers.passes": lambda module: at_end(module.Passes, "launch", "pass launched"),
    "ramet.srt.managers.pass_results": lambda module: at_begin(module.PassResults, "take", "token known"),
    "ramet.srt.managers.scheduler_channel": lambda module: at_begin(module.SchedulerChannel, "send", "output made"),
}


class Patching(importlib.abc.MetaPathFinder):
    """Finds the modules of PATCHES where they are, and patches each when it has been imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        patch = PATCHES.get(name)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        original = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Patching())
