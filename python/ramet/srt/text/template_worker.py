"""Owns the process that renders chat templates: one chat at a time, for the process that started it.

A line with the template and a line with the chat come, a line goes back. Beyond its time or memory it says so and ends;
where it can't even say so, the kernel ends it.
"""

import json
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ramet.srt.text.template_rendering import Template, TemplateSyntaxError

GRACE_S = 1.0  # between asking a rendering to end and ending the process


class OutOfTime(BaseException):
    """The rendering has had its time. No template can catch it."""


def main(argv: Sequence[str]) -> int:
    """Serve until the other side has gone."""
    channel = socket.socket(fileno=int(argv[0]))
    cpu_s, memory_bytes, max_text_bytes = float(argv[1]), int(argv[2]), int(argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_bytes)
    signal.signal(signal.SIGPROF, _raise_out_of_time)
    templates: dict[int, Template] = {}
    stream = channel.makefile("rwb")
    stream.write(b"{}\n")
    stream.flush()
    while line := stream.readline():
        _set_timers(cpu_s)
        try:
            reply = _answer(templates, json.loads(line), json.loads(stream.readline()))
            encoded = json.dumps(reply).encode()
            if len(encoded) > max_text_bytes:
                encoded = _last_words(f"makes more than {max_text_bytes >> 20} MiB of text")
        except OutOfTime:
            encoded = _last_words(f"takes more than {cpu_s:g} s of computing time for these messages")
        except MemoryError:
            encoded = _last_words(f"takes more than {memory_bytes >> 20} MiB of memory for these messages")
        _set_timers(0)
        stream.write(encoded + b"\n")
        stream.flush()
    return 0


def _answer(templates: dict[int, Template], head: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    number = head["template"]
    try:
        if number not in templates:
            templates[number] = Template(head["source"])
        if request["values"] is None:
            return {"text": ""}
        return {"text": templates[number].render(request["values"], request["continue"])}
    except TemplateSyntaxError as error:
        return {"error": str(error.message), "line": error.lineno, "is_last": True}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a template's code can raise is its refusal
        return {"error": f"refuses these messages: {error or type(error).__name__}", "is_last": number not in templates}


def _last_words(what: str) -> bytes:
    return json.dumps({"error": what, "is_last": True}).encode()


def _limit_memory(num_bytes: int) -> None:
    """Let the process have `num_bytes` beyond what it has now."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        limit = int(stream.read().split()[0]) * resource.getpagesize() + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _set_timers(cpu_s: float) -> None:
    """Ask after `cpu_s` of computing, and end a bit later, for what is deaf to asking; 0 for neither."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s + GRACE_S if cpu_s else 0)


def _raise_out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise OutOfTime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
