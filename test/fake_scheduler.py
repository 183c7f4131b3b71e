"""Stands in for the scheduler process: no model, no torch. It repeats the prompt's tokens over and over.

A constraint is compiled as the real one does it, so that it can be refused; it changes nothing else.

What it does wrong comes from the environment: FAKE_FAULT is "" or one of fail_start, die_at_start, hang_at_start,
die_at_token, hang_at_token, hold_lock_at_token; FAKE_STEP_S is the seconds between two tokens; FAKE_START_S the seconds
before it is ready; FAKE_PROFILE a file that it makes when a profile is to be ended.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.managers.child_process import die_with_parent, read_child_config, send_status, status_fd_argument
from ramet.srt.managers.grammar_pool import make_grammar_pool
from ramet.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    Message,
    ProfileReqOutput,
    RequestOutput,
    SchedulerFailed,
    SchedulerReady,
    StartProfileReqInput,
    StopProfileReqInput,
    TokenizedGenerateReqInput,
    TokenLogprobs,
    decode,
    encode,
)
from ramet.srt.managers.pulse import Task
from ramet.srt.managers.watchdog import start_pulse
from ramet.srt.sampling.constraint import constraint_of
from ramet.srt.text.incremental_decode import PROMPT_TAIL_TOKENS, IncrementalDecoder, TextStream
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.weights.report import LoadReport

LOGPROB = -0.5
MAX_TOTAL_TOKENS = 4096
GRAMMAR_TIMEOUT_S = 30.0


@dataclass
class FakeRequest:
    """One running request."""

    message: TokenizedGenerateReqInput
    stream: TextStream
    output_ids: list[int] = field(default_factory=list)
    num_sent: int = 0
    aborted: bool = False

    def step(self, eos_token_ids: tuple[int, ...]) -> RequestOutput | None:
        """Make one token; what there is to send now."""
        params, prompt = self.message.sampling_params, self.message.input_ids
        token_id = prompt[len(self.output_ids) % len(prompt)]
        if params.max_new_tokens:
            self.output_ids.append(token_id)
            self.stream.push([token_id])
        reason = None
        if self.aborted:
            reason = FinishReason(type="abort", message="aborted", status_code=499)
        elif params.max_new_tokens == 0:
            reason = FinishReason(type="length", length=0)
        elif token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos):
            reason = FinishReason(type="stop", matched=token_id)
        elif self.stream.matched is not None:
            reason = FinishReason(type="stop", matched=self.stream.matched)
        elif len(self.output_ids) >= params.max_new_tokens:
            reason = FinishReason(type="length", length=len(self.output_ids))
        if reason is None and not self.message.stream:
            return None
        new, first = self.output_ids[self.num_sent :], self.num_sent == 0
        self.num_sent = len(self.output_ids)
        wants = self.message.return_logprob
        start = self.message.logprob_start_len
        return RequestOutput(
            rid=self.message.rid,
            token_ids=new,
            finish_reason=reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(self.output_ids),
            cached_tokens=0,
            input_logprobs=self.logprobs(prompt[start:], start == 0) if wants and start >= 0 and first else None,
            output_logprobs=self.logprobs(new, False) if wants else None,
        )

    def logprobs(self, token_ids: list[int], first_has_none: bool) -> TokenLogprobs:
        num = self.message.top_logprobs_num
        values: list[float | None] = [LOGPROB] * len(token_ids)
        tops = [[LOGPROB] * num for _ in token_ids]
        top_ids = [[(token_id + place) % 256 for place in range(num)] for token_id in token_ids]
        if first_has_none and token_ids:
            values[0], tops[0], top_ids[0] = None, [], []
        ranks = [num + 1] * len(token_ids)
        return TokenLogprobs(
            logprobs=values, token_ids=token_ids, top_logprobs=tops, top_token_ids=top_ids, ranks=ranks
        )


class FakeScheduler:
    """Takes messages and makes tokens until it is killed."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, model_path: str, max_queued: int, max_running: int):
        self.tokenizer = tokenizer
        self.config = config
        self.max_requests = max_queued + max_running
        self.grammars = make_grammar_pool("llguidance", lambda: model_path, config)
        self.running: dict[str, FakeRequest] = {}
        self.step_s = float(os.environ.get("FAKE_STEP_S", "0"))
        self.fault = os.environ.get("FAKE_FAULT", "")

    def handle(self, message: Message) -> Message | None:
        if isinstance(message, TokenizedGenerateReqInput):
            return self.accept(message)
        if isinstance(message, AbortReq):
            for rid, request in self.running.items():
                request.aborted |= message.abort_all or rid == message.rid
            return None
        if isinstance(message, FlushCacheReqInput):
            idle = not self.running
            return FlushCacheReqOutput(request_id=message.request_id, success=idle, message="" if idle else "busy")
        if isinstance(message, StartProfileReqInput | StopProfileReqInput):
            if isinstance(message, StopProfileReqInput) and "FAKE_PROFILE" in os.environ:
                Path(os.environ["FAKE_PROFILE"]).touch()
            return ProfileReqOutput(request_id=message.request_id, success=True, message="")
        assert isinstance(message, GetInternalStateReq)
        return GetInternalStateReqOutput(
            request_id=message.request_id,
            num_running_reqs=len(self.running),
            num_waiting_reqs=0,
            num_used_tokens=sum(len(request.output_ids) for request in self.running.values()),
            num_cached_tokens=0,
            max_total_num_tokens=MAX_TOTAL_TOKENS,
            num_retracted_reqs=0,
            last_gen_throughput=0.0,
        )

    def accept(self, message: TokenizedGenerateReqInput) -> Message | None:
        reason = self.refusal(message)
        if reason is not None:
            refused = RequestOutput(
                rid=message.rid,
                token_ids=[],
                finish_reason=reason,
                prompt_tokens=0,
                completion_tokens=0,
                cached_tokens=0,
            )
            return BatchTokenIDOutput(outputs=[refused])
        params = message.sampling_params
        decoder = IncrementalDecoder(
            self.tokenizer, message.input_ids[-PROMPT_TAIL_TOKENS:], params.skip_special_tokens
        )
        self.running[message.rid] = FakeRequest(message, TextStream(decoder, params.stop, params.min_new_tokens))
        return None

    def refusal(self, message: TokenizedGenerateReqInput) -> FinishReason | None:
        if len(self.running) >= self.max_requests:
            return FinishReason(type="abort", message="the queue is full", status_code=503)
        constraint = constraint_of(message.sampling_params, message.grammar_before)
        if constraint is None or self.grammars is None:
            return None
        grammar = self.grammars.open(constraint)
        self.grammars.wait([grammar], GRAMMAR_TIMEOUT_S)
        grammar.close()
        if grammar.failure is None:
            return None
        text, status_code = grammar.failure
        return FinishReason(type="abort", message=text, status_code=status_code, param=constraint.name)

    def step(self) -> BatchTokenIDOutput:
        if self.fault == "die_at_token":
            os._exit(7)
        if self.fault == "hang_at_token":
            time.sleep(3600)
        if self.fault == "hold_lock_at_token":
            re.match("(a+)+$", 64 * "a" + "b")  # does not end, and holds Python's lock all the time
        time.sleep(self.step_s)
        outputs = []
        for rid, request in list(self.running.items()):
            output = request.step(self.config.eos_token_ids)
            if output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    del self.running[rid]
        return BatchTokenIDOutput(outputs=outputs)


def main(argv: list[str]) -> int:
    status_fd = status_fd_argument(argv)
    config = read_child_config()
    die_with_parent(config.parent_pid)
    pulse, _ = start_pulse(config)
    args, ports = config.make_server_args(), config.port_args
    limits = args.scheduler_config("cpu")
    fault = os.environ.get("FAKE_FAULT", "")
    time.sleep(float(os.environ.get("FAKE_START_S", "0")))
    if fault == "fail_start":
        send_status(status_fd, encode(SchedulerFailed(world_rank=0, message="the fake scheduler\nwas told to fail")))
        return 1
    if fault == "die_at_start":
        return 3
    if fault == "hang_at_start":
        time.sleep(3600)
    model_config = ModelConfig.from_path(args.model_path, context_length=args.context_length)
    try:
        tokenizer = Tokenizer.from_path(args.model_path)
    except ValueError as error:
        send_status(status_fd, encode(SchedulerFailed(world_rank=0, message=str(error))))
        return 1
    scheduler = FakeScheduler(
        tokenizer, model_config, args.model_path, limits.max_queued_requests, limits.max_running_requests
    )
    context = zmq.Context()
    reader = context.socket(zmq.PULL)
    address = f"ipc://{config.directory}/scheduler-0"
    reader.bind(address)
    to_detokenizer, to_manager = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    to_detokenizer.connect(ports.detokenizer_ipc_name)
    to_manager.connect(ports.tokenizer_ipc_name)
    report = LoadReport(source="dummy", num_bytes=10, seconds=0.001, verified=False, weight_version=args.weight_version)
    ready = SchedulerReady(
        world_rank=0,
        max_total_num_tokens=MAX_TOTAL_TOKENS,
        max_running_requests=limits.max_running_requests,
        max_req_len=model_config.context_len,
        scheduler_addresses=[address],
        load_report=report,
        phases={"imports": 0.1},
    )
    turn = Task()
    pulse.serve(lambda: turn.since)
    send_status(status_fd, encode(ready))
    while os.getppid() == config.parent_pid:
        turn.begin()
        while reader.poll(0 if scheduler.running else 1000):
            answer = scheduler.handle(decode(reader.recv()))
            if isinstance(answer, BatchTokenIDOutput):
                to_detokenizer.send(encode(answer))
            elif answer is not None:
                to_manager.send(encode(answer))
        if scheduler.running:
            batch = scheduler.step()
            if batch.outputs:
                to_detokenizer.send(encode(batch))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
