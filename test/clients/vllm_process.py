"""Owns a running vLLM server (its CPU build) in the clients' environment, with the plugin of integrations/vllm."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx
from clients.environments import REPOSITORY, EnvironmentFailed, clean_environment, python_of
from server_process import temporary_root, wait_until

READY_LIMIT_S = 600.0  # importing vLLM in four processes takes minutes on a busy machine
INSTALL_LIMIT_S = 300.0
VERSION = "0.32.0"
PROMPTS = [[5, 6, 7, 8, 9, 200, 11], [300, 12], list(range(20, 120))]
NUM_TOKENS = 24


@functools.cache
def plugin_folder() -> Path:
    """Where Ramet and the plugin are installed, as pip does it, beside vLLM's environment.

    Raises:
        EnvironmentFailed: if they can't be installed.
    """
    folder = Path(tempfile.mkdtemp(dir=temporary_root()))
    command = [python_of("vllm"), "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation",
               "--target", folder, REPOSITORY, REPOSITORY / "integrations" / "vllm"]  # fmt: skip
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=INSTALL_LIMIT_S,
        env=clean_environment(),
    )  # fmt: skip
    if result.returncode:
        raise EnvironmentFailed(f"the plugin can't be installed:\n{(result.stdout + result.stderr)[-2000:]}")
    # The CPU build goes by another name, and vLLM asks for its own to find out what it was built for.
    about = folder / f"vllm-{VERSION}+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    return folder


class VllmProcess:
    """One vLLM server on a free port."""

    def __init__(self, model: Path, name: str, log: Path, *flags: str, tp_size: int = 1):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.name = name
        self._log = log
        command: list[Any] = [
            python_of("vllm"), "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", name, "--port",
            port, "--host", "127.0.0.1", "--max-model-len", 256, "--enforce-eager", "--tensor-parallel-size", tp_size,
            *flags,
        ]  # fmt: skip
        environment = {
            **clean_environment(), "PYTHONPATH": str(plugin_folder()), "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp_size))),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [str(part) for part in command], stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> "VllmProcess":
        """Return when it answers."""

        def is_up() -> bool:
            assert self._process.poll() is None, self.output[-3000:]
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(is_up, "vLLM's readiness", READY_LIMIT_S)
        return self

    def wait_exit(self) -> int:
        """Its exit status, once it has given up by itself."""
        return self._process.wait(READY_LIMIT_S)

    def continuations(self) -> list[list[int]]:
        """The ids of greedy continuations of PROMPTS."""
        return [self._continue(prompt) for prompt in PROMPTS]

    def _continue(self, prompt: list[int]) -> list[int]:
        body = {"model": self.name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def sources(self) -> list[str]:
        """How each rank's weights came, as the plugin has logged it."""
        return re.findall(r"took the weights from (\S+): .*checksums verified", self.output)

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()


def extra(seed: str, **options: Any) -> tuple[str, ...]:
    """The flags that take weights from a seed."""
    return "--load-format", "ramet", "--model-loader-extra-config", json.dumps({"seed": seed, **options})
