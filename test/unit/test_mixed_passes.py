"""Passes that hold prompt chunks and decoding requests side by side give what each request gets by itself."""

import time

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.batch.batch_plan import LAST_TOKEN
from ramet.srt.managers.io_struct import AbortReq
from ramet.srt.managers.passes import PipelinePasses

SHORT, LONG = rm.random_prompts([6, 9, 12]), rm.random_prompts([70, 45], seed=1)
PARAMS = [
    {},
    {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 3},
    {"repetition_penalty": 1.3, "min_new_tokens": 4},
    {"regex": "[a-z ]{3,20}", "ignore_eos": False, "sampling_seed": 1, "temperature": 0.5},
    {"logprob_start_len": 0, "top": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def alone(folder):
    """What a request gets by itself, each asked for once."""
    engine, known = EngineHarness(folder), {}

    def generate(prompt, **params):
        key = (*prompt, str(params))
        if key not in known:
            known[key] = engine.generate([prompt], **params)[0]
        return known[key]

    return generate


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def engine(request, folder):
    return EngineHarness(folder, overlap=request.param, chunked_prefill_size=8, max_total_tokens=512)


class Stages:
    """Stands in for a pipeline: a pass is computed at once, and its result comes when all stages have had it."""

    def __init__(self, worker, num_stages):
        self._worker = worker
        self._num_stages = num_stages
        self._results = []

    def send(self, message):
        """There is nobody else."""

    def launch(self, plan):
        self._results.append(self._worker.launch_for_result(plan)())

    def receive(self, timeout_s):
        is_through = timeout_s > 0 or len(self._results) == self._num_stages
        return self._results.pop(0) if is_through else None


def watch(engine, monkeypatch):
    """The plans of the passes to come."""
    plans = []
    plan = engine.scheduler.planner.plan
    monkeypatch.setattr(engine.scheduler.planner, "plan", lambda batch: plans.append(plan(batch)) or plans[-1])
    return plans


def run_mixed(engine, **params):
    """Long prompts come while short ones decode."""
    for index, prompt in enumerate(SHORT):
        engine.submit(f"short {index}", prompt, max_new_tokens=14, **params)
    for _ in range(5):
        engine.step()
    for index, prompt in enumerate(LONG):
        engine.submit(f"long {index}", prompt, max_new_tokens=5, **params)
    results = engine.run()
    names = [f"short {index}" for index in range(len(SHORT))] + [f"long {index}" for index in range(len(LONG))]
    return [results[name] for name in names]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_everyone_gets_what_he_gets_alone(engine, alone, params):
    expected = [alone(prompt, max_new_tokens=14, **params) for prompt in SHORT]
    expected += [alone(prompt, max_new_tokens=5, **params) for prompt in LONG]
    results = run_mixed(engine, **params)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.finish_reason for result in results] == [result.finish_reason for result in expected]
    for result, one in zip(results, expected, strict=True):
        assert result.output_logprobs == pytest.approx(one.output_logprobs, abs=1e-4)
        if one.input_logprobs is not None:
            assert result.input_logprobs.token_ids == one.input_logprobs.token_ids
            assert result.input_logprobs.logprobs[1:] == pytest.approx(one.input_logprobs.logprobs[1:], abs=1e-4)


def test_each_stage_has_decoding_requests_and_chunks_and_no_prompt_is_computed_out_of_order(folder, alone, monkeypatch):
    expected = [alone(prompt, max_new_tokens=14).token_ids for prompt in SHORT]
    expected += [alone(prompt, max_new_tokens=5).token_ids for prompt in LONG]
    engine = EngineHarness(folder, chunked_prefill_size=8)
    stages = Stages(engine.scheduler.worker, 3)
    engine.scheduler.passes = PipelinePasses(stages, stages, time.monotonic, 3)
    plans = watch(engine, monkeypatch)
    assert [result.token_ids for result in run_mixed(engine)] == expected
    ends = {}
    for sequence in (sequence for plan in plans for sequence in plan.sequences):
        assert sequence.start == ends.get(sequence.rid, 0)
        ends[sequence.rid] = sequence.start + len(sequence.input_ids)
    mixed = [plan for plan in plans if len({len(one.input_ids) > 1 for one in plan.sequences}) == 2]
    assert len(mixed) >= 5
    assert all(len(set(rids(plan))) == len(plan.sequences) for plan in plans)


def test_whoever_can_decode_is_in_every_pass(engine, monkeypatch):
    plans = watch(engine, monkeypatch)
    run_mixed(engine)
    first, last = ([index for index, plan in enumerate(plans) if "short 0" in rids(plan)][place] for place in (0, -1))
    assert all("short 0" in rids(plan) for plan in plans[first:last])
    mixed = [plan for plan in plans if not plan.is_decode and any(one.gains_a_token for one in plan.sequences)]
    assert len(mixed) >= 5
    for plan in mixed:
        decodes = [len(sequence.input_ids) == 1 and sequence.is_sampled for sequence in plan.sequences]
        assert decodes == sorted(decodes, reverse=True), "those that decode come first"
        chunks = [sequence for sequence, is_one in zip(plan.sequences, decodes, strict=True) if not is_one]
        assert sum(len(sequence.input_ids) for sequence in chunks) <= 8
    assert any(LAST_TOKEN in one.input_ids for plan in mixed for one in plan.sequences) == bool(
        engine.scheduler.config.overlap
    )


def test_several_prompts_are_in_progress_at_a_time(engine, monkeypatch):
    plans = watch(engine, monkeypatch)
    for index, prompt in enumerate(LONG):
        engine.submit(str(index), prompt, max_new_tokens=2)
    engine.run()
    assert [(one.rid, len(one.input_ids)) for one in plans[0].sequences] == [("0", 6), ("1", 2)]
    assert sorted(rids(plans[1])) == ["0", "1"]


@pytest.mark.parametrize("steps", [2, 5])
def test_an_abort_of_a_prompt_in_progress_leaves_the_others_alone(engine, steps):
    engine.submit("short", SHORT[0], max_new_tokens=12)
    for index, prompt in enumerate(LONG):
        engine.submit(f"long {index}", prompt, max_new_tokens=5)
    for _ in range(steps):
        engine.step()
    engine.send(AbortReq(rid="long 0"))
    results = engine.run()
    assert results["long 0"].finish_reason.type == "abort"
    assert len(results["short"].token_ids) == 12 and len(results["long 1"].token_ids) == 5


@pytest.mark.parametrize("params", [PARAMS[0], {"regex": "[a-z ]{90,99}", "ignore_eos": False}, PARAMS[4]], ids=str)
def test_who_has_to_give_way_gets_the_same_tokens(folder, alone, params):
    """The cache has room for the long prompts or for the tokens of the short ones."""
    prompts = [*SHORT, *LONG]
    expected = [alone(prompt, max_new_tokens=40, **params).token_ids for prompt in prompts]
    engine = EngineHarness(folder, overlap=True, chunked_prefill_size=4, max_total_tokens=144)
    engine.scheduler.admission.reserve.num_pages = lambda reqs, cache: len(reqs)
    results = engine.generate(prompts, max_new_tokens=40, **params)
    assert [result.token_ids for result in results] == expected
    assert engine.scheduler.running.num_retracted > 0


def test_a_prompt_in_progress_gives_way_when_that_costs_least(folder, alone, monkeypatch):
    engine = EngineHarness(folder, overlap=True, chunked_prefill_size=1, max_total_tokens=96)
    prompts = [SHORT[2], LONG[0][:60]]
    expected = [alone(prompt, max_new_tokens=30).token_ids for prompt in prompts]
    monkeypatch.setattr(engine.scheduler.admission.reserve, "num_pages", lambda reqs, cache: len(reqs))
    retracted = []
    running, retract = engine.scheduler.running, engine.scheduler.running._retract
    monkeypatch.setattr(running, "_retract", lambda one: retracted.append(len(one.req.output_ids)) or retract(one))
    engine.submit("short", prompts[0], max_new_tokens=30)
    for _ in range(20):
        engine.step()
    engine.submit("long", prompts[1], max_new_tokens=30)
    results = engine.run()
    assert [results[rid].token_ids for rid in ("short", "long")] == expected
    assert retracted[0] == 0 and results["long"].cached_tokens == 0


def test_the_budget_learns_from_the_passes(folder):
    engine = EngineHarness(folder, chunked_prefill_size=50)
    engine.generate(rm.random_prompts([60, 60]), max_new_tokens=3)
    assert engine.scheduler.budget.token_s > 0
    engine.scheduler.warm_up()
    assert engine.scheduler.budget.token_s == 0


def rids(plan):
    return [sequence.rid for sequence in plan.sequences]
