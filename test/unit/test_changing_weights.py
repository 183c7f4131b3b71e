"""A scheduler whose weights really change, in any order of events: answers are those of the versions that they name."""

from collections.abc import Sequence

import pytest
import random_models as rm
from engine_harness import EngineHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.managers.io_struct import AbortReq
from ramet.srt.weights.memory_messages import MEMORY_TAGS, ReleaseMemoryReq, ResumeMemoryReq

VERSIONS = ("v1", "v2")
PREFIX, *ENDS = rm.random_prompts([24, 3, 5, 2])
PROMPTS = [PREFIX, *(PREFIX + end for end in ENDS), ENDS[1]]  # most of them share what the cache can find again
NUM_TOKENS = 12
NUM_PAGES = 30


class Weights:
    """Two models of one shape: what each gives for some tokens, and its bytes."""

    def __init__(self, folder):
        self._engines = {}
        for seed, version in enumerate(VERSIONS):
            made = rm.make_model(folder / version, "llama3", seed=seed)
            self._engines[version] = EngineHarness(made, disable_radix_cache=True)
        self.folder = folder / VERSIONS[0]
        self.bytes = {version: bytes(engine.runner.arena.memory) for version, engine in self._engines.items()}
        self._known: dict[tuple, list[int]] = {}

    def next_tokens(self, version: str, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy tokens behind `token_ids`, by that version alone."""
        key = version, tuple(token_ids), num_tokens
        if key not in self._known:
            result = self._engines[version].generate([list(token_ids)], max_new_tokens=num_tokens)[0]
            self._known[key] = result.token_ids
        return self._known[key]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return Weights(tmp_path_factory.mktemp("models"))


class Walk:
    """Requests come, run, are held and ended while the weights change under them."""

    def __init__(self, weights: Weights, overlap: bool) -> None:
        self.weights = weights
        # Room for two or three of the requests: others wait, or start over for want of it.
        self.engine = EngineHarness(
            weights.folder,
            overlap=overlap,
            weight_version="v1",
            max_total_tokens=4 * NUM_PAGES,
            chunked_prefill_size=16,
            enable_memory_saver=True,
        )
        self.memory = self.engine.runner.versions._memory
        self.prompts: dict[str, list[int]] = {}
        # From which token on a request follows on keys and values of several versions.
        self.mixed_from: dict[str, int] = {}

    def submit(self, index: int) -> None:
        rid = str(len(self.prompts))
        self.prompts[rid] = PROMPTS[index]
        self.engine.submit(rid, PROMPTS[index], max_new_tokens=NUM_TOKENS)

    def step(self, number: int) -> None:
        for _ in range(number):
            self.engine.step()

    def switch(self, version: str) -> None:
        """With whatever runs, or is held by a pause."""
        if self.is_asleep:
            return
        scheduler = self.engine.scheduler
        scheduler.finish_passes()
        for running in scheduler.running.admitted():
            self.mixed_from.setdefault(running.req.rid, len(running.req.output_ids))
        self.engine.runner.arena.memory[:] = self.weights.bytes[version]
        self.engine.runner.arena.checksums = None  # a sleep takes them anew
        scheduler.switch_weight_version(version)

    def pause(self, mode: str) -> None:
        self.engine.scheduler.pause(mode)
        if mode != "in_place":
            assert self.engine.scheduler.caches[0].num_available_pages == NUM_PAGES

    def go_on(self, _: None) -> None:
        if not self.is_asleep:
            self.engine.scheduler.go_on()

    @property
    def is_asleep(self) -> bool:
        return self.engine.runner.arena.is_put_away

    def sleep(self, mode: str) -> None:
        """Both memories go, whatever runs or is held; an instance that sleeps may be paused again."""
        self.engine.scheduler.pause(mode)
        assert self.engine.scheduler.give_up_caches()
        self.memory.take(ReleaseMemoryReq(request_id="sleep", tags=list(MEMORY_TAGS), keeps_copy=True))

    def wake(self, _: None) -> None:
        if self.is_asleep:
            self.memory.take(ResumeMemoryReq(request_id="wake", tags=list(MEMORY_TAGS)))
            self.engine.scheduler.go_on()

    def abort(self, number: int) -> None:
        self.engine.send(AbortReq(rid=str(number)))

    def end(self) -> None:
        """Let all requests end, and check every token."""
        self.wake(None)
        self.engine.scheduler.go_on()
        results = self.engine.run()
        assert set(results) == set(self.prompts), "a request got no answer"
        for rid, result in results.items():
            ends = [start for _, start in result.versions[1:]] + [len(result.token_ids)]
            for (version, start), end in zip(result.versions, ends, strict=False):
                self.check(version, rid, result.token_ids, start, min(end, self.mixed_from.get(rid, end)))

    def check(self, version: str, rid: str, token_ids: list[int], start: int, end: int) -> None:
        """That the tokens [start, end) are those of that version."""
        if start < end:
            before = self.prompts[rid] + token_ids[:start]
            expected = self.weights.next_tokens(version, before, NUM_TOKENS - start)
            assert token_ids[start:end] == expected[: end - start]


def event(name: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.just(name), values)


SUBMIT = event("submit", st.integers(0, len(PROMPTS) - 1))
STEP = event("step", st.integers(1, 8))
SWITCH = event("switch", st.sampled_from(VERSIONS))
PAUSE = event("pause", st.sampled_from(["retract", "retract", "in_place", "abort"]))
GO_ON = event("go_on", st.none())
ABORT = event("abort", st.integers(0, 9))
SLEEP = event("sleep", st.sampled_from(["retract", "abort"]))
WAKE = event("wake", st.none())
EVENTS = st.lists(
    st.one_of(SUBMIT, SUBMIT, STEP, STEP, SWITCH, PAUSE, GO_ON, ABORT, SLEEP, WAKE), min_size=16, max_size=40
)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_answer_is_of_the_versions_that_it_names(weights, overlap):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(EVENTS)
    def walk(events: list[tuple[str, object]]) -> None:
        one = Walk(weights, overlap)
        for name, value in events:
            getattr(one, name)(value)
        one.end()

    walk()
