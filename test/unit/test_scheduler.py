"""What the scheduler promises beside the right tokens: ends, aborts, limits, sharing, sampling."""

import gc
import json
import shutil
import sys
import tracemalloc

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.layers import sampler
from ramet.srt.layers.cpu_kernels import library
from ramet.srt.managers import throughput
from ramet.srt.managers.io_struct import AbortReq, FlushCacheReqInput, GetInternalStateReq


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture()
def engine(folder):
    return EngineHarness(folder)


def test_warming_up_leaves_nothing_of_sampling_to_be_made_for_the_first_request(engine, monkeypatch):
    """On a GPU the search for the limits is a kernel that takes a second or more to compile."""
    searched = []
    least_kept = sampler._least_kept
    monkeypatch.setattr(sampler, "_least_kept", lambda *args: searched.append(1) or least_kept(*args))
    monkeypatch.setattr(library, "_library", None)  # CPUs choose otherwise
    engine.scheduler.warm_up()
    assert searched and not engine.channel.outputs
    engine.scheduler.check_caches()


def test_without_graphs_the_kernels_of_few_and_many_requests_are_prepared(engine, monkeypatch):
    """What a GPU rank does beside the loading of its weights."""
    runner, batches = engine.runner, []
    forward = runner._forward
    monkeypatch.setattr(runner, "_forward", lambda batch: batches.append(batch) or forward(batch))
    monkeypatch.setattr(type(runner), "can_be_captured", False)
    runner._prepare_kernels()
    assert {batch.batch_size for batch in batches if batch.forward_mode is ForwardMode.DECODE} == {1, 16}


def test_rows_that_pad_a_pass_change_nothing(engine, monkeypatch):
    """What a GPU rank does so that its libraries see few numbers of rows."""
    prompts = rm.random_prompts([9, 33, 1, 70])
    expected = [result.token_ids for result in engine.generate(prompts, max_new_tokens=6)]
    numbers = []
    monkeypatch.setattr(engine.runner, "_padded_count", lambda number: numbers.append(number) or number + 5)
    fresh = [result.token_ids for result in engine.generate(prompts, max_new_tokens=6)]
    assert fresh == expected and len(numbers) >= 12
    engine.scheduler.check_caches()


def test_an_end_token_beyond_the_vocabulary_can_be_held_back(folder, tmp_path):
    """Writing to such a place of the logits would end the whole instance."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [rm.EOS, 10**6]}))
    engine = EngineHarness(copy)
    assert len(engine.generate(rm.random_prompts([9]), max_new_tokens=5, min_new_tokens=5)[0].token_ids) == 5


def test_length_and_stop_tokens(engine):
    prompt = rm.random_prompts([9])[0]
    full = engine.generate([prompt], max_new_tokens=12)[0]
    assert full.finish_reason.type == "length" and full.finish_reason.length == 12
    stop = full.token_ids[5]
    place = full.token_ids.index(stop)
    stopped = engine.generate([prompt], max_new_tokens=12, stop_token_ids=[stop])[0]
    assert stopped.token_ids == full.token_ids[: place + 1]
    assert stopped.finish_reason.type == "stop" and stopped.finish_reason.matched == stop


def test_min_new_tokens_holds_the_end_back(engine):
    prompt = rm.random_prompts([9])[0]
    full = engine.generate([prompt], max_new_tokens=12)[0].token_ids
    result = engine.generate([prompt], max_new_tokens=12, min_new_tokens=8, stop_token_ids=full[:3])[0]
    assert len(result.token_ids) >= 8
    assert not set(result.token_ids[:8]) & set(full[:3])


def test_eos_ends_unless_ignored(engine):
    prompt = rm.random_prompts([9])[0]
    bias = {rm.EOS: 1000.0}
    ended = engine.generate([prompt], max_new_tokens=5, ignore_eos=False, logit_bias=bias)[0]
    assert ended.token_ids == [rm.EOS] and ended.finish_reason.matched == rm.EOS
    ignored = engine.generate([prompt], max_new_tokens=5, ignore_eos=True, logit_bias=bias)[0]
    assert ignored.token_ids == [rm.EOS] * 5


def test_stop_string_ends_at_the_token_that_completes_it(engine):
    prompt = rm.random_prompts([9])[0]
    full = engine.generate([prompt], max_new_tokens=30)[0].token_ids
    decode = engine.scheduler.get_tokenizer().decode
    texts = [decode(full[: count + 1]) for count in range(30)]
    target = texts[20][-3:]
    first = next(index for index, text in enumerate(texts) if target in text)
    result = engine.generate([prompt], max_new_tokens=30, stop=["never to be seen", target])[0]
    assert result.finish_reason.matched == target
    assert result.token_ids == full[: first + 1]


def test_seeded_sampling_does_not_depend_on_the_batch(engine):
    prompts = rm.random_prompts([9, 14, 30])
    params = {"max_new_tokens": 10, "temperature": 0.9, "top_p": 0.9, "sampling_seed": 7}
    together = [result.token_ids for result in engine.generate(prompts, **params)]
    alone = [engine.generate([prompt], **params)[0].token_ids for prompt in prompts]
    assert together == alone
    assert engine.generate(prompts[:1], **(params | {"sampling_seed": 8}))[0].token_ids != alone[0]


def test_frequency_penalty_forbids_repetition(engine):
    prompt = rm.random_prompts([9])[0]
    tokens = engine.generate([prompt], max_new_tokens=40, frequency_penalty=2.0, logit_bias={17: 30.0})[0].token_ids
    assert tokens.count(17) < 40
    assert engine.generate([prompt], max_new_tokens=40, logit_bias={17: 1000.0})[0].token_ids == [17] * 40


def test_a_prompt_is_scored_without_a_token(engine):
    prompts = rm.random_prompts([9, 40])
    for prompt in prompts:
        scored = engine.generate([prompt], max_new_tokens=0, logprob_start_len=0, top=2)[0]
        assert scored.token_ids == [] and scored.output_logprobs == []
        assert (scored.finish_reason.type, scored.finish_reason.length) == ("length", 0)
        continued = engine.generate([prompt], max_new_tokens=1, logprob_start_len=0, top=2)[0]
        assert scored.input_logprobs == continued.input_logprobs
    schema = json.dumps({"type": "object"})
    assert engine.generate(prompts, max_new_tokens=0, json_schema=schema)[1].finish_reason.length == 0


def test_only_allowed_tokens_come(engine):
    prompt = rm.random_prompts([9])[0]
    result = engine.generate([prompt], max_new_tokens=20, allowed_token_ids=[7, 8, 9], temperature=1.0)[0]
    assert set(result.token_ids) <= {7, 8, 9} and len(result.token_ids) == 20


def test_bad_words_do_not_come(engine):
    """In a text of three tokens that are equally likely every short word comes, unless it may not."""
    prompt = rm.random_prompts([9])[0]
    params = {"max_new_tokens": 60, "allowed_token_ids": [7, 8, 9], "temperature": 100.0, "sampling_seed": 5}

    def has(ids, word):
        return any(ids[place : place + len(word)] == word for place in range(len(ids)))

    words = [[7, 8], [9, 9, 7]]
    assert all(has(engine.generate([prompt], **params)[0].token_ids, word) for word in words)
    ids = engine.generate([prompt], **params, bad_words_ids=words)[0].token_ids
    assert set(ids) == {7, 8, 9} and not any(has(ids, word) for word in words)
    assert 7 not in engine.generate([prompt], **params, bad_words_ids=[[7]])[0].token_ids


def test_a_request_that_leaves_no_token_is_a_bad_one(engine):
    prompt = rm.random_prompts([9])[0]
    result = engine.generate([prompt], max_new_tokens=5, allowed_token_ids=[7], bad_words_ids=[[7]])[0]
    assert (result.finish_reason.type, result.finish_reason.status_code) == ("abort", 400)
    assert result.finish_reason.param == "allowed_token_ids"


@pytest.mark.parametrize("is_low_first", [False, True])
def test_requests_of_high_priority_pass_others(folder, is_low_first):
    flags = {"schedule_policy": "priority", "schedule_low_priority_values_first": is_low_first}
    engine = EngineHarness(folder, max_running_requests=1, **flags)
    for priority in (0, 5, -5):
        engine.submit(str(priority), [5, 6], max_new_tokens=2, priority=priority)
    assert list(engine.run()) == (["-5", "0", "5"] if is_low_first else ["5", "0", "-5"])


def test_json_schema_is_obeyed(engine):
    schema = {
        "type": "object",
        "properties": {"alive": {"type": "boolean"}, "runners": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["alive", "runners"],
        "additionalProperties": False,
    }
    prompts = rm.random_prompts([9, 12])
    for result in engine.generate(
        prompts, max_new_tokens=200, json_schema=json.dumps(schema), temperature=1.0, ignore_eos=False, sampling_seed=3
    ):
        assert result.finish_reason.type == "stop"
        value = json.loads(engine.scheduler.get_tokenizer().decode(result.token_ids, skip_special_tokens=True))
        assert set(value) == {"alive", "runners"} and 0 <= value["runners"] <= 99


def test_a_grammar_that_cannot_be_compiled_is_a_bad_request(engine):
    result = engine.generate([[5, 6]], max_new_tokens=5, regex="(unclosed")[0]
    assert result.finish_reason.type == "abort" and result.finish_reason.status_code == 400
    assert "regex" in result.finish_reason.message


def test_a_prompt_beyond_the_limits_is_a_bad_request(folder):
    engine = EngineHarness(folder, max_total_tokens=64)
    result = engine.generate([[7] * 64])[0]
    assert result.finish_reason.status_code == 400 and "64 tokens" in result.finish_reason.message
    longest = engine.generate([[7] * 63], max_new_tokens=50)[0]
    assert len(longest.token_ids) == 1 and longest.finish_reason.type == "length"


def test_a_prompt_without_tokens_is_a_bad_request_whatever_it_asks_for(engine):
    for start in (None, 0, 5):
        result = engine.generate([[]], logprob_start_len=start)[0]
        assert result.finish_reason.status_code == 400 and "empty" in result.finish_reason.message


def test_a_full_queue_refuses(folder):
    engine = EngineHarness(folder, max_queued_requests=2, max_running_requests=1)
    results = engine.generate([[7] * 8] * 4, max_new_tokens=4)
    assert [result.finish_reason.type for result in results].count("abort") == 2
    assert {result.finish_reason.status_code for result in results} == {None, 503}


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_abort_frees_everything(folder, steps):
    engine = EngineHarness(folder, chunked_prefill_size=8)
    engine.submit("a", rm.random_prompts([60])[0], max_new_tokens=100)
    engine.submit("b", rm.random_prompts([12], seed=1)[0], max_new_tokens=20)
    for _ in range(steps):
        engine.step()
    engine.send(AbortReq(rid="a"))
    results = engine.run()
    assert results["a"].finish_reason.type == "abort"
    assert results["b"].finish_reason.type == "length" and len(results["b"].token_ids) == 20


def test_same_prompts_share_one_prefill(engine):
    prompt = rm.random_prompts([41])[0]
    results = engine.generate([prompt] * 5, max_new_tokens=2)
    assert sorted(result.cached_tokens for result in results) == [0, 40, 40, 40, 40]


def test_flush_cache_only_when_idle(engine):
    prompt = rm.random_prompts([20])[0]
    engine.submit("a", prompt, max_new_tokens=5)
    engine.step()
    engine.send(FlushCacheReqInput(request_id="busy"))
    engine.run()
    engine.send(GetInternalStateReq(request_id="before"))
    engine.send(FlushCacheReqInput(request_id="idle"))
    engine.send(GetInternalStateReq(request_id="after"))
    engine.step()
    busy, before, idle, after = engine.channel.replies
    assert not busy.success and idle.success
    assert before.num_cached_tokens == 24 and after.num_cached_tokens == 0
    assert engine.generate([prompt])[0].cached_tokens == 0


def test_eviction_keeps_the_cache_within_its_size(folder):
    engine = EngineHarness(folder, max_total_tokens=256)
    for seed in range(12):
        engine.generate(rm.random_prompts([50, 30], seed=seed), max_new_tokens=8)
    assert engine.scheduler.caches[0].tree.num_evictable_pages <= 64


def test_streamed_outputs_come_token_by_token(folder):
    engine = EngineHarness(folder, stream_interval=3)
    engine.submit("a", [9] * 10, max_new_tokens=8, stream=True, return_logprob=True)
    engine.run()
    sizes = [len(output.token_ids) for output in engine.channel.outputs]
    assert sizes == [1, 3, 3, 1]
    assert all(len(output.output_logprobs.logprobs) == len(output.token_ids) for output in engine.channel.outputs)


def test_memory_does_not_grow_with_the_passes(engine, monkeypatch):
    """Nobody asks for the throughput meanwhile.

    Python remembers attributes by the address of their name, and torch makes the names anew with each call: until that
    cache of 4096 places is full, every pass adds to it. How full it is depends on what has run before.
    """
    monkeypatch.setattr(throughput, "WINDOW_S", 0.0)

    def run() -> int:
        for number in range(12):
            engine.generate([[5, 6, number]], max_new_tokens=20)
            engine.channel.outputs.clear()
        gc.collect()
        sys._clear_type_cache()
        return tracemalloc.get_traced_memory()[0]

    run()
    tracemalloc.start()
    try:
        before, after = run(), run()
    finally:
        tracemalloc.stop()
    assert after - before < 8_000, "240 passes more"


def test_who_waits_has_an_age_until_it_runs_or_leaves(folder):
    engine = EngineHarness(folder, max_running_requests=1)

    def oldest_s():
        engine.channel.replies.clear()
        engine.loop.handle(GetInternalStateReq(request_id="q"))
        return engine.channel.replies[0].queue_oldest_s

    engine.submit("runs", rm.random_prompts([5])[0], max_new_tokens=40)
    engine.step()
    assert oldest_s() == 0.0
    engine.submit("waits", rm.random_prompts([5])[0], max_new_tokens=2)
    engine.submit("compiles", rm.random_prompts([5])[0], max_new_tokens=2, regex="a+")
    engine.step()
    first_s = oldest_s()
    engine.step()
    assert 0.0 < first_s < oldest_s()
    engine.send(AbortReq(rid="waits"))
    engine.send(AbortReq(rid="compiles"))
    engine.step()
    assert oldest_s() == 0.0
    left = {output.rid: output for output in engine.channel.outputs}
    assert left["waits"].queue_time_s > first_s and left["compiles"].queue_time_s > 0.0
    engine.run()
