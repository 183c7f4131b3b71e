"""Starts servers as processes of their own for tests, with the fake scheduler or the real one, and ends them."""

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from random_models import FAMILIES, write_tokenizer

TEST_FOLDER = Path(__file__).resolve().parent
PYTHON_FOLDER = TEST_FOLDER.parent / "python"
MODEL_NAME = "fake"
WAIT_S = 60.0
LISTENING = r"listening on (https?://[\w.:\[\]]+)"


def write_weightless_model(folder: Path, context_len: int = 512) -> Path:
    """A folder with a config and a tokenizer: all that the fake scheduler and the front need."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **FAMILIES["llama2"],
        "vocab_size": 331,
        "hidden_act": "silu",
        "max_position_embeddings": context_len,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": [2, 4],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.03)
    raise TimeoutError(f"{what} has not come true within {timeout_s:g} s")


def is_running(pid: int) -> bool:
    """Whether the process is there and not just waiting to be forgotten by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def run_script(
    command: list[Any], timeout_s: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command's output and exit status. Should the time not be enough, what it has started ends with it.

    Args:
        environment: instead of this process's own.

    Raises:
        subprocess.TimeoutExpired: then.
    """
    command = [str(part) for part in command]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@functools.cache
def temporary_root() -> Path:
    """Where servers have their folders for temporary files, in which sockets lie: tests' own paths are too long."""
    root = tempfile.mkdtemp(prefix="ramet-test-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root)


class ServerProcess:
    """One server on a free port."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *flags: str,
        fake: bool = True,
        verify: ssl.SSLContext | bool = True,
        **environment: str,
    ):
        """
        Args:
            verify: knows the authority of an https server's certificate.
        """
        entry = [str(TEST_FOLDER / "launch_with_fake_scheduler.py")] if fake else ["-m", "ramet.launch_server"]
        port = [] if "--port" in flags else ["--port", "0"]
        name = [] if "--served-model-name" in flags else ["--served-model-name", MODEL_NAME]
        self._start([*entry, "--model-path", str(model), *port, *name, *flags], log, verify, environment)

    def _start(
        self, arguments: list[str], log: Path, verify: ssl.SSLContext | bool, environment: dict[str, str]
    ) -> None:
        self.log = log
        self.verify = verify
        self.temporary = Path(tempfile.mkdtemp(dir=temporary_root()))  # so that what it leaves behind can be seen
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": f"{PYTHON_FOLDER}{os.pathsep}{TEST_FOLDER}",
                "TMPDIR": str(self.temporary),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Known as soon as the server says where it listens."""
        match = wait_until(lambda: re.search(LISTENING, self.output) or self._ended(), "the port")
        return match[1]

    def wait_ready(self) -> "ServerProcess":
        """Return when /health answers 200."""
        url = self.url
        wait_until(lambda: self._ended() or self.status(f"{url}/health") == 200, "readiness")
        return self

    def status(self, url: str) -> int:
        """The status of a GET, 0 if nobody answers."""
        try:
            return httpx.get(url, timeout=5, verify=self.verify).status_code
        except httpx.HTTPError:
            return 0

    def child(self, module: str) -> int:
        """The process id of the child that runs `module`."""

        def find() -> int | None:
            for folder in Path("/proc").iterdir():
                if folder.name.isdigit() and self._is_child(folder, module):
                    return int(folder.name)
            return None

        return wait_until(find, f"a process {module}")

    def children(self) -> list[int]:
        """Process ids of all children."""
        return [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit() and self._is_child(one, "")]

    def _is_child(self, folder: Path, module: str) -> bool:
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            return parent == self.process.pid and module in (folder / "cmdline").read_text()
        except (OSError, IndexError):
            return False

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = WAIT_S) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        """End it and its children as a power cut does."""
        if self.process.poll() is not None:
            return
        children = self.children()
        self.process.kill()
        self.process.wait(10)
        wait_until(lambda: not any(is_running(pid) for pid in children), "the children's end")

    def leftovers(self) -> list[str]:
        """Names in its folder for temporary files."""
        return sorted(path.name for path in self.temporary.iterdir())

    def _ended(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.output}")
        return False

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Background:
    """A streamed request in a thread of its own."""

    def __init__(self, url: str, **body: Any):
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.status = 0
        self.body = {"input_ids": [5], "stream": True, **body}
        self.thread = threading.Thread(target=self._run, args=(url,))
        self.thread.start()

    def _run(self, url: str) -> None:
        with httpx.stream("POST", f"{url}/generate", json=self.body, timeout=60) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                    self.begun.set()

    def join(self) -> list[str]:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.lines


def assert_nothing_left(server: ServerProcess, children: list[int]) -> None:
    assert server.leftovers() == []
    for child in children:
        wait_until(lambda child=child: not Path(f"/proc/{child}").exists(), f"the end of process {child}", 10)
