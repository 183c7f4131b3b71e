"""The overlapped loop gives what the plain one gives: tokens, ends, log-probabilities, and no lost page."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers import tp_worker
from ramet.srt.managers.io_struct import AbortReq, GetInternalStateReq
from ramet.srt.managers.scheduler import MAX_WAIT_S

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(params=[{}, {"max_total_tokens": 160}, {"chunked_prefill_size": 7}, {"page_size": 1}], ids=str)
def engines(request, folder):
    return EngineHarness(folder, **request.param), EngineHarness(folder, overlap=True, **request.param)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 3},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"allowed_token_ids": list(range(40, 60)), "bad_words_ids": [[40], [41, 42], [43, 44, 45]]},
        {"max_new_tokens": 0},
        {"regex": "[a-z ]{3,20}", "ignore_eos": False, "sampling_seed": 1, "temperature": 0.5},
    ],
    ids=str,
)
def test_same_tokens(engines, params):
    for _ in range(2):  # the second time with a warm prefix cache
        plain, overlapped = (engine.generate(PROMPTS, **{"max_new_tokens": 14} | params) for engine in engines)
        assert [result.token_ids for result in overlapped] == [result.token_ids for result in plain]
        assert [result.finish_reason for result in overlapped] == [result.finish_reason for result in plain]


def test_a_stop_token_drops_what_was_computed_beyond_it(engines):
    full = engines[0].generate(PROMPTS, max_new_tokens=14)
    stops = [result.token_ids[5] for result in full]
    for prompt, stop, whole in zip(PROMPTS, stops, full, strict=True):
        result = engines[1].generate([prompt], max_new_tokens=14, stop_token_ids=[stop])[0]
        assert result.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert result.finish_reason.matched == stop


def test_streams_every_token_once(engines):
    for index, prompt in enumerate(PROMPTS):
        engines[1].submit(str(index), prompt, max_new_tokens=9, stream=True, return_logprob=True, top=2)
    results = engines[1].run()
    for index, expected in enumerate(engines[0].generate(PROMPTS, max_new_tokens=9, return_logprob=True, top=2)):
        assert results[str(index)].token_ids == expected.token_ids
        assert results[str(index)].output_logprobs == pytest.approx(expected.output_logprobs, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_abort_while_a_pass_is_under_way(engines, steps):
    engine = engines[1]
    for index, prompt in enumerate(PROMPTS):
        engine.submit(str(index), prompt, max_new_tokens=12)
    for _ in range(steps):
        engine.step()
    engine.send(AbortReq(rid="2"))
    results = engine.run()
    assert results["2"].finish_reason.type == "abort"
    assert len([result for result in results.values() if result.finish_reason.type == "length"]) == len(PROMPTS) - 1
    assert all(len(results[str(index)].token_ids) == 12 for index in (0, 1, 3, 4))


@pytest.fixture()
def engine(folder):
    return EngineHarness(folder, overlap=True, chunked_prefill_size=7)


@pytest.fixture()
def timeouts(engine, monkeypatch):
    """What the scheduler waits for messages at most, each time."""
    timeouts, receive = [], engine.channel.receive
    monkeypatch.setattr(engine.channel, "receive", lambda timeout_s: timeouts.append(timeout_s) or receive(timeout_s))
    return timeouts


def test_while_planning_can_wait_messages_are_taken_in(engine, timeouts, monkeypatch):
    scheduler = engine.scheduler
    engine.submit("ended", PROMPTS[1], max_new_tokens=8)
    engine.loop.run_once()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.passes, "spare_s", lambda: 0.5)
        engine.submit("new", PROMPTS[2], max_new_tokens=8)
        engine.send(AbortReq(rid="ended"))
        engine.send(GetInternalStateReq(request_id="state"))
        engine.loop.run_once()
        assert timeouts[-1] == MAX_WAIT_S, "whoever ends the process is not kept waiting"
        assert len(scheduler.passes) == 1 and len(scheduler.admission.waiting) == 1 and len(engine.channel.replies) == 1
    results = engine.run()
    assert results["ended"].finish_reason.type == "abort" and len(results["new"].token_ids) == 8


def test_nothing_waits_while_a_constraint_is_at_work(engine, timeouts, monkeypatch):
    engine.submit("plain", PROMPTS[1], max_new_tokens=8)
    engine.loop.run_once()
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.passes, "spare_s", lambda: 0.5)
        engine.submit("constrained", PROMPTS[2], max_new_tokens=8, regex="[a-z ]{3,20}")
        engine.loop.run_once()
        assert engine.scheduler.grammar_queue
        engine.loop.run_once()
        assert timeouts[1:] == [MAX_WAIT_S, 0.0]
    assert set(engine.run()) == {"plain", "constrained"}


def test_a_pass_that_chooses_no_token_comes_back_when_it_ends(engine, monkeypatch):
    """Its time is learnt, and others are planned by it."""
    events = []

    class Copies(tp_worker.HostCopies):
        def close(self, device):
            events.append("recorded")

        def wait(self):
            events.append("waited")

    monkeypatch.setattr(tp_worker, "HostCopies", Copies)
    engine.submit("long", PROMPTS[3], max_new_tokens=1)
    engine.run()
    assert engine.num_batches == 5
    assert events.count("recorded") == events.count("waited") == engine.num_batches
