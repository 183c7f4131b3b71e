"""The tokenizer manager between a scheduler and a detokenizer that the test plays: order, ends, losses, refusals."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
import zmq.asyncio
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.io_struct import (
    AbortReq,
    BatchStrOutput,
    DetokenizerRequest,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    Message,
    RequestOutput,
    RequestText,
    TokenizedGenerateReqInput,
    decode,
    encode,
)
from ramet.srt.managers.metrics import Metrics
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.managers.prepare_requests import Limits, SequenceInput
from ramet.srt.managers.tokenizer_channel import MAX_MESSAGES_AT_ONCE
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.sampling.sampling_params import parse_sampling_params
from ramet.srt.text.output_format import OutputFormat
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer

WAIT_S = 10.0
LIMITS = Limits(vocab_size=331, max_req_len=100, has_eos=True, grammars=False)
LENGTH = FinishReason(type="length", length=1)
ABORTED = FinishReason(type="abort", message="aborted", status_code=499)

Result = TypeVar("Result")


def soon(work: Awaitable[Result]) -> Awaitable[Result]:
    return asyncio.wait_for(work, WAIT_S)


class Front:
    """The manager with its sockets, at whose other ends the test is."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, num_replicas: int = 1, method: str = "round_robin"):
        ports = PortArgs.in_directory(str(folder))
        self.context = zmq.asyncio.Context()
        self.metrics = Metrics("m")
        self.manager = TokenizerManager(
            tokenizer,
            LIMITS,
            ports,
            self.metrics,
            method,
            output_format=OutputFormat(tokenizer, ParserConfig()),
        )
        self.detokenizer = self._bind(ports.detokenizer_ipc_name)
        self.addresses = [f"ipc://{folder}/scheduler-{replica}" for replica in range(num_replicas)]
        self.schedulers = [self._bind(address) for address in self.addresses]
        self.answers = self.context.socket(zmq.PUSH)
        self.answers.connect(ports.tokenizer_ipc_name)
        self.receiving = asyncio.create_task(self.manager.receive_forever())

    def _bind(self, address: str) -> zmq.asyncio.Socket:
        socket = self.context.socket(zmq.PULL)
        socket.bind(address)
        return socket

    def open(self) -> "Front":
        self.manager.connect(self.addresses)
        self.manager.start_accepting(LIMITS.max_req_len, "default")
        return self

    async def read(self, replica: int = 0) -> Message:
        """The next message that the scheduler gets."""
        return decode(await soon(self.schedulers[replica].recv()))

    async def has_nothing_to_read(self, replica: int = 0) -> bool:
        """Whether the scheduler has got nothing more: what comes next is a question that the test asks."""
        asking = asyncio.create_task(self.manager.internal_states(0.05))
        message = await self.read(replica)
        await asyncio.wait([asking])
        return isinstance(message, GetInternalStateReq) and isinstance(asking.exception(), ServiceError)

    async def send(
        self, rid: str, text: str = "", ids: tuple[int, ...] = (), end: FinishReason | None = None, **more: Any
    ) -> None:
        """An output of the request, as the detokenizer sends it."""
        output = RequestOutput(
            rid=rid, token_ids=list(ids), finish_reason=end, prompt_tokens=1, completion_tokens=0, cached_tokens=0,
            **more,
        )  # fmt: skip
        await self.answers.send(encode(BatchStrOutput(outputs=[RequestText(text=text, output=output)])))

    async def start(self, rid: str, n: int = 1) -> "asyncio.Task[list[RunningSequence]]":
        """A client that waits for the whole answer; its request has reached the scheduler."""
        generation = await self.manager.generate([prompt(n=n)], rid)
        waiting = asyncio.create_task(generation.finish())
        for _ in range(n):
            assert isinstance(await self.read(), TokenizedGenerateReqInput)
        return waiting

    async def close(self) -> None:
        self.receiving.cancel()
        await asyncio.wait([self.receiving])
        self.manager.close()
        self.context.destroy(linger=0)


def prompt(**params: object) -> SequenceInput:
    return SequenceInput(
        input_ids=[5, 6, 7], sampling_params=parse_sampling_params({"max_new_tokens": 8, **params}, 331), stream=True
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_path(str(folder))


@pytest.fixture
async def closed_front(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Front]:
    front = Front(tokenizer, tmp_path)
    yield front
    await front.close()


@pytest.fixture
async def front(closed_front: Front) -> Front:
    return closed_front.open()


@pytest.fixture
async def replicas(tokenizer: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    """Two of them, that requests are spread over in the way the test names."""
    front = Front(tokenizer, tmp_path, 2, getattr(request, "param", "round_robin")).open()
    yield front
    await front.close()


# ---- taking requests ----


async def test_requests_are_refused_before_and_after(closed_front: Front) -> None:
    manager = closed_front.manager
    with pytest.raises(ServiceError, match="still loading"):
        await manager.generate([prompt()])
    closed_front.open()
    waiting = await closed_front.start("r")
    manager.stop_accepting("shutting down")
    assert manager.refusal == "shutting down"
    with pytest.raises(ServiceError, match="shutting down"):
        await manager.generate([prompt()])
    await closed_front.send("r", "a", (1,), LENGTH)  # what runs goes on
    assert [sequence.text for sequence in await soon(waiting)] == ["a"]


async def test_the_detokenizer_is_told_what_the_scheduler_gets(front: Front) -> None:
    await front.manager.generate([prompt(stop=["x"], no_stop_trim=True)], "r")
    announcement = decode(await soon(front.detokenizer.recv()))
    assert announcement == DetokenizerRequest(rid="r", prompt_tail_ids=[5, 6, 7], stop=["x"], no_stop_trim=True)
    request = await front.read()
    assert isinstance(request, TokenizedGenerateReqInput)
    assert (request.rid, request.input_ids, request.stream) == ("r", [5, 6, 7], True)


async def test_what_can_not_be_served_starts_nothing(front: Front) -> None:
    with pytest.raises(RequestError, match="token ids must be in"):
        await front.manager.generate(
            [prompt(), SequenceInput(input_ids=[999], sampling_params=prompt().sampling_params)]
        )
    assert front.manager.num_running == 0
    assert await front.has_nothing_to_read()


async def test_an_id_names_one_request_at_a_time(front: Front) -> None:
    waiting = await front.start("r")
    with pytest.raises(RequestError, match="'r' is already running"):
        await front.manager.generate([prompt()], "r")
    await front.send("r", end=LENGTH)
    await soon(waiting)
    await front.start("r")


# ---- outputs ----


async def test_each_sequence_gains_its_own_text_in_order(front: Front) -> None:
    generation = await front.manager.generate([prompt(n=2)], "r")
    gained: list[tuple[int, str, int, int]] = []

    async def read() -> None:
        async for update in generation.updates():
            gained.append((update.index, update.text, update.first_token, update.end_token))  # noqa: PERF401 - it grows

    reader = asyncio.create_task(read())
    outputs = [("r_1", "A", (1,)), ("r_0", "a", (2, 3)), ("r_1", "B", (4,)), ("r_0", "b", (5,))]
    for number, (rid, text, ids) in enumerate(outputs, 1):
        await front.send(rid, text, ids)
        async with asyncio.timeout(WAIT_S):
            while len(gained) < number:
                await asyncio.sleep(0.001)
    for rid in ("r_0", "r_1"):
        await front.send(rid, ".", (9,), LENGTH)
    await soon(reader)
    assert gained == [(1, "A", 0, 1), (0, "a", 0, 2), (1, "B", 1, 2), (0, "b", 2, 3), (0, ".", 3, 4), (1, ".", 2, 3)]
    assert front.manager.num_running == 0
    assert front.metrics.registry.get_sample_value("ramet:num_requests_total", {"model_name": "m"}) == 2


async def test_an_output_of_an_unknown_request_changes_nothing(front: Front) -> None:
    waiting = await front.start("r")
    await front.send("never-asked-for", "x", (1,))
    await front.send("never-asked-for", "x", (1,), LENGTH)
    await front.send("r", "a", (1,), LENGTH)
    assert [sequence.text for sequence in await soon(waiting)] == ["a"]


async def test_a_message_for_somebody_else_ends_the_receiving(front: Front) -> None:
    await front.answers.send(encode(AbortReq(rid="r")))
    with pytest.raises(TypeError, match="AbortReq, which it doesn't handle"):
        await soon(front.receiving)


# ---- ends ----


async def test_an_aborted_request_ends_with_what_it_has(front: Front) -> None:
    waiting = await front.start("r", n=2)
    await front.send("r_0", "a", (1,))
    assert front.manager.abort("r") == 2
    assert [await front.read(), await front.read()] == [AbortReq(rid="r_0"), AbortReq(rid="r_1")]
    assert front.manager.num_running == 2  # until the scheduler says that they have ended
    for rid in ("r_0", "r_1"):
        await front.send(rid, end=ABORTED)
    sequences = await soon(waiting)
    assert [(one.text, one.finish_reason) for one in sequences] == [("a", ABORTED), ("", ABORTED)]
    assert front.manager.abort("r") == 0
    assert front.metrics.registry.get_sample_value("ramet:num_aborted_requests_total", {"model_name": "m"}) == 2


async def test_one_sequence_of_several_is_aborted(front: Front) -> None:
    waiting = await front.start("r", n=2)
    assert front.manager.abort("r_1") == 1
    assert await front.read() == AbortReq(rid="r_1")
    await front.send("r_1", end=ABORTED)
    await front.send("r_0", "a", (1,), LENGTH)
    assert [one.finish_reason for one in await soon(waiting)] == [LENGTH, ABORTED]


@pytest.mark.parametrize(("status_code", "kind"), [(400, RequestError), (503, ServiceError), (500, ServiceError)])
async def test_what_the_scheduler_refuses_is_an_error_and_ends_the_rest(
    front: Front, status_code: int, kind: type
) -> None:
    waiting = await front.start("r", n=2)
    await front.send("r_1", end=FinishReason(type="abort", message="too much", status_code=status_code))
    with pytest.raises(kind, match="^too much$") as error:
        await soon(waiting)
    assert error.value.status_code == status_code
    assert await front.read() == AbortReq(rid="r_0")
    assert front.manager.num_running == 0


async def test_a_client_that_goes_ends_its_request(front: Front) -> None:
    waiting = await front.start("r", n=2)
    await front.send("r_0", "a", (1,), LENGTH)
    waiting.cancel()
    await asyncio.wait([waiting])
    messages = [await front.read()]
    if messages == [AbortReq(rid="r_0")]:  # its end had not come yet
        messages = [await front.read()]
    assert messages == [AbortReq(rid="r_1")]
    assert front.manager.num_running == 0
    other = await front.start("s")
    await front.send("r_1", "late", (1,))
    await front.send("s", "b", (1,), LENGTH)
    assert [sequence.text for sequence in await soon(other)] == ["b"]


async def test_what_was_computed_for_a_client_that_has_gone_counts(front: Front) -> None:
    generation = await front.manager.generate([prompt(n=2)], "r")
    waiting = asyncio.create_task(generation.finish())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await front.send("r_0", "ab", (1, 2), ABORTED, queue_time_s=0.5, prefill_time_s=0.25, gaps_s=[0.125])
    await front.send("r_1", end=ABORTED, queue_time_s=2.0)  # it has waited all the time
    other = asyncio.create_task((await front.manager.generate([prompt()], "s")).finish())
    await front.send("s", "x", (1,), LENGTH, queue_time_s=4.0)
    await soon(other)
    first, second = generation.sequences
    assert (first.output_ids, first.ttft_s, first.finish_reason) == ([1, 2], 0.75, ABORTED)
    assert (second.queue_time_s, second.ttft_s, second.finish_reason) == (2.0, 0.0, ABORTED)

    def value(name: str) -> float | None:
        return front.metrics.registry.get_sample_value(f"ramet:{name}", {"model_name": "m"})

    await asyncio.sleep(0)  # the metrics are told behind those who wait
    assert value("generation_tokens_total") == 3 and value("prompt_tokens_total") == 6
    assert value("queue_time_seconds_sum") == 6.5 and value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_sum") == 0.125
    assert value("num_aborted_requests_total") == 2 and value("num_requests_total") == 1


async def test_a_refused_request_has_got_nothing(front: Front) -> None:
    waiting = await front.start("r")
    await front.send("r", end=FinishReason(type="abort", message="full", status_code=503))
    with pytest.raises(ServiceError):
        await soon(waiting)
    await asyncio.sleep(0)
    for name in ("prompt_tokens_total", "time_to_first_token_seconds_count", "queue_time_seconds_count"):
        assert front.metrics.registry.get_sample_value(f"ramet:{name}", {"model_name": "m"}) == 0, name


async def test_a_client_that_leaves_a_stream_ends_its_request(front: Front) -> None:
    generation = await front.manager.generate([prompt()], "r")
    await front.read()
    await front.send("r", "a", (1,))
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            assert update.text == "a"
            break
    assert await front.read() == AbortReq(rid="r")
    assert front.manager.num_running == 0


async def test_the_id_of_a_client_that_has_gone_is_free_when_its_request_has_ended(front: Front) -> None:
    """Or else its last output would end the one that follows."""
    waiting = await front.start("r")
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await front.read() == AbortReq(rid="r")
    with pytest.raises(RequestError, match="'r' is already running"):
        await front.manager.generate([prompt()], "r")
    await front.send("r", "late", (1,))
    await front.send("r", end=ABORTED)
    other = await front.start("other")
    await front.send("other", end=LENGTH)  # comes behind
    await soon(other)
    again = await front.start("r")
    await front.send("r", "b", (1,), LENGTH)
    assert [sequence.text for sequence in await soon(again)] == ["b"]


async def test_a_scheduler_that_dies_leaves_nobody_waiting(front: Front) -> None:
    waiting = [await front.start("r", n=2), await front.start("s")]
    asking = asyncio.create_task(front.manager.flush_cache())
    assert isinstance(await front.read(), FlushCacheReqInput)
    front.manager.stop_accepting("the scheduler has died")
    front.manager.fail_all(ServiceError("the scheduler has died"))
    for one in (*waiting, asking):
        with pytest.raises(ServiceError, match="the scheduler has died"):
            await soon(one)
    assert front.manager.num_running == 0
    assert await front.manager.drain(WAIT_S)
    with pytest.raises(ServiceError, match="the scheduler has died"):
        await front.manager.generate([prompt()])
    with pytest.raises(ServiceError, match="the scheduler has died"):
        await soon(front.manager.flush_cache())  # nobody is there who could answer


async def test_draining_waits_for_what_runs(front: Front) -> None:
    assert await front.manager.drain(0.01)
    waiting = await front.start("r")
    front.manager.stop_accepting("shutting down")
    assert not await front.manager.drain(0.01)
    draining = asyncio.create_task(front.manager.drain(WAIT_S))
    await front.send("r", "a", (1,), LENGTH)
    assert await soon(draining)
    assert [sequence.text for sequence in await soon(waiting)] == ["a"]


async def test_what_does_not_drain_is_aborted(front: Front) -> None:
    waiting = await front.start("r")
    assert front.manager.abort_all() == 1
    assert await front.read() == AbortReq(abort_all=True)
    await front.send("r", end=ABORTED)
    await soon(waiting)
    assert await front.manager.drain(WAIT_S)


# ---- several replicas, questions to all of them ----


async def test_requests_take_turns_and_are_aborted_where_they_run(replicas: Front) -> None:
    for rid in ("a", "b", "c"):
        await replicas.manager.generate([prompt()], rid)
    assert [(await replicas.read(0)).rid, (await replicas.read(0)).rid] == ["a", "c"]
    assert (await replicas.read(1)).rid == "b"
    replicas.manager.abort("b")
    assert await replicas.read(1) == AbortReq(rid="b")
    replicas.manager.abort_all()
    assert [await replicas.read(0), await replicas.read(1)] == [AbortReq(abort_all=True)] * 2


@pytest.mark.parametrize("replicas", ["total_requests"], indirect=True)
async def test_requests_go_where_the_fewest_run(replicas: Front) -> None:
    generations = [await replicas.manager.generate([prompt()], rid) for rid in ("a", "b")]
    assert [(await replicas.read(0)).rid, (await replicas.read(1)).rid] == ["a", "b"]
    await replicas.send("b", end=LENGTH)
    await soon(generations[1].finish())
    await replicas.manager.generate([prompt()], "c")  # it would be the first replica's turn
    assert (await replicas.read(1)).rid == "c"


async def test_every_replica_is_asked_and_a_refusal_counts(replicas: Front) -> None:
    asking = asyncio.create_task(replicas.manager.flush_cache())
    questions = [await replicas.read(0), await replicas.read(1)]
    for question, success in zip(questions, (True, False), strict=True):
        assert isinstance(question, FlushCacheReqInput)
        reply = FlushCacheReqOutput(request_id=question.request_id, success=success, message=f"{success}")
        await replicas.answers.send(encode(reply))
    reply = await soon(asking)
    assert (reply.success, reply.message) == (False, "False")


async def test_a_scheduler_that_does_not_answer_is_not_waited_for(replicas: Front) -> None:
    with pytest.raises(ServiceError, match=r"^the scheduler has not answered for 0.05 s$"):
        await replicas.manager.internal_states(0.05)
    question = await replicas.read(0)
    late = FlushCacheReqOutput(request_id=question.request_id, success=True, message="")
    await replicas.answers.send(encode(late))  # nobody waits for it any more
    generation = await replicas.manager.generate([prompt()], "r")
    await replicas.send("r", "a", (1,), LENGTH)
    assert [sequence.text for sequence in await soon(generation.finish())] == ["a"]


async def test_many_messages_at_once_are_all_taken(front: Front) -> None:
    waiting = await front.start("r")
    for number in range(5 * MAX_MESSAGES_AT_ONCE):
        await front.send("r", text=f"{number} ", ids=(number,))
    await front.send("r", ids=(7,), end=FinishReason(type="length", length=1))
    (sequence,) = await soon(waiting)
    assert sequence.text.split() == [str(number) for number in range(5 * MAX_MESSAGES_AT_ONCE)]
