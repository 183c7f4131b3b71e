"""Owns what the fault table needs to watch an instance: a caller, /health, its processes, a metadata server."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "python")]

from server_process import wait_until  # noqa: E402 - its folder is made importable above

NUM_TOKENS = 900
BODY = {"input_ids": [5, 6], "stream": True, "sampling_params": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}}


class Caller:
    """A streamed request in a thread of its own; `outcome` says how it ended."""

    def __init__(self, url: str, inside: Callable[[Callable[[], str]], str]):
        self.begun = threading.Event()
        self._url = url
        self._outcome = "waits for ever"
        self._thread = threading.Thread(target=self._run, args=(inside,), daemon=True)
        self._thread.start()

    def _run(self, inside: Callable[[Callable[[], str]], str]) -> None:
        self._outcome = inside(self._ask)
        self.begun.set()

    def _ask(self) -> str:
        request = urllib.request.Request(
            f"{self._url}/generate", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
        )
        last = b""
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                for line in response:
                    self.begun.set()
                    last = line if b"error" in line or not last.startswith(b'data: {"error') else last
                    if line.startswith(b"data: [DONE]"):
                        return "an error event" if b'"error"' in last else "their answer"
        except urllib.error.HTTPError as error:
            return f"status {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            return "no connection" if isinstance(reason, ConnectionRefusedError) else "a cut connection"
        return "a cut connection"

    def outcome(self, timeout_s: float) -> str:
        self._thread.join(timeout_s)
        return self._outcome


def ask(url: str, path: str, body: bytes) -> int:
    """The status of one request; 0 if the connection is cut."""
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=90) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0


def ask_for_constraint(url: str) -> int:
    """Needs a process for constrained output, and the one that forks it."""
    params = {"max_new_tokens": 8, "regex": f"[ab]{{2}}{time.monotonic_ns()}"}
    return ask(url, "/generate", json.dumps({"text": "a", "sampling_params": params}).encode())


def ask_in_chat(url: str) -> int:
    """Needs a process for chat templates."""
    body = {"model": "faulty", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    return ask(url, "/v1/chat/completions", json.dumps(body).encode())


def ask_at_length(url: str) -> int:
    """Needs a process that looks at large bodies."""
    return ask(url, "/generate", b'{"text": "a", ' + b" " * (2 << 20) + b'"sampling_params": {"max_new_tokens": 2}}')


HELPERS: dict[str, Callable[[str], int] | None] = {  # by the names of processes_of: what needs one
    "engine": None,
    "grammar": ask_for_constraint,
    "grammar 1": ask_for_constraint,
    "template_worker": ask_in_chat,
    "body": ask_at_length,
}


def directly(function: Callable[[], str]) -> str:
    return function()


def health(url: str) -> int:
    """The status of /health; 0 if nobody answers in a second."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [root]
    for process in tree:
        tree += sorted(child for child, parent in parents.items() if parent == process)
    return tree


def processes_of(launcher: int) -> dict[str, int]:
    """Name -> process id of an instance's processes, by their command lines: "main", "scheduler 0", "detokenizer"."""
    found: dict[str, int] = {}
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if pid == launcher and "-m" not in words:
                continue
            modules = [word for word in words if word.startswith("ramet.")]
            if modules:
                found[_name(modules[0], found)] = pid
    return found


def _name(module: str, taken: dict[str, int]) -> str:
    name = module.rpartition(".")[2]
    if name == "launch_server":
        return "main"
    for end in ("_process", "_manager"):
        name = name.removesuffix(end)
    if name != "scheduler":
        return name if name not in taken else f"{name} {sum(other.startswith(name) for other in taken)}"
    return f"{name} {sum(other.startswith(name) for other in taken)}"


@contextlib.contextmanager
def metadata_server(folder: Path) -> Iterator[tuple[int, int]]:
    """Process id and port of one in its own process."""
    port = free_port()
    command = [sys.executable, "-m", "ramet.modelexpress_server", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "metadata").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT / "python")}
        )
    try:
        wait_until(lambda: answers(port), "the metadata server")
        yield process.pid, port
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
