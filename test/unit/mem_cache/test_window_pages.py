"""Pages of layers with a window: given back behind it, kept for prefixes, and no prefix without what it must see."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.mem_cache.kv_sizes import most_pages, window_pages
from ramet.srt.mem_cache.window_pages import WindowCapacity, WindowPages

WINDOW, PAGE = 12, 4
SMALL = {"device": "cpu", "chunked_prefill_size": 16, "max_running_requests": 4, "page_size": PAGE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss", sliding_window=WINDOW, num_hidden_layers=2)


def num_places(engine):
    """Of pages that running requests see, and of all that have one."""
    windows = engine.scheduler.caches[0].windows
    return sum(count > 0 for count in windows._num_users), sum(place > 0 for place in windows._of)


def check(engine, folder, prompts, n):
    results = engine.generate(prompts, max_new_tokens=n)
    assert [result.token_ids for result in results] == rm.hf_greedy(folder, prompts, n)
    return results


def test_long_sequences_hold_their_window_alone(folder):
    engine = EngineHarness(folder, **SMALL)
    assert engine.runner.windows == WindowCapacity(WINDOW, 64)
    pool = engine.runner.kv_pool
    assert [len(pool.get_kv_buffer(layer)[0]) for layer in (0, 1)] == [65 * PAGE, 513 * PAGE]
    prompts = rm.random_prompts([150, 60])
    for rid, prompt in enumerate(prompts):
        engine.submit(str(rid), prompt, max_new_tokens=30)
    most = 0
    while engine.step() or engine.loop.has_work:
        engine.scheduler.caches[0].check([running.handle for running in engine.scheduler.running.admitted()])
        most = max(most, num_places(engine)[0])
    assert most <= 2 * (-(-WINDOW // PAGE) + 3) + 16 // PAGE
    expected = rm.hf_greedy(folder, prompts, 30)
    assert [engine.results()[str(rid)].token_ids for rid in (0, 1)] == expected
    assert num_places(engine)[0] == 0


def test_hits_give_what_misses_give(folder):
    """Of whole prompts, of those that go on, and of beginnings whose window is not kept any more."""
    engine = EngineHarness(folder, **SMALL)
    prompt = rm.random_prompts([120])[0]
    first = check(engine, folder, [prompt], 40)[0]
    again = check(engine, folder, [prompt], 4)[0]
    assert first.cached_tokens == 0 and again.cached_tokens >= 112
    longer = prompt + first.token_ids + rm.random_prompts([9], seed=3)[0]
    assert check(engine, folder, [longer], 4)[0].cached_tokens >= 150
    # Within what was generated, pages lost their places while the request ran: the prompt's end is the last that holds.
    inside = prompt + first.token_ids[:20] + rm.random_prompts([9], seed=4)[0]
    assert 112 <= check(engine, folder, [inside], 4)[0].cached_tokens <= 120


def test_other_sequences_take_the_places_of_what_is_cached(folder):
    engine = EngineHarness(folder, **SMALL)
    prompts = rm.random_prompts([100] * 6)
    for prompt in prompts:
        check(engine, folder, [prompt], 2)
    assert num_places(engine)[0] == 0 and num_places(engine)[1] > 60
    assert check(engine, folder, prompts[-1:], 2)[0].cached_tokens >= 96
    oldest = check(engine, folder, prompts[:1], 2)[0]
    assert oldest.cached_tokens < 96  # the pages are there, but not what a window sees
    check(engine, folder, prompts, 2)


def test_requests_that_give_way_and_shared_prefixes(folder):
    """Too few pages for all: some start over, in what others have left of the places."""
    engine = EngineHarness(folder, **SMALL, max_total_tokens=320)
    assert engine.runner.windows is not None
    prefix = rm.random_prompts([40], seed=7)[0]
    prompts = [prefix + tail for tail in rm.random_prompts([30, 45, 60, 5])]
    check(engine, folder, prompts, 40)
    assert engine.scheduler.running.num_retracted > 0
    check(engine, folder, prompts[::-1], 3)


def test_overlapped_passes(folder):
    engine = EngineHarness(folder, overlap=True, **SMALL)
    for _ in range(2):
        check(engine, folder, rm.random_prompts([70, 3, 40, 90]), 20)


def test_places_go_to_whoever_needs_them():
    windows = WindowPages(WindowCapacity(WINDOW, 3), 10, PAGE)
    assert not any(windows.use(page) for page in (1, 2, 3))
    for page in (2, 1):
        windows.leave(page)
    assert windows.use(4)  # in the place of page 2, which nobody has used for longest
    assert windows.longest_prefix([1, 2]) == 1 and windows.longest_prefix([2]) == 0
    assert dict(windows.take_writes()) == {1: 1, 2: 0, 3: 3, 4: 2} and not windows.take_writes()
    windows.replace(4, 1)  # page 1 has a place already, so that of page 4 is free
    assert not windows.use(5) and dict(windows.take_writes()) == {4: 0, 5: 2}
    windows.check([1, 3, 5])
    with pytest.raises(AssertionError, match="in use has lost its place"):
        windows.forget(1)


def test_a_prefix_needs_what_the_token_behind_it_sees():
    windows = WindowPages(WindowCapacity(9, 8), 20, PAGE)  # two pages behind a border
    for page in (1, 2, 5, 6):
        windows.use(page)
    assert [windows.longest_prefix(list(range(1, n))) for n in range(1, 9)] == [0, 1, 2, 2, 2, 2, 6, 6]


@pytest.mark.parametrize(("full", "window", "needed"), [(3, 5, 7), (3, 5, 10**6), (3, 0, 0), (0, 5, 7)])
def test_pages_fill_the_memory(full, window, needed):
    num_pages = most_pages(1000, full, window, needed)
    if num_pages is None:
        assert full == 0 and window_pages(1 << 30, needed) * window > 1000
        return
    sizes = [n * full + window_pages(n, needed) * window for n in (num_pages, num_pages + 1)]
    assert sizes[0] <= 1000 < sizes[1]
