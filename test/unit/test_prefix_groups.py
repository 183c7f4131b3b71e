"""Requests that begin alike stand side by side in a pass, and it is said what they share."""

import random

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers.prefix_groups import place_by_prefix, shared_prefixes
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache

PAGE_SIZE = 2
NUM_GROUPS = 2


class Running:
    """A request as far as it matters here."""

    def __init__(self, group, handle, tokens):
        self.group, self.handle, self.tokens, self.prefix = group, handle, tokens, None


class Requests:
    """Come and go at random, with beginnings of a few."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        rows = RowAllocator(40)
        self.caches = []
        for _ in range(NUM_GROUPS):
            allocator = PageAllocator(400)
            self.caches.append(RequestCache(rows, allocator, RadixCache(allocator, PAGE_SIZE), PAGE_SIZE))
        self.running = []

    def begin(self):
        group = self.random.randrange(NUM_GROUPS)
        cache = self.caches[group]
        stem = [self.random.randrange(2)] * self.random.choice([0, 4, 8])
        tokens = stem + [self.random.randrange(3) for _ in range(self.random.randrange(1, 12))]
        handle = cache.begin(cache.match(tokens, len(tokens) - 1), len(tokens))
        handle.kv_len = len(tokens)
        cache.share(handle, tokens)
        self.running.append(Running(group, handle, tokens))

    def end(self):
        one = self.running.pop(self.random.randrange(len(self.running)))
        self.caches[one.group].release(one.handle, one.tokens)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_shared_lies_in_the_same_pages(seed):
    requests, num_shared = Requests(seed), 0
    for _ in range(60):
        if len(requests.running) < 4 or (len(requests.running) < 20 and requests.random.random() < 0.6):
            requests.begin()
        else:
            requests.end()
        decoding = requests.random.sample(requests.running, k=requests.random.randrange(len(requests.running) + 1))
        placed = place_by_prefix(decoding, requests.caches)
        assert sorted(map(id, placed)) == sorted(map(id, decoding))
        alone = [one for one in decoding if one.prefix is None]
        assert [one for one in placed if one.prefix is None] == alone, "the others keep their order"
        placed.sort(key=lambda one: one.group)  # as a batch has them
        for shared in shared_prefixes(placed):
            members = placed[shared.first : shared.first + shared.num_sequences]
            assert len(members) == shared.num_sequences >= 2 and len({one.group for one in members}) == 1
            num_pages, rest = divmod(shared.num_tokens, PAGE_SIZE)
            assert rest == 0 and len({tuple(one.handle.pages[:num_pages]) for one in members}) == 1
            assert all(shared.num_tokens <= one.handle.kv_len for one in members)
            num_shared += 1
        ends = [id(one.prefix.end) for one in placed if one.prefix is not None]
        assert sum(a != b for a, b in zip(ends, ends[1:], strict=False)) == max(0, len(set(ends)) - 1)
    assert num_shared > 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.mark.parametrize("overlap", [False, True])
def test_the_tokens_are_those_of_requests_that_share_nothing(folder, monkeypatch, overlap):
    """Prompts with one beginning, among others, some of them in chunks while the first decode."""
    stem, *ends = rm.random_prompts([24, 3, 5, 9, 30])
    prompts = [*(stem + end for end in ends), ends[3], stem + ends[0]]
    settings = {"page_size": 4, "chunked_prefill_size": 16, "overlap": overlap}
    expected = EngineHarness(folder, **settings, disable_radix_cache=True).generate(prompts, max_new_tokens=8)
    engine = EngineHarness(folder, **settings)
    plans, plan = [], engine.scheduler.planner.plan
    monkeypatch.setattr(engine.scheduler.planner, "plan", lambda batch: plans.append(plan(batch)) or plans[-1])
    engine.generate([stem], max_new_tokens=1)
    results = engine.generate(prompts, max_new_tokens=8)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    mixed = [one for one in plans if one.shared and not one.is_decode]
    assert mixed and any(one.shared and one.is_decode for one in plans)
    for one in plans:
        for shared in one.shared:
            members = one.sequences[shared.first : shared.first + shared.num_sequences]
            assert all(len(member.input_ids) == 1 and member.start >= shared.num_tokens for member in members)
