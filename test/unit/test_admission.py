"""Who gets into the next prefill pass, and who gives way: rules over a cache, without a model."""

import pytest
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.admission import Admission
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.managers.schedule_policy import LPM_LIMIT, Candidate, PrefillAdder, order_waiting, pick_retracted
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.sampling.sampling_params import SamplingParams

PAGE = 4


def make_cache(num_pages=16, num_rows=8, disabled=False, rows=None):
    allocator = PageAllocator(num_pages)
    tree = RadixCache(allocator, PAGE, disabled)
    return RequestCache(rows or RowAllocator(num_rows), allocator, tree, PAGE)


def make_req(rid, input_ids, group=0, max_new_tokens=8, **options):
    params = SamplingParams(max_new_tokens=max_new_tokens)
    message = TokenizedGenerateReqInput(rid=rid, input_ids=list(input_ids), sampling_params=params, **options)
    return Req(message, 0, group)


def prompt(length, first=0):
    return range(100 * first, 100 * first + length)


def keep(cache, input_ids):
    """Leave a computed prompt in the prefix cache, as an ended request does."""
    handle = cache.begin(cache.match([]), len(input_ids))
    handle.kv_len = len(input_ids)
    cache.release(handle, list(input_ids))


def run(cache, req):
    """Let a request run whose prompt is computed."""
    handle = cache.begin(cache.match([]), req.num_tokens)
    handle.kv_len = req.num_tokens
    return RunningReq(req, handle)


def make_admission(num_groups=1, num_pages=16, num_rows=8, **config):
    defaults = {
        "max_running_requests": num_rows,
        "max_queued_requests": 100,
        "page_size": PAGE,
        "chunked_prefill_size": -1,
        "schedule_policy": "lpm",
        "disable_radix_cache": False,
        "stream_interval": 1,
        "random_seed": 0,
        "overlap": False,
    }
    rows = RowAllocator(num_rows)
    caches = [make_cache(num_pages, rows=rows) for _ in range(num_groups)]
    return Admission(SchedulerConfig(**defaults | config), caches), caches


def rids(reqs):
    return [running.req.rid for running in reqs]


def compute(reqs, caches):
    """What a prefill pass leaves in the cache."""
    for running in reqs:
        running.handle.kv_len += running.extend_len
        caches[running.group].share(running.handle, running.req.fill_ids)


class TestOrder:
    def test_the_longest_cached_prefix_comes_first_and_a_retracted_request_before_all(self):
        cache = make_cache()
        keep(cache, prompt(12))
        none, short, long = make_req("none", prompt(9, 1)), make_req("short", prompt(5)), make_req("long", prompt(13))
        retracted = make_req("retracted", prompt(9, 2))
        retracted.output_ids = [1]
        queue = [none, short, long, retracted]
        order = [candidate.req.rid for candidate in order_waiting(queue, cache, "lpm")]
        assert order == ["retracted", "long", "short", "none"]
        assert queue == [none, short, long, retracted]

    @pytest.mark.parametrize("policy, length", [("fcfs", 3), ("lpm", LPM_LIMIT + 1)])
    def test_first_come_first_served_by_policy_or_in_a_long_queue(self, policy, length):
        cache = make_cache()
        keep(cache, prompt(12))
        queue = [make_req(str(index), prompt(13, 0 if index == length - 1 else 1)) for index in range(length)]
        assert [candidate.req for candidate in order_waiting(queue, cache, policy)] == queue

    @pytest.mark.parametrize("policy", ["lpm", "fcfs"])
    def test_a_prefix_is_looked_for_once_a_pass(self, policy, monkeypatch):
        admission, (cache,) = make_admission(schedule_policy=policy)
        keep(cache, prompt(8))
        for index in range(4):
            admission.put(make_req(str(index), [*prompt(8), 200 + index, 201]))
        searches = []
        match_prefix = cache.tree.match_prefix
        monkeypatch.setattr(cache.tree, "match_prefix", lambda ids: searches.append(ids) or match_prefix(ids))
        assert len(admission.next_prefill([])) == 4 and len(searches) == 4

    def test_a_match_that_was_evicted_meanwhile_is_not_used(self):
        """The first takes the pages of the second's prefix, and the second then those of the third's."""
        admission, (cache,) = make_admission(num_pages=8)
        for index in range(3):
            keep(cache, prompt(8, index))
        for index, length in enumerate([20, 9, 9]):
            admission.put(make_req(str(index), prompt(length, index)))
        reqs = admission.next_prefill([])
        assert [(running.req.rid, running.req.cached_tokens) for running in reqs] == [("0", 8), ("1", 0)]
        cache.check([running.handle for running in reqs])


class TestAdder:
    def test_the_budget_cuts_the_last_prompt_and_nobody_comes_behind_it(self):
        cache = make_cache()
        adder = PrefillAdder(cache, 10, 0, 8)
        first, second = make_req("first", prompt(6)), make_req("second", prompt(9, 1))
        assert adder.add(Candidate(first, cache)) and adder.add(Candidate(second, cache))
        assert not adder.add(Candidate(make_req("third", prompt(2, 2)), cache))
        assert [running.extend_len for running in adder.reqs] == [6, 4]
        assert adder.chunked_req is adder.reqs[1]

    def test_a_cut_prompt_goes_on_before_others_and_may_be_cut_again(self):
        cache = make_cache()
        first = PrefillAdder(cache, 4, 0, 8)
        first.add(Candidate(make_req("long", prompt(11)), cache))
        (running,) = first.reqs
        running.handle.kv_len += running.extend_len
        second = PrefillAdder(cache, 4, 0, 8)
        second.add_chunked(running)
        assert second.chunked_req is running and running.extend_len == 4
        running.handle.kv_len += running.extend_len
        third = PrefillAdder(cache, 4, 0, 8)
        third.add_chunked(running)
        assert third.chunked_req is None and running.extend_len == 3 and running.is_last_chunk
        assert third.add(Candidate(make_req("next", prompt(3, 1)), cache))
        assert third.reqs[1].extend_len == 1

    def test_what_the_cache_has_is_not_computed(self):
        cache = make_cache()
        keep(cache, prompt(8))
        adder = PrefillAdder(cache, 100, 0, 8)
        assert adder.add(Candidate(make_req("a", prompt(10)), cache))
        assert adder.reqs[0].extend_len == 2 and adder.reqs[0].req.cached_tokens == 8

    def test_a_whole_cached_prompt_computes_its_last_page_for_the_next_token(self):
        cache = make_cache()
        keep(cache, prompt(8))
        adder = PrefillAdder(cache, 100, 0, 8)
        assert adder.add(Candidate(make_req("a", prompt(8)), cache))
        assert adder.reqs[0].extend_len == 4

    def test_prompt_logprobs_are_computed_although_the_prefix_is_cached(self):
        cache = make_cache()
        keep(cache, prompt(12))
        adder = PrefillAdder(cache, 100, 0, 8)
        assert adder.add(Candidate(make_req("a", prompt(13), return_logprob=True, logprob_start_len=6), cache))
        assert adder.reqs[0].req.cached_tokens == 4

    def test_the_reserve_is_left_to_those_who_decode(self):
        cache = make_cache(num_pages=6)
        req = make_req("a", prompt(8))  # two pages and one for the first token
        assert not PrefillAdder(cache, 100, 4, 8).add(Candidate(req, cache))
        cache.check([])
        adder = PrefillAdder(cache, 100, 3, 8)
        assert adder.add(Candidate(req, cache))
        cache.check([adder.reqs[0].handle])

    def test_alone_a_request_may_take_the_last_page(self):
        cache = make_cache(num_pages=2)
        adder = PrefillAdder(cache, 100, 0, 8)
        assert adder.add(Candidate(make_req("a", prompt(8)), cache))
        cache.check([adder.reqs[0].handle])

    def test_a_cached_prefix_that_is_to_be_used_does_not_count_as_room(self):
        cache = make_cache(num_pages=4)
        keep(cache, prompt(12))
        adder = PrefillAdder(cache, 100, 0, 8)
        assert not adder.add(Candidate(make_req("a", [*prompt(12), *prompt(8, 1)]), cache))
        cache.check([])
        assert cache.num_available_pages == 4

    @pytest.mark.parametrize("limits", [{"max_new_reqs": 2}, {"num_rows": 2}])
    def test_no_more_requests_than_may_run(self, limits):
        cache = make_cache(num_rows=limits.get("num_rows", 8))
        adder = PrefillAdder(cache, 100, 0, limits.get("max_new_reqs", 8))
        added = [adder.add(Candidate(make_req(str(index), prompt(2, index)), cache)) for index in range(3)]
        assert added == [True, True, False]

    def test_who_shares_a_page_that_this_pass_computes_waits_for_it(self):
        cache = make_cache()
        adder = PrefillAdder(cache, 100, 0, 8)
        adder.add(Candidate(make_req("a", prompt(9)), cache))
        assert adder.shares_uncached_prefix(Candidate(make_req("same", prompt(9)), cache))
        assert not adder.shares_uncached_prefix(Candidate(make_req("other", prompt(9, 1)), cache))
        assert not adder.shares_uncached_prefix(Candidate(make_req("less than a page", prompt(4)), cache))

    def test_without_a_prefix_cache_nobody_waits_for_a_page(self):
        cache = make_cache(disabled=True)
        adder = PrefillAdder(cache, 100, 0, 8)
        adder.add(Candidate(make_req("a", prompt(9)), cache))
        assert not adder.shares_uncached_prefix(Candidate(make_req("same", prompt(9)), cache))


class TestAdmission:
    def test_who_does_not_fit_waits(self):
        admission, caches = make_admission(num_pages=6)
        for index in range(3):
            admission.put(make_req(str(index), prompt(8, index)))
        reqs = admission.next_prefill([])
        assert rids(reqs) == ["0", "1"] and [req.rid for req in admission.waiting] == ["2"]
        caches[0].check([running.handle for running in reqs])

    def test_a_chunk_a_pass_until_the_prompt_is_computed(self):
        admission, caches = make_admission(chunked_prefill_size=5)
        admission.put(make_req("long", prompt(12)))
        admission.put(make_req("short", prompt(3, 1)))
        passes = []
        while admission.waiting or admission.chunked:
            reqs = admission.next_prefill([])
            passes.append([(running.req.rid, running.extend_len) for running in reqs])
            compute(reqs, caches)
        assert passes == [[("long", 5)], [("long", 5)], [("long", 2), ("short", 3)]]

    def test_a_chunked_request_that_is_dropped_is_not_gone_on_with(self):
        admission, _ = make_admission(chunked_prefill_size=5)
        admission.put(make_req("long", prompt(12)))
        (running,) = admission.next_prefill([])
        other = RunningReq(running.req, running.handle)
        admission.drop_chunked(other)
        assert len(admission) == 1
        admission.drop_chunked(running)
        assert len(admission) == 0 and admission.next_prefill([]) == []

    def test_the_same_prompts_share_one_prefill(self):
        admission, caches = make_admission()
        for index in range(3):
            admission.put(make_req(str(index), prompt(9)))
        first = admission.next_prefill([])
        assert rids(first) == ["0"]
        compute(first, caches)
        second = admission.next_prefill(first)
        assert rids(second) == ["1", "2"] and {running.req.cached_tokens for running in second} == {8}

    def test_each_group_fills_its_own_share_of_the_pass_from_its_own_cache(self):
        admission, caches = make_admission(num_groups=2, num_pages=3, chunked_prefill_size=9)
        for index, group in enumerate([1, 0, 1, 0]):
            admission.put(make_req(str(index), prompt(7, index), group=group))
        reqs = admission.next_prefill([])
        assert [(running.req.rid, running.group) for running in reqs] == [("1", 0), ("0", 1)]
        for group, cache in enumerate(caches):
            cache.check([running.handle for running in reqs if running.group == group])

    def test_the_next_request_goes_to_the_least_busy_group(self):
        admission, _ = make_admission(num_groups=3, chunked_prefill_size=4)
        assert admission.least_busy_group([]) == 0
        assert admission.least_busy_group([0, 1]) == 2
        admission.put(make_req("chunked", prompt(9), group=0))
        admission.next_prefill([])
        admission.put(make_req("waiting", prompt(9), group=1))
        assert admission.least_busy_group([]) == 2

    def test_a_retraction_makes_the_reserve_larger_and_decode_passes_make_it_smaller(self):
        admission, (cache,) = make_admission(num_pages=100)
        decoding = [run(cache, make_req("a", prompt(8), max_new_tokens=200))]
        before = admission.reserve.num_pages(decoding, cache)
        assert before == 20 + 1
        admission.put_back(make_req("b", prompt(4, 1)))
        assert admission.reserve.num_pages(decoding, cache) == 25 + 1
        for _ in range(10_000):
            admission.reserve.decay()
        assert admission.reserve.num_pages(decoding, cache) == 5 + 1

    def test_who_was_retracted_is_the_first_to_run_again(self):
        admission, _ = make_admission(schedule_policy="fcfs")
        admission.put(make_req("a", prompt(4)))
        admission.put_back(make_req("b", prompt(4, 1)))
        assert rids(admission.next_prefill([])) == ["b", "a"]

    def test_taking_out_leaves_the_others_in_their_order(self):
        admission, _ = make_admission(schedule_policy="fcfs")
        for rid in "abc":
            admission.put(make_req(rid, prompt(4)))
        assert [req.rid for req in admission.take_out(lambda rid: rid == "b")] == ["b"]
        assert [req.rid for req in admission.waiting] == ["a", "c"]


def test_who_has_made_the_fewest_tokens_gives_way_then_the_shortest_prompt():
    cache = make_cache()
    far, short, long = (run(cache, make_req(rid, prompt(length))) for rid, length in (("f", 2), ("s", 3), ("l", 5)))
    far.req.output_ids = [1, 2]
    assert pick_retracted([far, long, short]) is short
