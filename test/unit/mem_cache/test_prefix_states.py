"""States of linear layers: no prefix without its state, which gives way to requests, and never to a wrong answer."""

import random

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers.io_struct import AbortReq
from ramet.srt.managers.scheduler_loop import _linear_states
from ramet.srt.mem_cache.state_slots import StateSlots

PAGE = 4
SMALL = {"device": "cpu", "chunked_prefill_size": 16, "max_running_requests": 4, "page_size": PAGE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")


@pytest.fixture(scope="module")
def plain(folder):
    """Gives greedy tokens without any prefix cache; test_engine_correctness.py compares it with transformers."""
    engine = EngineHarness(folder, **SMALL, disable_radix_cache=True)

    def generate(prompts, n):
        return [result.token_ids for result in engine.generate(prompts, max_new_tokens=n)]

    return generate


def check(engine, plain, prompts, n):
    """All at once; what each has found in the cache."""
    results = engine.generate(prompts, max_new_tokens=n)
    assert [result.token_ids for result in results] == plain(prompts, n)
    return [result.cached_tokens for result in results]


def check_slots(engine):
    cache = engine.scheduler.caches[0]
    cache.check([running.handle for running in engine.scheduler.running.admitted()])


def stats_of(engine):
    """What metrics and /server_info show."""
    return _linear_states(engine.scheduler.caches)


def test_hits_give_what_misses_give(folder, plain):
    engine = EngineHarness(folder, **SMALL)
    prompt = rm.random_prompts([121])[0]
    output = plain([prompt], 40)[0]
    assert check(engine, plain, [prompt], 40) == [0]
    assert check(engine, plain, [prompt], 4) == [120]  # the last border before its last token
    assert engine.scheduler.caches[0].states.slots.num_snapshots == 2  # of its chunks, only the last one's stays
    longer = prompt + output + rm.random_prompts([9], seed=3)[0]
    assert check(engine, plain, [longer], 4) == [128]  # kept while it was generated
    inside = prompt + output[:3] + rm.random_prompts([9], seed=4)[0]
    assert check(engine, plain, [inside], 4) == [120]
    begun = prompt[:30] + rm.random_prompts([9], seed=5)[0]
    assert check(engine, plain, [begun], 4) == [0]
    states = stats_of(engine)
    assert (states.num_hits, states.num_used, states.num_evictions) == (3, 0, 0)
    assert states.num_snapshots == engine.scheduler.caches[0].states.slots.num_snapshots > 2


def test_a_prefix_that_prompts_share_is_kept_where_they_part(folder, plain):
    engine = EngineHarness(folder, **SMALL)
    shared, *rests = rm.random_prompts([50, 20, 25, 30, 35])
    prompts = [shared + rest for rest in rests]
    assert [check(engine, plain, [prompt], 3)[0] for prompt in prompts] == [0, 0, 48, 48]
    assert check(engine, plain, prompts, 3) == [68, 72, 76, 84]
    assert check(engine, plain, [shared], 3) == [48]


def test_equal_prompts_that_come_together_are_computed_once(folder, plain):
    engine = EngineHarness(folder, **SMALL)
    prompt = rm.random_prompts([90])[0]
    assert check(engine, plain, [prompt] * 3, 5) == [0, 88, 88]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 7])
def test_few_slots_make_requests_wait_and_no_answer_wrong(folder, plain, num_slots, overlap):
    generator = random.Random(num_slots)
    beginnings = rm.random_prompts([8, 24, 61], seed=1)
    prompts = [
        generator.choice(beginnings)[: generator.randint(4, 61)]
        + rm.random_prompts([generator.randint(1, 20)], seed=n)[0]
        for n in range(12)
    ]
    prompts += prompts[:4]
    expected = plain(prompts, 9)
    options = {"max_mamba_cache_size": num_slots, "max_total_tokens": 240, "overlap": overlap}
    engine = EngineHarness(folder, **SMALL, **options)
    most = 0
    for rid, prompt in enumerate(prompts):
        engine.submit(str(rid), prompt, max_new_tokens=9)
        for _ in range(generator.randint(0, 6)):
            engine.step()
            check_slots(engine)
            most = max(most, len(engine.scheduler.running.admitted()))
    results = engine.run()
    assert [results[str(rid)].token_ids for rid in range(len(prompts))] == expected
    assert most <= min(num_slots, 4)
    states = engine.scheduler.caches[0].states
    assert states.slots.num_available == num_slots
    stats = stats_of(engine)
    assert (stats.num_slots, stats.num_used) == (num_slots, 0)
    assert (stats.num_evictions > 0) == (num_slots > 1) and (stats.num_hits > 0) == any(
        result.cached_tokens for result in results.values()
    )
    if num_slots == 7:
        assert sum(results[str(rid)].cached_tokens for rid in range(len(prompts))) > 0
    engine.scheduler.flush_caches()
    assert states.slots.num_snapshots == 0


def test_aborted_and_retracted_requests_leave_nothing_wrong(folder, plain):
    engine = EngineHarness(folder, **SMALL, overlap=True, max_total_tokens=200)
    prompts = rm.random_prompts([70, 33, 50, 21])
    expected = plain(prompts, 20)
    for rid, prompt in enumerate(prompts):
        engine.submit(str(rid), prompt, max_new_tokens=20)
    for _ in range(12):
        engine.step()
    engine.send(AbortReq(rid="1"))
    engine.step()
    check_slots(engine)
    engine.scheduler.pause("retract")
    check_slots(engine)
    assert not engine.scheduler.running.admitted()
    engine.scheduler.go_on()
    results = engine.run()
    assert [results[str(rid)].token_ids for rid in (0, 2, 3)] == [expected[rid] for rid in (0, 2, 3)]
    check(engine, plain, prompts, 20)


def test_what_other_weights_have_made_is_not_found_again(folder, plain):
    engine = EngineHarness(folder, **SMALL)
    prompt = rm.random_prompts([60])[0]
    assert check(engine, plain, [prompt], 5) == [0]
    engine.submit("old", prompt + [7], max_new_tokens=80)
    for _ in range(6):
        engine.step()
    engine.scheduler.switch_weight_version("next")
    engine.run()  # goes on with the old state, and leaves nothing of it
    assert engine.scheduler.caches[0].states.slots.num_snapshots == 0
    assert check(engine, plain, [prompt], 5) == [0]
    assert check(engine, plain, [prompt], 5) == [56]


def test_memory_that_is_given_back_and_taken_again(folder, plain):
    engine = EngineHarness(folder, **SMALL, enable_memory_saver=True)
    prompts = rm.random_prompts([40, 21])
    check(engine, plain, prompts, 5)
    engine.scheduler.pause("retract")
    assert engine.scheduler.give_up_caches()
    for pool in (engine.runner.kv_pool, engine.runner.states.pool):
        pool.put_away()
        assert pool.is_put_away
        pool.take_back()
    engine.scheduler.go_on()
    assert check(engine, plain, prompts, 5) == [0, 0]


def test_slots_are_for_models_that_keep_states(tmp_path):
    folder = rm.make_model(tmp_path, "llama2")
    with pytest.raises(ValueError, match="--max-mamba-cache-size 3 is for models with linear layers; LlamaForCausalLM"):
        EngineHarness(folder, max_mamba_cache_size=3)


def test_too_little_memory_is_said_with_what_the_states_take(folder):
    with pytest.raises(ValueError, match=r"GB of KV cache and \d+\.\d+ GB of states of linear layers beside"):
        EngineHarness(folder, max_mamba_cache_size=1_000_000_000)


def test_the_snapshot_that_is_unused_longest_gives_way():
    slots = StateSlots(3)
    for owner in "abc":
        slots.keep(owner, slots.take())
    oldest = slots.use("a")
    taken = slots.take()
    assert not slots.has("b") and slots.has("a") and slots.num_evictions == 1
    slots.keep("a", taken)  # in place of the one before, which is free now
    assert slots.take() == oldest and slots.num_available == 2
    slots.hand_over("a", "c")  # which has its own
    assert not slots.has("a") and slots.num_snapshots == 1
    assert slots.num_displaced == 1  # the others were replaced
    for owner in "ca":  # whose pages are evicted; a has nothing
        slots.displace(owner)
    assert (slots.num_displaced, slots.num_snapshots, slots.num_used) == (2, 0, 1)
    slots.check([oldest])
    slots.drop_all()
    with pytest.raises(AssertionError, match="two owners"):
        slots.check([])
