"""vLLM's server with an engine core that computes nothing, for benchmark/bench_http.py. Runs in vLLM's environment.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmark/vllm_without_model.py MODEL --port 30002 --load-format dummy

As the fake scheduler of Ramet's tests it makes a token for each request in every step, of the prompt's tokens over and
over. It is 0.32.0's core with other steps; the processes before it are vLLM's own.
"""

import os
import sys
import time
from typing import Any

os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"  # so that the core's process has what is changed here

from vllm.entrypoints.cli.main import main
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc


class Running:
    """A request, and how many tokens it has."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.num_tokens = 0

    def step(self) -> EngineCoreOutput:
        """One token more."""
        prompt = self.request.prompt_token_ids
        token_id = prompt[self.num_tokens % len(prompt)]
        self.num_tokens += 1
        reason = FinishReason.LENGTH if self.is_done else None
        return EngineCoreOutput(request_id=self.request.request_id, new_token_ids=[token_id], finish_reason=reason)

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.request.sampling_params.max_tokens


RUNNING: dict[str, Running] = {}


def add_request(_core: Any, request: Any, _request_wave: int = 0) -> None:
    RUNNING[request.request_id] = Running(request)


def abort_requests(_core: Any, request_ids: list[str], *_options: Any) -> None:
    for request_id in request_ids:
        RUNNING.pop(request_id, None)


def step() -> tuple[dict[int, EngineCoreOutputs], bool]:
    """What each of the processes before the core gets."""
    outputs: dict[int, list[EngineCoreOutput]] = {}
    for request_id, one in list(RUNNING.items()):
        outputs.setdefault(one.request.client_index, []).append(one.step())
        if one.is_done:
            del RUNNING[request_id]
    time.sleep(0)
    return {client: EngineCoreOutputs(outputs=several) for client, several in outputs.items()}, True


def run_busy_loop(core: Any) -> None:
    """The core's own loop, over requests that its scheduler does not know of."""
    core.step_fn, core.post_step = step, lambda *_: None
    core.scheduler.has_requests = core.scheduler.has_unfinished_requests = lambda: bool(RUNNING)
    own_loop(core)


own_loop = EngineCoreProc.run_busy_loop
EngineCoreProc.run_busy_loop = run_busy_loop
EngineCoreProc.add_request, EngineCoreProc.abort_requests = add_request, abort_requests

if __name__ == "__main__":
    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    main()
