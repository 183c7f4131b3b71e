"""One client request while it runs: merging for slow readers, failing, and giving up."""

import asyncio
from contextlib import aclosing

import pytest
from ramet.srt.errors import ServiceError
from ramet.srt.managers.generation import Generation
from ramet.srt.managers.io_struct import FinishReason, RequestOutput, RequestText, TokenizedGenerateReqInput
from ramet.srt.sampling.sampling_params import SamplingParams

END = FinishReason(type="length", length=1)


def make(num: int) -> tuple[Generation, list[Generation]]:
    released: list[Generation] = []
    requests = [
        TokenizedGenerateReqInput(rid=f"r_{number}", input_ids=[1], sampling_params=SamplingParams())
        for number in range(num)
    ]
    return Generation("r", requests, released.append), released


def add(generation: Generation, index: int, text: str, token_ids: list[int], end: FinishReason | None = None) -> None:
    output = RequestOutput(
        rid=f"r_{index}", token_ids=token_ids, finish_reason=end, prompt_tokens=1, completion_tokens=0, cached_tokens=0
    )
    generation.add(index, RequestText(text=text, output=output), now=1.0)


async def test_a_slow_reader_gets_merged_updates() -> None:
    generation, released = make(2)
    add(generation, 0, "a", [1])
    add(generation, 1, "x", [9])
    add(generation, 0, "b", [2, 3], END)
    add(generation, 1, "", [8], END)
    updates = [update async for update in generation.updates()]
    assert [(one.index, one.text, one.first_token, one.end_token) for one in updates] == [
        (0, "ab", 0, 3),
        (1, "x", 0, 2),
    ]
    assert [sequence.output_ids for sequence in generation.sequences] == [[1, 2, 3], [9, 8]]
    assert released == [generation]
    assert generation.unfinished() == []


async def test_a_fast_reader_gets_each_one() -> None:
    generation, _ = make(1)

    async def read() -> list[str]:
        return [update.text async for update in generation.updates()]

    reader = asyncio.create_task(read())
    for text, end in (("a", None), ("b", None), ("c", END)):
        add(generation, 0, text, [1], end)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert await reader == ["a", "b", "c"]


async def test_failure_reaches_the_reader() -> None:
    generation, released = make(1)
    add(generation, 0, "a", [1])
    generation.fail(ServiceError("the scheduler has died"))
    with pytest.raises(ServiceError, match="has died"):
        await generation.finish()
    assert released == [generation]
    assert len(generation.unfinished()) == 1


async def test_leaving_early_releases() -> None:
    generation, released = make(1)
    add(generation, 0, "a", [1])
    async with aclosing(generation.updates()) as updates:
        async for _ in updates:
            break
    assert released == [generation]


async def test_cancelling_releases() -> None:
    generation, released = make(1)
    waiter = asyncio.create_task(generation.finish())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert released == [generation]
