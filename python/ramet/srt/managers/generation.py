"""Owns one client request while its sequences run: what each has gained, and the updates for whoever waits for them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramet.srt.managers.io_struct import (
    FinishReason,
    RequestText,
    TokenizedGenerateReqInput,
    TokenLogprobs,
    VersionStart,
)
from ramet.srt.managers.logprobs import extend_logprobs, no_logprobs


@dataclass(kw_only=True)
class RunningSequence:
    """One sequence: its request and everything that has come out of it so far. Times are of time.monotonic()."""

    request: TokenizedGenerateReqInput
    created_s: float
    version_before: str = ""  # of the instance's weights when the request came
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    input_logprobs: TokenLogprobs = field(default_factory=no_logprobs)
    output_logprobs: TokenLogprobs = field(default_factory=no_logprobs)
    versions: list[VersionStart] = field(default_factory=list)  # of the weights that have made the output
    finish_reason: FinishReason | None = None
    vector: bytes = b""  # float32: what a pooled request is for
    cached_tokens: int = 0
    queue_time_s: float = 0.0
    prefill_time_s: float = 0.0
    last_output_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def weight_version(self) -> str:
        """That of the weights that have made the newest output; before there is any, that of the instance."""
        return self.versions[-1].version if self.versions else self.version_before

    @property
    def weight_versions(self) -> list[dict[str, Any]]:
        """Which version has made which output tokens: [start, end) of each, from the first to the last."""
        starts = self.versions or [VersionStart(self.version_before, 0)]
        ends = [*(one.start for one in starts[1:]), len(self.output_ids)]
        return [{"version": one.version, "start": one.start, "end": end} for one, end in zip(starts, ends, strict=True)]

    @property
    def has_begun(self) -> bool:
        """Whether something has come out of it; a refusal is nothing."""
        return bool(self.output_ids) or (self.finish_reason is not None and self.finish_reason.type != "abort")

    @property
    def e2e_latency_s(self) -> float:
        """Seconds from the request to its newest output."""
        return (self.last_output_s or time.monotonic()) - self.created_s

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to its first token, also where that was not sent by itself; 0 without one."""
        return self.queue_time_s + self.prefill_time_s if self.has_begun else 0.0

    def add(self, item: RequestText, now: float) -> None:
        """Take in what the scheduler and the detokenizer say."""
        output = item.output
        self.text += item.text
        self.output_ids += output.token_ids
        self.versions += output.new_versions
        self.cached_tokens = output.cached_tokens
        self.queue_time_s, self.prefill_time_s = output.queue_time_s, output.prefill_time_s
        for total, new in (
            (self.input_logprobs, output.input_logprobs),
            (self.output_logprobs, output.output_logprobs),
        ):
            if new is not None:
                extend_logprobs(total, new.token_ids, new)
        self.vector = output.vector
        self.finish_reason = output.finish_reason
        self.last_output_s = now


@dataclass(slots=True)
class Update:
    """What sequence `index` gained: text, and the output tokens [first_token, end_token)."""

    index: int
    text: str
    first_token: int
    end_token: int
    finish_reason: FinishReason | None


class Generation:
    """All sequences of one client request.

    Args:
        rid: the request's id, by which it can be aborted as a whole.
        release: called once at the end, when finished or given up, with this object.
        weight_version: of the instance now.
    """

    def __init__(
        self,
        rid: str,
        requests: Sequence[TokenizedGenerateReqInput],
        release: Callable[["Generation"], None],
        weight_version: str = "",
    ):
        now = time.monotonic()
        self.rid = rid
        self.sequences = [
            RunningSequence(request=request, created_s=now, version_before=weight_version) for request in requests
        ]
        self._release = release
        self._news: dict[int, Update] = {}  # by sequence: what nobody has taken yet
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def unfinished(self) -> list[RunningSequence]:
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    def add(self, index: int, item: RequestText, now: float) -> None:
        """Take in an output of sequence `index` and wake the waiting one. A slow reader gets several as one update."""
        sequence = self.sequences[index]
        first_token = len(sequence.output_ids)
        sequence.add(item, now)
        update = self._news.get(index)
        if update is None:
            end_token = len(sequence.output_ids)
            self._news[index] = Update(index, item.text, first_token, end_token, sequence.finish_reason)
        else:
            update.text += item.text
            update.end_token, update.finish_reason = len(sequence.output_ids), sequence.finish_reason
        self._wake()

    def fail(self, error: Exception) -> None:
        """Have whoever waits get `error`."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """What the sequences gain, until all have finished. A slow reader gets several updates merged into one.

        Leaving early, by an exception or aclose(), aborts what still runs.

        Raises:
            RequestError: if the scheduler refuses a sequence.
            ServiceError: if the instance can't finish the request.
        """
        try:
            num_running = len(self.sequences)
            while num_running:
                for update in await self._take():
                    num_running -= update.finish_reason is not None
                    yield update
        finally:
            self._release(self)

    async def finish(self) -> list[RunningSequence]:
        """Wait until all sequences have finished. Raises what `updates` raises; cancelling it aborts."""
        async for _ in self.updates():
            pass
        return self.sequences

    async def _take(self) -> Iterable[Update]:
        """All there is, after waiting until there is something; an error comes before it."""
        while not self._news and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        news, self._news = self._news, {}
        return news.values()
