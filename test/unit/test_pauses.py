"""The scheduler's part of a pause: what becomes of the requests that are there, and of those that come."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers.io_struct import (
    AbortReq,
    ContinueReqInput,
    ContinueReqOutput,
    FlushCacheReqInput,
    PauseReqInput,
    PauseReqOutput,
)
from ramet.srt.managers.leader import Leader

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def engine(folder, request):
    return EngineHarness(folder, overlap=request.param, chunked_prefill_size=32)


def pause(engine: EngineHarness, mode: str) -> int:
    """How many requests the pause holds."""
    engine.channel.replies.clear()
    engine.send(PauseReqInput(request_id="p", mode=mode))
    assert not engine.step(), "a pass was planned in a pause"
    assert not engine.scheduler.passes, "a pass is still under way"
    (reply,) = engine.channel.replies
    assert isinstance(reply, PauseReqOutput) and reply.request_id == "p"
    return reply.num_held


def go_on(engine: EngineHarness) -> None:
    engine.channel.replies.clear()
    engine.send(ContinueReqInput(request_id="c"))
    engine.step()
    assert engine.channel.replies == [ContinueReqOutput(request_id="c")]


def num_free(engine: EngineHarness) -> int:
    return engine.scheduler.caches[0].num_available_pages


def submit(engine: EngineHarness, prompts: list[list[int]], **params) -> None:
    for index, prompt in enumerate(prompts):
        engine.submit(str(index), prompt, max_new_tokens=NUM_TOKENS, **params)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_requests_go_on_as_if_nothing_had_been(engine, mode, num_steps):
    """Some decode, and some have a prompt in progress, or none computed; one wants the prompt's log-probabilities."""
    prompts = rm.random_prompts([9, 30, 70, 25])
    submit(engine, prompts, logprob_start_len=0)
    expected = engine.run()
    engine.channel.outputs.clear()
    engine.scheduler.flush_caches()
    submit(engine, prompts, logprob_start_len=0)
    for _ in range(num_steps):
        engine.step()
    assert pause(engine, mode) == 4
    for _ in range(3):
        assert not engine.step()
    if mode == "retract":
        assert num_free(engine) == engine.scheduler.caches[0].allocator.num_pages
        engine.scheduler.check_caches()
    go_on(engine)
    results = engine.run()
    assert {rid: one.token_ids for rid, one in results.items()} == {rid: one.token_ids for rid, one in expected.items()}
    for rid, result in results.items():
        assert result.input_logprobs.token_ids == prompts[int(rid)]
        assert result.input_logprobs.logprobs[1:] == pytest.approx(expected[rid].input_logprobs.logprobs[1:], abs=1e-4)


def test_an_aborting_pause_ends_all_that_is_there_and_holds_what_comes(engine):
    prompts = rm.random_prompts([9, 70, 8])
    submit(engine, prompts)
    engine.step()
    engine.step()
    assert pause(engine, "abort") == 0
    results = engine.results()
    assert {one.finish_reason.type for one in results.values()} == {"abort"} and len(results) == 3
    assert len(results["0"].token_ids) >= 1
    assert not engine.scheduler.has_work
    engine.submit("later", prompts[0], max_new_tokens=2)
    engine.step()
    engine.step()
    assert "later" not in engine.results() and engine.scheduler.has_work
    go_on(engine)
    assert len(engine.run()["later"].token_ids) == 2


def test_what_a_pause_holds_can_be_aborted(engine):
    prompts = rm.random_prompts([9, 8])
    submit(engine, prompts)
    engine.step()
    engine.step()
    assert pause(engine, "in_place") == 2
    engine.submit("later", prompts[0], max_new_tokens=2)
    for rid in ("0", "later"):
        engine.send(AbortReq(rid=rid))
    engine.step()
    results = engine.results()
    assert results["0"].finish_reason.type == "abort" and results["later"].finish_reason.type == "abort"
    assert pause(engine, "abort") == 0  # a pause in a pause
    assert engine.results()["1"].finish_reason.type == "abort"
    engine.scheduler.check_caches()


def test_an_aborted_request_is_not_taken_back_twice(engine):
    """It is aborted while it runs, and the pause comes before the pass that would have ended it."""
    submit(engine, rm.random_prompts([9, 8]))
    engine.step()
    engine.step()
    engine.send(AbortReq(rid="0"))
    assert pause(engine, "retract") == 1
    assert engine.results()["0"].finish_reason.type == "abort"
    go_on(engine)
    assert len(engine.run()["1"].token_ids) == NUM_TOKENS


def test_the_order_of_those_that_start_over_is_kept(folder):
    engine = EngineHarness(folder, max_running_requests=2)
    submit(engine, rm.random_prompts([9, 8, 7]))
    engine.step()
    engine.step()
    pause(engine, "retract")
    assert [req.rid for req in engine.scheduler.admission.waiting] == ["0", "1", "2"]


def test_the_prefix_cache_can_be_dropped_where_nobody_holds_any_of_it(engine):
    def flush() -> bool:
        engine.channel.replies.clear()
        engine.send(FlushCacheReqInput(request_id="f"))
        engine.step()
        return engine.channel.replies[0].success

    (prompt,) = rm.random_prompts([40])
    expected = engine.generate([prompt], max_new_tokens=NUM_TOKENS)[0]
    engine.channel.outputs.clear()
    submit(engine, [prompt])
    engine.step()
    engine.step()
    pause(engine, "in_place")
    assert not flush()
    pause(engine, "retract")
    assert flush() and num_free(engine) == engine.scheduler.caches[0].allocator.num_free
    go_on(engine)
    assert engine.run()["0"].token_ids == expected.token_ids


def test_a_token_that_a_constraint_has_yet_to_take_is_not_lost(folder):
    prompts = rm.random_prompts([9, 8])
    engine = EngineHarness(folder)
    regex = "[a-z]{20}"
    expected = [one.token_ids for one in engine.generate(prompts, max_new_tokens=NUM_TOKENS, regex=regex)]
    for mode in ("in_place", "retract"):
        engine.channel.outputs.clear()
        submit(engine, prompts, regex=regex)
        engine.scheduler.grammar_queue.wait(30)
        while not engine.scheduler.grammar_steps:
            engine.step()
        pause(engine, mode)
        go_on(engine)
        results = engine.run()
        assert [results[str(index)].token_ids for index in range(2)] == expected


def test_weights_can_be_switched_in_a_pause(engine):
    (prompt,) = rm.random_prompts([9])
    for mode in ("in_place", "retract"):
        engine.channel.outputs.clear()
        submit(engine, [prompt])
        for _ in range(4):
            engine.step()
        pause(engine, mode)
        old = engine.scheduler.weight_version
        engine.scheduler.switch_weight_version(f"after {mode}")
        go_on(engine)
        result = engine.run()["0"]
        (first, start), (second, middle) = result.versions
        assert (first, start, second) == (old, 0, f"after {mode}") and 0 < middle < NUM_TOKENS


def test_a_pause_is_no_hang(engine):
    """What the watchdog looks at: the turn that a rank is at, and the pass that its ranks are at."""
    submit(engine, rm.random_prompts([9, 8]))
    engine.step()
    leader = Leader(engine.loop, engine.channel, None)
    assert engine.scheduler.passes.waiting_since is not None or not engine.scheduler.config.overlap
    pause(engine, "in_place")
    waits = []
    engine.channel.receive = lambda timeout_s: waits.append(timeout_s) or []
    before = leader.task_since()
    for _ in range(2):
        leader.run_once()
        assert leader.task_since() != before, "each look at the messages is a turn of its own"
        before = leader.task_since()
    assert min(waits) > 0.1, "a paused scheduler waits for messages, and does not spin"
