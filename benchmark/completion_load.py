"""Loads of POST /v1/completions, as any server answers it: streamed, prompts of token ids. It judges nothing.

While a load runs, what comes is only kept with its time; it is parsed afterwards: the client shall not be what limits.
"""

import asyncio
import dataclasses
import json
import math
import random
import time
from array import array
from collections.abc import Sequence
from importlib.util import find_spec

import aiohttp
from bench_common import percentile

REQUEST_TIMEOUT_S = 900.0
FIRST_ID = 10  # ids below are left out: a tokenizer may use them for special tokens
ERROR_CHARS = 300


class Prompts:
    """Random prompts as the text of their JSON: the words of a vocabulary are made once."""

    def __init__(self, vocab_size: int, seed: str) -> None:
        self.generator = random.Random(seed)
        self._words = [str(token_id) for token_id in range(FIRST_ID, vocab_size)]

    def make(self, length: int) -> str:
        return ",".join(self.generator.choices(self._words, k=length))


@dataclasses.dataclass
class Request:
    """One request of a load."""

    prompt: str  # token ids with commas between them
    output_len: int
    at_s: float = 0.0  # when it is sent, from the load's start
    kind: str = ""
    model: str = ""  # the server's first one when empty

    def body(self, model: str) -> bytes:
        fields = {
            "model": self.model or model, "max_tokens": self.output_len, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return f'{json.dumps(fields)[:-1]}, "prompt": [{self.prompt}]}}'.encode()


@dataclasses.dataclass
class Outcome:
    """What became of a request. Times are seconds from the load's start."""

    kind: str = ""
    output_len: int = 0
    sent_s: float = math.nan
    end_s: float = math.nan
    times: array = dataclasses.field(default_factory=lambda: array("d"))  # of the events that brought something
    num_tokens: int = 0  # as the server counts them
    error: str = ""  # "" if it has all its tokens

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    def gaps(self, start_s: float = -math.inf, end_s: float = math.inf) -> list[float]:
        """Seconds between two events, both of them between `start_s` and `end_s`."""
        times = self.times
        return [
            later - time for time, later in zip(times, times[1:], strict=False) if time >= start_s and later <= end_s
        ]


class _Answer:
    """The pieces of one answer with their times, until they are parsed."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._pieces: list[tuple[float, bytes]] = []
        self.add = self._pieces.append

    def parse(self) -> None:
        """Fill in the outcome, unless it has failed before."""
        if not self._outcome.error:
            self._outcome.error = self._parse()
        self._pieces.clear()

    def _parse(self) -> str:
        """What is wrong with the answer; "" if nothing is."""
        outcome, rest, is_done = self._outcome, b"", False
        for when, piece in self._pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    is_done = True
                elif line.startswith(b"data: ") and (error := _take_event(outcome, line[6:], when)):
                    return error
        if not is_done:
            return "the stream has no end"
        if outcome.num_tokens != outcome.output_len or not outcome.times:
            return f"{outcome.num_tokens} tokens came, not {outcome.output_len}"
        return ""


def _take_event(outcome: Outcome, data: bytes, when: float) -> str:
    """Note what an event says; the error that it tells, or ""."""
    try:
        event = json.loads(data)
        if event.get("error"):
            return str(event["error"])[:ERROR_CHARS]
        outcome.num_tokens = (event.get("usage") or {}).get("completion_tokens", outcome.num_tokens)
        choices = event.get("choices")
        # The end is no news by itself, unless nothing came before: tokens may have no text.
        if choices and (choices[0].get("text") or not choices[0].get("finish_reason") or not outcome.times):
            outcome.times.append(when)
    except (ValueError, AttributeError, TypeError) as error:
        return f"an event that can't be read: {error}"
    return ""


class Client:
    """A connection to a server, whose one model is asked."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession) -> None:
        self._url = url + "/v1/completions"
        self._model = model
        self._session = session

    async def run(self, requests: Sequence[Request], parses_at_once: bool = False) -> list[Outcome]:
        """Send each request when it is its time; how they ended, in their order.

        Args:
            parses_at_once: each answer when it has ended, which holds the others up by some tenths of a millisecond;
                a load of hours does not fit into memory otherwise.
        """
        bodies = [request.body(self._model) for request in requests] if not parses_at_once else None
        outcomes = [Outcome(request.kind, request.output_len) for request in requests]
        answers = [_Answer(outcome) for outcome in outcomes]
        start = time.perf_counter()

        async def one(place: int) -> None:
            await self._stream(bodies[place] if bodies else requests[place].body(self._model), outcomes[place],
                               answers[place], start)  # fmt: skip
            if parses_at_once:
                answers[place].parse()

        async with asyncio.TaskGroup() as tasks:
            for place in sorted(range(len(requests)), key=lambda place: requests[place].at_s):
                if (wait_s := requests[place].at_s - (time.perf_counter() - start)) > 0:
                    await asyncio.sleep(wait_s)
                tasks.create_task(one(place))
        if not parses_at_once:
            for answer in answers:
                answer.parse()
        return outcomes

    async def _stream(self, body: bytes, outcome: Outcome, answer: _Answer, start: float) -> None:
        clock = time.perf_counter
        outcome.sent_s = clock() - start
        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    outcome.error = f"{response.status}: {(await response.text())[:ERROR_CHARS]}"
                    return
                async for piece in response.content.iter_any():
                    answer.add((clock() - start, piece))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        finally:
            outcome.end_s = clock() - start


class Load:
    """Runs loads one after the other in an event loop of its own: uvloop's if it is installed."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        factory = None
        if find_spec("uvloop") is not None:
            import uvloop

            factory = uvloop.new_event_loop
        self._runner = asyncio.Runner(loop_factory=factory)
        self._session: aiohttp.ClientSession | None = None

    def __enter__(self) -> "Load":
        try:
            self._client = self._runner.run(self._open())
        except BaseException:
            self.__exit__()
            raise
        return self

    async def _open(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20)
        async with self._session.get(self._url + "/v1/models") as response:
            response.raise_for_status()
            return Client(self._url, (await response.json())["data"][0]["id"], self._session)

    def __exit__(self, *exception: object) -> None:
        if self._session is not None:
            self._runner.run(self._session.close())
        self._runner.close()

    def run(self, requests: Sequence[Request], parses_at_once: bool = False) -> list[Outcome]:
        """As Client.run."""
        return self._runner.run(self._client.run(requests, parses_at_once))


def poisson(prompts: Prompts, rate: float, seconds: float, input_len: int, output_len: int, kind: str) -> list[Request]:
    """Requests that arrive by themselves, `rate` in a second on average, the first one at once."""
    requests, at_s = [], 0.0
    while at_s < seconds:
        requests.append(Request(prompts.make(input_len), output_len, at_s, kind))
        at_s += prompts.generator.expovariate(rate)
    return requests


def evenly(prompts: Prompts, rate: float, seconds: float, input_len: int, output_len: int, kind: str) -> list[Request]:
    """Requests that arrive `rate` in a second, evenly, the first one after half a second."""
    times = [0.5 + number / rate for number in range(math.ceil(max(0.0, seconds - 0.5) * rate))]
    return [Request(prompts.make(input_len), output_len, at_s, kind) for at_s in times]


def together(prompts: Prompts, input_lens: Sequence[int], output_len: int) -> list[Request]:
    """Requests that are sent at the same time."""
    return [Request(prompts.make(length), output_len) for length in input_lens]


def done(outcomes: Sequence[Outcome], kind: str | None = None) -> list[Outcome]:
    """Those that have all their tokens, of one kind or of all."""
    return [one for one in outcomes if not one.error and kind in (None, one.kind)]


def cuts(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    return {f"p{round(100 * share)}": percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99)}
