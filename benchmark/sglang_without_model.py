"""SGLang's server with a scheduler that computes nothing, for benchmark/bench_http.py. Runs in SGLang's environment.

    python benchmark/sglang_without_model.py --model-path FOLDER --device cpu --port 30001

As the fake scheduler of Ramet's tests it makes a token for each request in every step, of the prompt's tokens over and
over. It speaks 0.5.23's messages; the processes before and behind it are SGLang's own.
"""

import sys
import time
from array import array
from typing import Any

import msgspec
import zmq
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.managers.io_struct import BatchTokenIDOutput, TokenizedGenerateReqInput, sock_recv, sock_send
from sglang.srt.server_args import prepare_server_args

REQUIRED = [field.name for field in msgspec.structs.fields(BatchTokenIDOutput) if field.required]
MAX_TOKENS = 1 << 20
PROMPT_TAIL = 5  # tokens that the detokenizer gets with a request's first one, as context
REPORT = {"status": "ready", "max_total_num_tokens": MAX_TOKENS, "max_req_input_len": 4096, "startup_time": 0.0}


class Running:
    """A request, and how many tokens it has."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.prompt = list(request.input_ids)
        self.num_tokens = self.num_sent = 0

    def step(self) -> bool:
        """One token more; whether there is something to send."""
        self.num_tokens += 1
        return self.request.stream or self.is_done

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.request.sampling_params.max_new_tokens

    def new_ids(self) -> list[int]:
        """The tokens that have not been sent."""
        return [self.prompt[place % len(self.prompt)] for place in range(self.num_sent, self.num_tokens)]


def output(ready: list[Running]) -> BatchTokenIDOutput:
    number, new_ids = len(ready), [one.new_ids() for one in ready]
    tails = [[] if one.num_sent else one.prompt[-PROMPT_TAIL:] for one in ready]
    fields: dict[str, Any] = {
        "rids": [one.request.rid for one in ready],
        "http_worker_ipcs": [None] * number,
        "finished_reasons": [{"type": "length", "length": one.num_tokens} if one.is_done else None for one in ready],
        "decoded_texts": [""] * number,
        "decode_ids": [array("q", tail + new) for tail, new in zip(tails, new_ids, strict=True)],
        "output_ids": [array("q", new) for new in new_ids],
        "read_offsets": [min(PROMPT_TAIL, len(one.prompt)) for one in ready],
        "skip_special_tokens": [True] * number,
        "spaces_between_special_tokens": [True] * number,
        "no_stop_trim": [False] * number,
        "prompt_tokens": [len(one.prompt) for one in ready],
        "reasoning_tokens": [0] * number,
        "completion_tokens": [one.num_tokens for one in ready],
        "cached_tokens": [0] * number,
        "retraction_counts": [0] * number,
    }
    for one in ready:
        one.num_sent = one.num_tokens
    return BatchTokenIDOutput(**dict.fromkeys(REQUIRED) | fields)


def run_scheduler(_server_args: Any, ports: Any, *others: Any) -> None:
    """In the place of SGLang's own function of the process."""
    writer = next(one for one in others if hasattr(one, "send"))
    context = zmq.Context()
    reader, detokenizer = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket in (reader, detokenizer):
        socket.set_hwm(0)
    reader.connect(ports.scheduler_input_ipc_name)
    detokenizer.connect(ports.detokenizer_ipc_name)
    writer.send(REPORT)
    running: dict[str, Running] = {}
    while True:
        while reader.poll(0 if running else 1000):
            message = sock_recv(reader)
            for one in getattr(message, "batch", [message]):
                if isinstance(one, TokenizedGenerateReqInput):
                    running[one.rid] = Running(one)
        ready = [one for one in running.values() if one.step()]
        if ready:
            sock_send(detokenizer, output(ready))
        running = {rid: one for rid, one in running.items() if not one.is_done}
        time.sleep(0)


if __name__ == "__main__":
    launch_server(prepare_server_args(sys.argv[1:]), run_scheduler_process_func=run_scheduler)
