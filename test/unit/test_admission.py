"""Whose prompts the next pass computes, in which order, and who gives way: rules over a cache, without a model."""

import pytest
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.admission import LOOK_AHEAD, Admission
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.lora_slots import LoraRoom, LoraSlots
from ramet.srt.managers.prefill_adder import GroupRoom, PrefillAdder
from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.managers.schedule_policy import AGING_S, PATIENCE_S, STRETCH, Candidate, place_of, retraction_cost
from ramet.srt.managers.token_budget import TokenBudget
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.sampling.sampling_params import SamplingParams

PAGE = 4


def make_cache(num_pages=16, num_rows=8, disabled=False, rows=None):
    allocator = PageAllocator(num_pages)
    tree = RadixCache(allocator, PAGE, disabled)
    return RequestCache(rows or RowAllocator(num_rows), allocator, tree, PAGE)


def make_req(rid, input_ids, group=0, max_new_tokens=8, arrival_s=0.0, **options):
    params = SamplingParams(max_new_tokens=max_new_tokens)
    message = TokenizedGenerateReqInput(rid=rid, input_ids=list(input_ids), sampling_params=params, **options)
    req = Req(message, 0, group)
    req.arrival_s = arrival_s
    return req


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


def make_adder(cache, budget=100, reserve_pages=0, max_share=1.0):
    return PrefillAdder([GroupRoom(cache, reserve_pages)], budget, max_share, LoraRoom(LoraSlots(0)))


def make_admission(num_groups=1, num_pages=16, num_rows=8, token_s=0.0, lora_slots=None, clock=lambda: 0.0, **config):
    defaults = {
        "max_running_requests": num_rows,
        "max_queued_requests": 100,
        "page_size": PAGE,
        "chunked_prefill_size": -1,
        "target_itl_s": 0.0,
        "most_itl_s": 0.0,
        "schedule_policy": "deadline",
        "low_priority_values_first": False,
        "disable_radix_cache": False,
        "stream_interval": 1,
        "random_seed": 0,
        "overlap": False,
    }
    config = SchedulerConfig(**defaults | config)
    rows = RowAllocator(num_rows)
    caches = [make_cache(num_pages, rows=rows) for _ in range(num_groups)]
    budget = TokenBudget(config.prefill_budget, config.target_itl_s, config.most_itl_s)
    budget.observe(10_000 * token_s, 10_000)
    return Admission(config, caches, rows, budget, clock, lora_slots or LoraSlots(0)), caches


def rids(reqs):
    return [running.req.rid for running in reqs]


def lens(reqs):
    return [(running.req.rid, running.extend_len) for running in reqs]


def compute(reqs, caches):
    """What a pass leaves in the cache."""
    for running in reqs:
        running.handle.kv_len += running.extend_len
        caches[running.group].share(running.handle, running.req.fill_ids)


def order(reqs, cache, policy, token_s=0.001, now_s=0.0):
    candidates = [Candidate(req, cache) for req in reqs]
    return [one.req.rid for one in sorted(candidates, key=lambda one: place_of(one, policy, token_s, now_s))]


class TestOrder:
    def test_a_short_prompt_passes_a_long_one_but_only_for_a_multiple_of_its_time(self):
        cache, last_s = make_cache(), STRETCH * 0.001 * (40 - 4)
        reqs = [
            make_req("long", prompt(40)),
            make_req("soon", prompt(4, 1), arrival_s=last_s - 0.0001),
            make_req("too late", prompt(4, 2), arrival_s=last_s + 0.0001),
        ]
        assert order(reqs, cache, "deadline") == ["soon", "long", "too late"]

    def test_what_the_cache_has_takes_no_time(self):
        cache = make_cache()
        keep(cache, prompt(12))
        reqs = [make_req("short", prompt(4, 1)), make_req("cached", prompt(13))]
        assert order(reqs, cache, "deadline") == ["cached", "short"]

    def test_a_prompt_in_progress_gets_nearer_with_what_is_computed_of_it(self):
        running = run(make_cache(), make_req("a", prompt(12)))
        running.handle.kv_len = 4
        assert place_of(running, "deadline", 0.001, 0.0) == (True, STRETCH * 0.008)

    def test_the_longest_cached_prefix_comes_first(self):
        cache = make_cache()
        keep(cache, prompt(12))
        reqs = [make_req("none", prompt(9, 1)), make_req("short", prompt(5)), make_req("long", prompt(13))]
        assert order(reqs, cache, "lpm") == ["long", "short", "none"]

    def test_under_lpm_nobody_waits_for_ever(self):
        cache = make_cache()
        keep(cache, prompt(12))
        reqs = [make_req("none", prompt(9, 1)), make_req("long", prompt(13), arrival_s=PATIENCE_S)]
        late_s = STRETCH * 0.009 + PATIENCE_S
        assert order(reqs, cache, "lpm", now_s=late_s - 0.001) == ["long", "none"]
        assert order(reqs, cache, "lpm", now_s=late_s + 0.001) == ["none", "long"]

    @pytest.mark.parametrize("policy", ["deadline", "lpm", "fcfs", "priority"])
    def test_who_has_run_before_comes_first(self, policy):
        cache = make_cache()
        keep(cache, prompt(12))
        reqs = [make_req(rid, prompt(13, 0 if rid == "new" else 1)) for rid in ("new", "retracted", "parked")]
        reqs[1].num_retractions = 1
        reqs[2].output_ids, reqs[2].arrival_s = [1], 0.5
        assert order(reqs, cache, policy, token_s=0.0) == ["retracted", "parked", "new"]

    def test_the_highest_priority_comes_first_but_nobody_waits_for_ever(self):
        reqs = [
            make_req("0", prompt(4), arrival_s=0.0),
            make_req("-1", prompt(4), arrival_s=-AGING_S - 1, priority=-1),
            make_req("2", prompt(40), arrival_s=3.0, priority=2),
            make_req("1", prompt(40), arrival_s=AGING_S - 1, priority=1),
            make_req("1, late", prompt(40), arrival_s=AGING_S + 1, priority=1),
        ]
        assert order(reqs, make_cache(), "priority") == ["2", "-1", "1", "0", "1, late"]

    def test_of_a_long_queue_the_highest_priority_is_looked_at(self):
        admission, _ = make_admission(num_pages=2, num_rows=1, schedule_policy="priority")
        for index in range(LOOK_AHEAD + 5):
            admission.put(make_req(str(index), prompt(4)))
        admission.put(make_req("urgent", prompt(4), priority=1))
        again = make_req("again", prompt(4), priority=-9)
        again.num_retractions = 1
        admission.put(again)
        assert [req.rid for req in admission.waiting][:3] == ["again", "urgent", "0"]
        assert rids(admission.next_chunks([])) == ["again"]

    def test_first_come_first_served(self):
        cache = make_cache()
        keep(cache, prompt(12))
        reqs = [make_req("b", prompt(13), arrival_s=1.0), make_req("a", prompt(40, 1))]
        assert order(reqs, cache, "fcfs") == ["a", "b"]

    @pytest.mark.parametrize("policy", ["deadline", "lpm", "fcfs", "priority"])
    def test_a_prefix_is_looked_for_once_a_pass(self, policy, monkeypatch):
        admission, (cache,) = make_admission(schedule_policy=policy)
        keep(cache, prompt(8))
        for index in range(4):
            admission.put(make_req(str(index), [*prompt(8), 200 + index, 201]))
        searches = []
        match_prefix = cache.tree.match_prefix
        monkeypatch.setattr(cache.tree, "match_prefix", lambda *args: searches.append(args) or match_prefix(*args))
        assert len(admission.next_chunks([])) == 4 and len(searches) == 4

    def test_of_a_long_queue_those_who_have_waited_longest_are_looked_at(self, monkeypatch):
        admission, (cache,) = make_admission(num_pages=3 * LOOK_AHEAD, num_rows=2 * LOOK_AHEAD, token_s=0.001)
        for index in range(LOOK_AHEAD + 1):
            admission.put(make_req(str(index), prompt(3 if index == LOOK_AHEAD else 5, index)))
        searches = []
        match_prefix = cache.tree.match_prefix
        monkeypatch.setattr(cache.tree, "match_prefix", lambda *args: searches.append(args) or match_prefix(*args))
        assert rids(admission.next_chunks([])) == [str(index) for index in range(LOOK_AHEAD)]
        assert len(searches) == LOOK_AHEAD
        assert rids(admission.next_chunks([])) == [str(LOOK_AHEAD)]

    def test_a_group_with_a_long_queue_does_not_hide_the_others(self):
        admission, _ = make_admission(num_groups=2, num_rows=2, num_pages=1)
        for index in range(LOOK_AHEAD + 1):
            admission.put(make_req(str(index), prompt(4, index)))
        admission.put(make_req("other", prompt(4), group=1))
        assert rids(admission.next_chunks([])) == ["0", "other"]

    def test_while_no_more_may_run_nothing_is_looked_for(self, monkeypatch):
        admission, (cache,) = make_admission(num_rows=1)
        decoding = [run(cache, make_req("a", prompt(8)))]
        admission.put(make_req("b", prompt(8, 1)))
        monkeypatch.setattr(cache.tree, "match_prefix", None)
        assert admission.next_chunks(decoding) == []

    def test_a_match_that_was_evicted_meanwhile_is_not_used(self):
        """The first takes the pages of the second's prefix, and the second then those of the third's."""
        admission, (cache,) = make_admission(num_pages=8)
        for index in range(3):
            keep(cache, prompt(8, index))
        for index, length in enumerate([20, 9, 9]):
            admission.put(make_req(str(index), prompt(length, index)))
        reqs = admission.next_chunks([])
        assert [(running.req.rid, running.req.cached_tokens) for running in reqs] == [("0", 8), ("1", 0)]
        cache.check([running.handle for running in reqs])


class TestAdder:
    def test_the_budget_cuts_the_last_prompt(self):
        cache = make_cache()
        adder = make_adder(cache, 10)
        assert adder.begin(Candidate(make_req("first", prompt(6)), cache))
        assert adder.begin(Candidate(make_req("second", prompt(9, 1)), cache))
        assert lens(adder.reqs) == [("first", 6), ("second", 4)] and adder.budget == 0

    def test_a_cut_prompt_goes_on_and_may_be_cut_again(self):
        cache = make_cache()
        first = make_adder(cache, 4)
        first.begin(Candidate(make_req("long", prompt(11)), cache))
        (running,) = first.reqs
        for size in (4, 4, 3):
            adder = make_adder(cache, 4)
            adder.add(running)
            assert running.extend_len == size
            assert running.is_last_chunk == (size == 3)
            running.handle.kv_len += running.extend_len

    def test_one_prompt_leaves_others_a_share_of_the_pass(self):
        cache = make_cache()
        adder = make_adder(cache, 12, max_share=0.75)
        for index, length in enumerate([20, 8]):
            adder.begin(Candidate(make_req(str(index), prompt(length, index)), cache))
        adder.top_up()
        assert lens(adder.reqs) == [("0", 9), ("1", 3)]

    def test_what_others_leave_goes_to_the_first_that_was_cut(self):
        cache = make_cache()
        adder = make_adder(cache, 12, max_share=0.5)
        for index, length in enumerate([20, 2, 1]):
            adder.begin(Candidate(make_req(str(index), prompt(length, index)), cache))
        adder.top_up()
        assert lens(adder.reqs) == [("0", 9), ("1", 2), ("2", 1)] and adder.budget == 0

    def test_what_the_cache_has_is_not_computed(self):
        cache = make_cache()
        keep(cache, prompt(8))
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(10)), cache))
        assert adder.reqs[0].extend_len == 2 and adder.reqs[0].req.cached_tokens == 8

    def test_a_whole_cached_prompt_computes_its_last_page_for_the_next_token(self):
        cache = make_cache()
        keep(cache, prompt(8))
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(8)), cache))
        assert adder.reqs[0].extend_len == 4

    def test_prompt_logprobs_are_computed_although_the_prefix_is_cached(self):
        cache = make_cache()
        keep(cache, prompt(12))
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(13), return_logprob=True, logprob_start_len=6), cache))
        assert adder.reqs[0].req.cached_tokens == 4

    def test_cached_tokens_are_those_of_the_first_run(self):
        cache = make_cache()
        keep(cache, prompt(12))
        req = make_req("a", prompt(13))
        req.num_retractions = 1
        adder = make_adder(cache)
        assert adder.begin(Candidate(req, cache)) and req.cached_tokens == 0

    def test_the_reserve_is_left_to_those_who_run(self):
        cache = make_cache(num_pages=6)
        req = make_req("a", prompt(8))  # two pages and one for the first token
        assert not make_adder(cache, reserve_pages=4).begin(Candidate(req, cache))
        cache.check([])
        adder = make_adder(cache, reserve_pages=3)
        assert adder.begin(Candidate(req, cache))
        cache.check([adder.reqs[0].handle])

    def test_alone_a_request_may_take_the_last_page(self):
        cache = make_cache(num_pages=2)
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(8)), cache))
        cache.check([adder.reqs[0].handle])

    def test_a_cached_prefix_that_is_to_be_used_does_not_count_as_room(self):
        cache = make_cache(num_pages=4)
        keep(cache, prompt(12))
        adder = make_adder(cache)
        assert not adder.begin(Candidate(make_req("a", [*prompt(12), *prompt(8, 1)]), cache))
        cache.check([])
        assert cache.num_available_pages == 4

    def test_nobody_takes_what_one_before_waits_for(self):
        """A large request would wait for ever if smaller ones took each page that becomes free."""
        cache = make_cache(num_pages=6)
        adder = make_adder(cache, reserve_pages=1)
        assert not adder.begin(Candidate(make_req("large", prompt(20)), cache))
        assert not adder.begin(Candidate(make_req("small", prompt(4, 1)), cache))

    def test_who_shares_a_page_that_this_pass_computes_waits_for_it(self):
        cache = make_cache()
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(9)), cache))
        assert not adder.begin(Candidate(make_req("same", prompt(9)), cache))
        assert adder.begin(Candidate(make_req("other", prompt(9, 1)), cache))
        assert adder.begin(Candidate(make_req("less than a page", prompt(4)), cache))

    @pytest.mark.parametrize("num_computed", [4, 6])
    def test_so_does_who_shares_the_rest_of_a_prompt_in_progress(self, num_computed):
        cache = make_cache()
        first = make_adder(cache, num_computed)
        first.begin(Candidate(make_req("a", prompt(12)), cache))
        compute(first.reqs, [cache])
        adder = make_adder(cache)
        adder.add(first.reqs[0])
        assert not adder.begin(Candidate(make_req("same", prompt(12)), cache))
        assert adder.begin(Candidate(make_req("same so far", [*prompt(4), *prompt(8, 1)]), cache))

    def test_without_a_prefix_cache_nobody_waits_for_a_page(self):
        cache = make_cache(disabled=True)
        adder = make_adder(cache)
        assert adder.begin(Candidate(make_req("a", prompt(9)), cache))
        assert adder.begin(Candidate(make_req("same", prompt(9)), cache))


class TestAdmission:
    def test_who_does_not_fit_waits(self):
        admission, caches = make_admission(num_pages=6)
        for index in range(3):
            admission.put(make_req(str(index), prompt(8, index)))
        reqs = admission.next_chunks([])
        assert rids(reqs) == ["0", "1"] and [req.rid for req in admission.waiting] == ["2"]
        caches[0].check([running.handle for running in reqs])

    def test_no_more_requests_than_may_run_those_in_progress_included(self):
        admission, caches = make_admission(num_rows=2, chunked_prefill_size=4)
        for index in range(3):
            admission.put(make_req(str(index), prompt(7, index)))
        passes = []
        for _ in range(3):
            passes.append(lens(admission.next_chunks([])))
            compute([running for running in admission.in_progress if running.req.rid in dict(passes[-1])], caches)
        assert passes == [[("0", 3), ("1", 1)], [("0", 3), ("1", 1)], [("0", 1), ("1", 3)]]
        assert [req.rid for req in admission.waiting] == ["2"]

    def test_a_chunk_a_pass_until_the_prompt_is_computed(self):
        admission, caches = make_admission(chunked_prefill_size=5, schedule_policy="fcfs")
        admission.put(make_req("long", prompt(12)))
        admission.put(make_req("short", prompt(3, 1)))
        passes = []
        while admission:
            reqs = admission.next_chunks([])
            passes.append(lens(reqs))
            compute(reqs, caches)
        assert passes == [[("long", 5)], [("long", 5)], [("long", 2), ("short", 3)]]

    def test_a_short_prompt_is_computed_while_a_long_one_is_in_progress(self):
        admission, caches = make_admission(chunked_prefill_size=8, token_s=0.001)
        admission.put(make_req("long", prompt(30)))
        compute(admission.next_chunks([]), caches)
        admission.put(make_req("short", prompt(4, 1)))
        reqs = admission.next_chunks([])
        assert lens(reqs) == [("short", 4), ("long", 4)] and rids(admission.in_progress) == ["long"]
        compute(reqs, caches)
        assert lens(admission.next_chunks([])) == [("long", 8)]

    def test_beside_decoding_requests_the_target_holds(self):
        admission, (cache,) = make_admission(num_pages=1000, chunked_prefill_size=2000, target_itl_s=0.5, token_s=0.001)
        decoding = [run(cache, make_req("a", prompt(8)))]
        admission.put(make_req("long", range(1000, 3500)))
        assert lens(admission.next_chunks(decoding)) == [("long", 500)]
        admission.in_progress[0].handle.kv_len += 500
        assert lens(admission.next_chunks([])) == [("long", 1250)], "two and a half targets where nothing decodes"

    def test_a_request_in_progress_that_is_dropped_is_not_gone_on_with(self):
        admission, _ = make_admission(chunked_prefill_size=5)
        admission.put(make_req("long", prompt(12)))
        (running,) = admission.next_chunks([])
        other = RunningReq(running.req, running.handle)
        admission.drop(other)
        assert len(admission) == 1
        admission.drop(running)
        assert len(admission) == 0 and admission.next_chunks([]) == []

    def test_the_same_prompts_share_one_prefill(self):
        admission, caches = make_admission()
        for index in range(3):
            admission.put(make_req(str(index), prompt(9)))
        first = admission.next_chunks([])
        assert rids(first) == ["0"]
        compute(first, caches)
        second = admission.next_chunks(first)
        assert rids(second) == ["1", "2"] and {running.req.cached_tokens for running in second} == {8}

    def test_each_group_has_its_own_cache_and_all_share_the_pass(self):
        admission, caches = make_admission(num_groups=2, num_pages=3, chunked_prefill_size=9)
        for index, group in enumerate([1, 0, 1, 0]):
            admission.put(make_req(str(index), prompt(7, index), group=group))
        reqs = admission.next_chunks([])
        assert [(running.req.rid, running.group, running.extend_len) for running in reqs] == [("0", 1, 6), ("1", 0, 3)]
        for group, cache in enumerate(caches):
            cache.check([running.handle for running in reqs if running.group == group])

    def test_a_full_group_does_not_hold_up_another(self):
        admission, _ = make_admission(num_groups=2, num_pages=3)
        for index, group in enumerate([0, 0, 1]):
            admission.put(make_req(str(index), prompt(8, index), group=group))
        assert rids(admission.next_chunks([])) == ["0", "2"]

    def test_the_next_request_goes_to_the_least_busy_group(self):
        admission, _ = make_admission(num_groups=3, chunked_prefill_size=4)
        assert admission.least_busy_group([]) == 0
        assert admission.least_busy_group([0, 1]) == 2
        admission.put(make_req("in progress", prompt(9), group=0))
        admission.next_chunks([])
        admission.put(make_req("waiting", prompt(9), group=1))
        assert admission.least_busy_group([]) == 2

    def test_a_retraction_makes_the_reserve_larger_and_passes_with_room_make_it_smaller(self):
        admission, (cache,) = make_admission(num_pages=100)
        decoding = [run(cache, make_req("a", prompt(8), max_new_tokens=200))]
        before = admission.reserve.num_pages(decoding, cache)
        assert before == 20 + 1
        admission.put_back(run(cache, make_req("b", prompt(4, 1))))
        assert admission.reserve.num_pages(decoding, cache) == 25 + 1
        for _ in range(10_000):
            admission.reserve.decay()
        assert admission.reserve.num_pages(decoding, cache) == 5 + 1

    def test_who_is_in_progress_has_a_reserve_too(self):
        admission, _ = make_admission(num_pages=12, chunked_prefill_size=4)
        admission.put(make_req("a", prompt(8), max_new_tokens=40))
        assert lens(admission.next_chunks([])) == [("a", 4)]
        admission.put(make_req("b", prompt(20, 1)))
        admission.in_progress[0].handle.kv_len = 6
        assert lens(admission.next_chunks([])) == [("a", 2)], "b would take the pages of a's output"

    @pytest.mark.parametrize("policy", ["deadline", "lpm", "fcfs", "priority"])
    def test_who_was_retracted_is_the_first_to_run_again(self, policy):
        admission, (cache,) = make_admission(schedule_policy=policy, chunked_prefill_size=100)
        admission.put(make_req("a", prompt(4)))
        running = run(cache, make_req("b", prompt(4, 1)))
        cache.release(running.handle, running.req.fill_ids)
        admission.put_back(running)
        assert rids(admission.next_chunks([])) == ["b", "a"] and running.req.num_retractions == 1

    def test_taking_out_leaves_the_others_in_their_order(self):
        admission, _ = make_admission()
        for rid in "abc":
            admission.put(make_req(rid, prompt(4)))
        assert [req.rid for req in admission.take_out(lambda rid: rid == "b")] == ["b"]
        assert [req.rid for req in admission.waiting] == ["a", "c"]

    def test_who_waits_has_an_age_and_who_is_taken_out_has_waited(self):
        now = [10.0]
        admission, _ = make_admission(clock=lambda: now[0])
        assert admission.oldest_wait_s([]) == 0.0
        for rid, arrival_s in (("a", 2.0), ("b", 4.0)):
            admission.put(make_req(rid, prompt(4), arrival_s=arrival_s))
        assert admission.oldest_wait_s([]) == 8.0 and admission.oldest_wait_s([1.0]) == 9.0
        (left,) = admission.take_out(lambda rid: rid == "a")
        assert left.queue_time_s == 8.0 and admission.oldest_wait_s([]) == 6.0

    def test_who_has_run_waits_since_its_cache_was_taken(self):
        now = [10.0]
        admission, (cache,) = make_admission(clock=lambda: now[0])
        running = run(cache, make_req("a", prompt(4), arrival_s=2.0))
        cache.release(running.handle, running.req.fill_ids)
        admission.put_back(running)
        now[0] = 13.0
        assert admission.oldest_wait_s([]) == 3.0
        (left,) = admission.take_out(lambda rid: True)
        assert left.queue_time_s == 0.0, "it has not waited for its first pass"


class TestRetraction:
    def pick(self, cache, *reqs):
        return min(reqs, key=lambda running: retraction_cost(running, cache)).req.rid

    def test_who_loses_the_fewest_tokens_gives_way(self):
        cache = make_cache()
        reqs = [run(cache, make_req(rid, prompt(length))) for rid, length in (("a", 7), ("b", 5), ("c", 9))]
        assert self.pick(cache, *reqs) == "b"

    def test_what_others_keep_cached_is_not_lost(self):
        cache = make_cache()
        keep(cache, prompt(12))
        sharing = [RunningReq(req, cache.begin(cache.match(req.fill_ids[:12]), 14)) for req in two_reqs()]
        for running in sharing:
            running.handle.kv_len = 14
        other = run(cache, make_req("other", prompt(4, 5)))
        assert retraction_cost(sharing[0], cache)[1] == 2 and self.pick(cache, other, *sharing) in ("s0", "s1")
        cache.release(sharing[1].handle, sharing[1].req.fill_ids)
        assert retraction_cost(sharing[0], cache)[1] == 14 and self.pick(cache, other, sharing[0]) == "other"

    def test_who_would_free_nothing_stays(self):
        cache = make_cache()
        keep(cache, prompt(12))
        sharing = [RunningReq(req, cache.begin(cache.match(req.fill_ids[:12]), 12)) for req in two_reqs()]
        other = run(cache, make_req("other", prompt(14, 5)))
        assert self.pick(cache, *sharing, other) == "other"

    def test_nobody_gives_way_again_and_again(self):
        cache = make_cache()
        small, large = run(cache, make_req("small", prompt(5))), run(cache, make_req("large", prompt(12, 1)))
        picked = []
        for _ in range(3):
            picked.append(self.pick(cache, small, large))
            small.req.num_retractions += 1
        assert picked == ["small", "small", "large"]

    def test_of_equal_ones_the_last_to_come_gives_way(self):
        cache = make_cache()
        reqs = [run(cache, make_req(str(at_s), prompt(6, at_s), arrival_s=at_s)) for at_s in (1, 3, 2)]
        assert self.pick(cache, *reqs) == "3"


def two_reqs():
    return [make_req(f"s{index}", [*prompt(12), 500 + index, 501]) for index in range(2)]
