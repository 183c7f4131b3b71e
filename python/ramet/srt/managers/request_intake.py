"""Owns how a request comes in: it is refused, has its constraint compiled first, or waits for its turn."""

import random
from collections.abc import Callable

from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.admission import Admission
from ramet.srt.managers.grammar_queue import GrammarQueue
from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput
from ramet.srt.managers.running_requests import RunningRequests
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.managers.scheduler_output import OutputSender, failure_reason, refusal
from ramet.srt.sampling.constraint import constraint_of


class RequestIntake:
    """What stands before the admission.

    Args:
        max_req_len: tokens of prompt and output together.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        max_req_len: int,
        running: RunningRequests,
        admission: Admission,
        grammar_queue: GrammarQueue,
        sender: OutputSender,
        clock: Callable[[], float],
    ):
        self._config = config
        self._max_req_len = max_req_len
        self._running = running
        self._admission = admission
        self._grammar_queue = grammar_queue
        self._sender = sender
        self._clock = clock
        self._seeds = random.Random(config.random_seed)

    def accept(self, message: TokenizedGenerateReqInput) -> None:
        """Take a request in, or refuse it."""
        if self._config.low_priority_values_first:
            message.priority = -message.priority
        params, prompt_len, max_len = message.sampling_params, len(message.input_ids), self._max_req_len
        seed = self._seeds.getrandbits(63) if params.sampling_seed is None else params.sampling_seed
        max_queued = self._config.max_queued_requests
        if prompt_len == 0:
            self._refuse(message, "the prompt is empty", 400)
        elif prompt_len > max_len - (message.pooling is None):
            text = f"the prompt has {prompt_len} tokens; the context of {max_len} has no room for it"
            self._refuse(message, text, 400)
        elif len(self._admission.waiting) + len(self._grammar_queue) >= max_queued:
            self._refuse(message, f"the queue is full ({max_queued} requests wait)", 503)
        else:
            if message.pooling is None:
                params.max_new_tokens = min(params.max_new_tokens, max_len - prompt_len)
            self._enqueue(message, seed)

    def _enqueue(self, message: TokenizedGenerateReqInput, seed: int) -> None:
        groups = [*(running.group for running in self._running.decoding), *self._grammar_queue.groups()]
        group = self._admission.least_busy_group(groups)
        try:
            constraint = constraint_of(message.sampling_params, message.grammar_before)
            if constraint is None:
                self._admission.put(Req(message, seed, group))
            else:
                self._grammar_queue.put(message, constraint, seed, group, self._clock())
        except ValueError as error:
            self._refuse(message, str(error), 400)

    def _refuse(self, message: TokenizedGenerateReqInput, text: str, status_code: int) -> None:
        self._sender.send([refusal(message, FinishReason(type="abort", message=text, status_code=status_code))])

    def collect_grammars(self) -> None:
        """Let the requests wait whose grammar is compiled."""
        for outcome in self._grammar_queue.collect():
            if isinstance(outcome, Req):
                self._admission.put(outcome)
            else:
                self._sender.send([refusal(outcome.message, failure_reason(outcome.param, outcome.reason))])
