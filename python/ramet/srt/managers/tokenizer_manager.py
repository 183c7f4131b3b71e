"""Owns the main process's side of a request: from prompts to tokens for the scheduler, and its outputs to who waits.

It runs on one asyncio event loop and knows nothing of HTTP.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.data_parallel_controller import DataParallelController
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    ContinueReqInput,
    ContinueReqOutput,
    DetokenizerRequest,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    LoadLoraReqInput,
    LoraReqOutput,
    Message,
    PauseReqInput,
    PauseReqOutput,
    ProfileReqOutput,
    RenameWeightsReqInput,
    RenameWeightsReqOutput,
    RequestOutput,
    RequestText,
    StartProfileReqInput,
    StopProfileReqInput,
    TokenizedGenerateReqInput,
    UnloadLoraReqInput,
)
from ramet.srt.managers.lora_registry import LoraRegistry
from ramet.srt.managers.metrics import Metrics
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.managers.prefix_messages import PrefixCopyOutput, PrefixCopyReq
from ramet.srt.managers.prepare_requests import SLOW_CHARS, Limits, SequenceInput, is_slow, prepare_requests
from ramet.srt.managers.tokenizer_channel import TokenizerChannel
from ramet.srt.observability.request_record import RequestRecord, current_request
from ramet.srt.text.incremental_decode import prompt_tail
from ramet.srt.text.output_format import OutputFormat
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.weights.inspection_messages import WeightInspection, WeightInspectionOutput
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.update_messages import WeightStep, WeightStepOutput

CONTROL_TIMEOUT_S = 10.0
ABORTED_STATUS = 499  # of a sequence that somebody has aborted: it ends with what it has, other ends are errors

Question = (
    FlushCacheReqInput
    | GetInternalStateReq
    | StartProfileReqInput
    | StopProfileReqInput
    | LoadLoraReqInput
    | UnloadLoraReqInput
    | PauseReqInput
    | ContinueReqInput
    | RenameWeightsReqInput
    | WeightStep
    | MemoryStep
    | WeightInspection
    | PrefixCopyReq
)
AnyReply = (
    FlushCacheReqOutput
    | GetInternalStateReqOutput
    | ProfileReqOutput
    | LoraReqOutput
    | PauseReqOutput
    | ContinueReqOutput
    | RenameWeightsReqOutput
    | WeightStepOutput
    | WeightInspectionOutput
    | PrefixCopyOutput
)
Reply = TypeVar("Reply", bound=AnyReply)


class TokenizerManager:
    """Takes requests, sends them to the scheduler, and hands back what comes out.

    Until `start_accepting`, and after `stop_accepting`, every request gets a ServiceError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        port_args: PortArgs,
        metrics: Metrics,
        load_balance_method: str = "round_robin",
        *,
        output_format: OutputFormat,
    ):
        self.tokenizer = tokenizer
        self.output_format = output_format
        self.limits = limits
        self.metrics = metrics
        self.adapters = LoraRegistry()
        self.weight_version = ""  # that the instance serves, once it does
        self._refusal: str | None = "the model is still loading"
        self.pause_refusal: str | None = None  # why requests are refused in a pause, where they are
        self.weights_refusal: str | None = None  # why requests are refused while the weights are none to serve
        self._running: dict[str, tuple[Generation, int]] = {}
        # Given up, and their last outputs, which still bear their ids, are to come.
        self._ending: dict[str, RunningSequence] = {}
        # Output of a sequence, when it came, and whether it is its first: what the metrics are yet to be told.
        self._uncounted: list[tuple[RunningSequence, RequestOutput, float, bool]] = []
        self._ends: list[tuple[RunningSequence, FinishReason]] = []  # which they are to be told after it
        self._idle = asyncio.Event()
        self._idle.set()
        self._replies: dict[str, asyncio.Future[AnyReply]] = {}
        self._end: ServiceError | None = None  # why nobody answers any more
        self._channel = TokenizerChannel(port_args)
        self._controller = DataParallelController(load_balance_method)
        self._tell_detokenizer = self._channel.connect(port_args.detokenizer_ipc_name)

    # ---- life ----

    def connect(self, scheduler_addresses: Sequence[str]) -> None:
        """The scheduler of each replica reads at its address; it can be asked, though not for tokens yet."""
        self._controller.connect([self._channel.connect(address) for address in scheduler_addresses])

    def start_accepting(self, max_req_len: int, weight_version: str) -> None:
        """The instance is ready."""
        self.limits = replace(self.limits, max_req_len=max_req_len)
        self.note_weight_version(weight_version)
        self._refusal = None

    def note_weight_version(self, version: str) -> None:
        """Say of the instance that it serves this version of the weights."""
        self.weight_version = version
        self.metrics.observe_weight_version(version)

    def stop_accepting(self, reason: str) -> None:
        """Refuse new requests, with `reason`; running ones go on."""
        self._refusal = reason

    @property
    def refusal(self) -> str | None:
        """Why requests are refused now; None when they are taken."""
        return self._refusal

    @property
    def num_running(self) -> int:
        """Sequences that have not finished."""
        return len(self._running)

    async def wait_idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False if something still does after `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def fail_all(self, error: ServiceError) -> None:
        """Give up every running request, and every question to a replica, of now or later: who asks gets `error`."""
        self._end = error
        for generation in {id(generation): generation for generation, _ in self._running.values()}.values():
            generation.fail(error)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)

    def close(self) -> None:
        """Close the sockets; unsent messages are dropped."""
        self._channel.close()

    # ---- requests ----

    async def generate(self, inputs: list[SequenceInput], rid: str | None = None) -> Generation:
        """Start the sequences of one client request: `n` of each input, in order.

        They have the id `rid`, or if they are several `rid` with their number behind it.

        Raises:
            RequestError: if an input can't be served; nothing is started then.
            ServiceError: if the instance takes no requests now.
        """
        self._check_accepting()
        record = current_request()
        rid = rid or _new_rid(record)
        prepare = functools.partial(prepare_requests, inputs, rid, self.tokenizer, self.limits)
        requests = await asyncio.to_thread(prepare) if is_slow(inputs) else prepare()
        self._check_accepting()
        if any(request.rid in self._running or request.rid in self._ending for request in requests):
            raise RequestError(f"a request with the id {rid!r} is already running", param="rid")
        for request in requests:
            request.lora_id = self.adapters.resolve(request.lora_name)
        generation = Generation(rid, requests, self._release, self.weight_version)
        if record is not None:
            record.generations.append((inputs, generation))
        self._idle.clear()
        for index, request in enumerate(requests):
            self._running[request.rid] = generation, index
            self.adapters.begin(request.rid, request.lora_id)
            self._send_request(request)
        return generation

    async def count_tokens(self, text: str, add_special_tokens: bool) -> int:
        """How many tokens a text is."""
        encode = functools.partial(self.tokenizer.encode, text, add_special_tokens)
        return len(await asyncio.to_thread(encode) if len(text) > SLOW_CHARS else encode())

    def abort(self, rid: str) -> int:
        """Ask the scheduler to end a request or one of its sequences; the number of sequences that this concerns."""
        rids = [one for one, (generation, _) in self._running.items() if rid in (one, generation.rid)]
        for one in rids:
            self._controller.abort(one)
        return len(rids)

    def abort_all(self) -> int:
        """Ask the scheduler to end everything; the number of sequences that this concerns."""
        self._controller.broadcast(AbortReq(abort_all=True))
        return len(self._running)

    async def flush_cache(self) -> FlushCacheReqOutput:
        """Drop every replica's prefix cache; the first refusal, if any. Raises ServiceError without an answer."""
        replies = await self.ask_all(FlushCacheReqInput, FlushCacheReqOutput)
        return min(replies, key=lambda reply: reply.success)

    async def internal_states(self, timeout_s: float = CONTROL_TIMEOUT_S) -> list[GetInternalStateReqOutput]:
        """The numbers of each replica's scheduler. Raises ServiceError if one doesn't answer."""
        return await self.ask_all(GetInternalStateReq, GetInternalStateReqOutput, timeout_s)

    @property
    def num_replicas(self) -> int:
        return self._controller.num_replicas

    async def receive_forever(self) -> None:
        """Hand what comes from the other processes to who waits for it. Runs until cancelled."""
        await self._channel.receive_forever(self._take_message)

    def _take_message(self, message: Message) -> None:
        if isinstance(message, BatchStrOutput):
            now = time.monotonic()
            for item in message.outputs:
                self._take_output(item, now)
            asyncio.get_running_loop().call_soon(self._count_outputs)  # behind those who wait for the outputs
        elif isinstance(message, BatchEmbeddingOutput):
            now = time.monotonic()
            for output in message.outputs:
                self._take_output(RequestText(text="", output=output), now)
            asyncio.get_running_loop().call_soon(self._count_outputs)
        elif isinstance(message, AnyReply):
            future = self._replies.get(message.request_id)
            if future is not None and not future.done():
                future.set_result(message)
        else:
            raise TypeError(f"the tokenizer manager got a {type(message).__name__}, which it doesn't handle")

    # ---- inside ----

    def _check_accepting(self) -> None:
        if (refusal := self._refusal or self.weights_refusal or self.pause_refusal) is not None:
            raise ServiceError(refusal)

    def _send_request(self, request: TokenizedGenerateReqInput) -> None:
        """To the scheduler first, which has more to do; the detokenizer keeps what comes before its announcement."""
        self._controller.dispatch(request)
        if request.pooling is not None:  # it has no text to come
            return
        params = request.sampling_params
        announcement = DetokenizerRequest(
            rid=request.rid,
            prompt_tail_ids=prompt_tail(self.tokenizer, request.input_ids, params.skip_special_tokens),
            stop=params.stop,
            min_new_tokens=params.min_new_tokens,
            skip_special_tokens=params.skip_special_tokens,
            no_stop_trim=params.no_stop_trim,
        )
        self._tell_detokenizer(announcement)

    def _take_output(self, item: RequestText, now: float) -> None:
        if item.output.finish_reason is not None:
            self.adapters.end(item.output.rid)
        rid, reason = item.output.rid, item.output.finish_reason
        entry = self._running.get(rid)
        if entry is None:
            self._take_last_output(item, now)
            return
        generation, index = entry
        sequence = generation.sequences[index]
        had_begun = sequence.has_begun
        generation.add(index, item, now)
        self._uncounted.append((sequence, item.output, now, sequence.has_begun > had_begun))
        if reason is None:
            return
        self._ends.append((sequence, reason))
        self._forget(rid)
        if reason.type == "abort" and reason.status_code not in (None, ABORTED_STATUS):
            message = reason.message or "the request was refused"
            if reason.status_code < 500:
                generation.fail(RequestError(message, param=reason.param, status_code=reason.status_code))
            else:
                generation.fail(ServiceError(message, status_code=reason.status_code))

    def _take_last_output(self, item: RequestText, now: float) -> None:
        """Its client has gone. What was computed for it counts nevertheless."""
        sequence = self._ending.get(item.output.rid)
        if sequence is None:
            return
        had_begun = sequence.has_begun
        sequence.add(item, now)
        self._uncounted.append((sequence, item.output, now, sequence.has_begun > had_begun))
        if item.output.finish_reason is not None:
            del self._ending[item.output.rid]

    def _count_outputs(self) -> None:
        uncounted, self._uncounted = self._uncounted, []
        ends, self._ends = self._ends, []
        for sequence, output, now, begins in uncounted:
            self.metrics.observe_output(sequence, output, now, begins=begins)
        for sequence, reason in ends:
            self.metrics.observe_end(sequence, reason)

    def _release(self, generation: Generation) -> None:
        """The client has all it wanted, or has gone: end what still runs."""
        for sequence in generation.unfinished():
            rid = sequence.request.rid
            if rid in self._running:
                self._controller.abort(rid)
                self._forget(rid)
                self._ending[rid] = sequence
                self.metrics.observe_abort()

    def _forget(self, rid: str) -> None:
        del self._running[rid]
        self._controller.forget(rid)
        if not self._running:
            self._idle.set()

    async def ask_all(
        self,
        question: Callable[..., Question],
        kind: type[Reply],
        timeout_s: float = CONTROL_TIMEOUT_S,
        replicas: Sequence[int] | None = None,
    ) -> list[Reply]:
        """Every replica's answer, in the order of the data-parallel ranks; or those of some.

        Raises:
            ServiceError: if one doesn't answer within `timeout_s`.
        """
        request_id = uuid.uuid4().hex
        chosen = range(self._controller.num_replicas) if replicas is None else replicas
        questions = [(replica, question(request_id=f"{request_id}-{replica}")) for replica in chosen]
        return await asyncio.gather(*(self._ask(replica, message, kind, timeout_s) for replica, message in questions))

    async def _ask(
        self,
        replica: int,
        message: Question,
        kind: type[Reply],
        timeout_s: float,
    ) -> Reply:
        if self._end is not None:
            raise ServiceError(str(self._end))
        request_id = message.request_id
        future: asyncio.Future[AnyReply] = asyncio.get_running_loop().create_future()
        self._replies[request_id] = future
        try:
            self._controller.send(replica, message)
            reply = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise ServiceError(f"the scheduler has not answered for {timeout_s:g} s") from None
        finally:
            del self._replies[request_id]
        assert isinstance(reply, kind)
        return reply


def _new_rid(record: RequestRecord | None) -> str:
    """An id that no other request has. It begins with the HTTP request's, which can be found by it in every log."""
    unique = uuid.uuid4().hex
    if record is None:
        return unique
    is_used = record.is_given or bool(record.generations)
    return f"{record.request_id}-{unique[:12]}" if is_used else record.request_id
