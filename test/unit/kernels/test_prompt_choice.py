"""Which kernels compute long prompts: those that are installed are tried beside Ramet's, once, in a quiet moment."""

import contextlib
import dataclasses
import logging
import sys
import threading
from types import SimpleNamespace

import fake_cudnn
import fake_flash_attention
import pytest
import torch
from attention_case import Case
from ramet.srt.batch.batch_plan import BatchPlan
from ramet.srt.layers.attention.base_attn_backend import PassLimits
from ramet.srt.layers.attention.prompts import choice, cudnn_prompts
from ramet.srt.layers.attention.prompts.choice import PromptChoice
from ramet.srt.layers.attention.prompts.cudnn_prompts import CudnnPrompts
from ramet.srt.layers.attention.prompts.flash_prompts import FlashPrompts

LIMITS = PassLimits(max_tokens=16, max_keys=32, num_pages=80)
TIMEOUT_S = 30


class Broken(FlashPrompts):
    name = "broken"

    def __init__(self, spec, limits):
        raise RuntimeError("no plan\nfor this shape")


class Wrong(FlashPrompts):
    """Of several chunks the last is left out."""

    name = "wrong"

    def run(self, q, k_cache, v_cache, window, out):
        super().run(q, k_cache, v_cache, window, out)
        if len(self._ends) > 1:
            out[int(self._starts[-2]) :] = 0.0


class Absent(FlashPrompts):
    name = "absent"

    @staticmethod
    def obstacle(spec):
        return "something"

    def __init__(self, spec, limits):
        raise AssertionError("it can't be made")


@pytest.fixture
def case(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash_attention)
    monkeypatch.setattr(cudnn_prompts, "MIN_ALONE_TOKENS", 16)
    monkeypatch.setattr(choice, "NUM_TRIALS", 1)
    monkeypatch.setattr(choice, "_beside_passes", lambda device: torch.cuda.device(-1))
    for kind in (CudnnPrompts, FlashPrompts):
        monkeypatch.setattr(kind, "obstacle", staticmethod(lambda spec: None))
    return Case(device, [(0, 17)], (2, 1, 16), window=9, dtype=torch.float16)


@pytest.fixture
def choose(case, monkeypatch, caplog):
    """What is chosen of some candidates, with what is said; each is given with seconds, Ramet's take 1."""
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    def run(*candidates):
        now = []
        for candidate, seconds in candidates:
            run_kernel = candidate.run

            def timed(self, *args, run_kernel=run_kernel, seconds=seconds):
                now.append(seconds)
                run_kernel(self, *args)

            monkeypatch.setattr(candidate, "run", timed)

        def measure(run):
            now[:] = [1.0]
            run()
            return now[-1]

        monkeypatch.setattr(choice, "_seconds", measure)
        monkeypatch.setattr(choice, "CANDIDATES", tuple(candidate for candidate, _ in candidates))
        backend = TritonAttnBackend(case.spec, case.pool)
        with caplog.at_level(logging.INFO, choice.logger.name):
            made = PromptChoice(case.spec, LIMITS, backend.plan_prompts)
            made.wait(TIMEOUT_S)
        chosen = made.chosen.name if made.chosen is not None else None
        return chosen, [record.getMessage() for record in caplog.records]

    return run


def test_the_fastest_is_taken(choose):
    chosen, said = choose((CudnnPrompts, 0.7), (FlashPrompts, 0.6), (Absent, 0.1))
    assert chosen == "flash_attention_3"
    assert said == [
        "prompt attention: cudnn takes 700.000 ms, Triton 1000.000",
        "prompt attention: flash_attention_3 takes 600.000 ms, Triton 1000.000",
        "prompt chunks of long passes are computed by flash_attention_3",
    ]


def test_the_first_stays_where_the_second_is_no_faster(choose):
    assert choose((CudnnPrompts, 0.7), (FlashPrompts, 0.7))[0] == "cudnn"


@pytest.mark.parametrize("seconds", [0.99, 1.0, 3.0])
def test_ramets_own_stay_where_nothing_is_gained(choose, seconds):
    chosen, said = choose((CudnnPrompts, seconds))
    assert chosen is None and len(said) == 1


def test_what_raises_or_differs_is_named_and_not_used(choose):
    chosen, said = choose((Broken, 0.1), (Wrong, 0.1), (CudnnPrompts, 0.5))
    assert chosen == "cudnn"
    assert said[0] == "prompt attention: broken is not used: no plan for this shape"
    assert said[1].startswith("prompt attention: wrong is not used: its results differ from Triton's by ")


def test_nothing_is_measured_where_sequences_are_short(choose, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMITS", PassLimits(max_tokens=8, max_keys=16, num_pages=80))
    chosen, said = choose((FlashPrompts, 0.1))
    assert chosen is None and "too short" in said[0]


def test_passes_go_on_while_the_choice_is_made(case, choose, monkeypatch):
    """The trial has a backend of its own, and what a pass has begun with it ends with."""
    from ramet.srt.layers.attention import triton_backend
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    monkeypatch.setattr(triton_backend, "MIN_PROMPT_TOKENS", 1)
    monkeypatch.setattr(choice, "CANDIDATES", (FlashPrompts,))
    monkeypatch.setattr(choice, "_seconds", lambda run: (run(), next(seconds))[1])
    seconds, is_in_trial, may_go_on = iter([1.0, 0.5]), threading.Event(), threading.Event()
    check = choice._check

    def wait(*args):
        is_in_trial.set()
        assert may_go_on.wait(TIMEOUT_S)
        check(*args)

    monkeypatch.setattr(choice, "_check", wait)
    backend = TritonAttnBackend(case.spec, case.pool)
    backend.use_quiet_moment(LIMITS)
    assert is_in_trial.wait(TIMEOUT_S)
    trial = backend._choice
    backend.use_quiet_moment(LIMITS)
    assert backend._choice is trial, "one trial is enough"
    case.check_made(backend)
    assert backend._prompts is None
    backend.init_forward_metadata(case.batch)
    may_go_on.set()
    backend._choice.wait(TIMEOUT_S)
    assert isinstance(backend._choice.chosen, FlashPrompts)
    out = case.layer(case.q, case.batch)
    case.check_made(backend)
    assert backend._prompts is backend._choice.chosen
    case.compare(out, case.native())


def test_the_thread_takes_the_ranks_gpu_and_waits_for_what_is_queued_there(case, monkeypatch):
    calls = []
    monkeypatch.setattr(choice, "CANDIDATES", (Absent,))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    spec = dataclasses.replace(case.spec, device=torch.device("cuda", 1))
    assert PromptChoice(spec, LIMITS, None).wait(TIMEOUT_S)
    assert calls == [torch.device("cuda", 1)]
    monkeypatch.undo()
    own = SimpleNamespace(wait_stream=calls.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream of the passes")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    with choice._beside_passes("cuda:1"):
        assert calls[1:] == ["the stream of the passes"]


def test_nothing_is_planned_in_the_time_that_is_measured(case, monkeypatch):
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    order = []
    backend = TritonAttnBackend(case.spec, case.pool)

    def plan(chunks, table):
        order.append(f"plan {len(chunks.rows)}")
        return backend.plan_prompts(chunks, table)

    monkeypatch.setattr(choice, "CANDIDATES", (FlashPrompts,))
    monkeypatch.setattr(choice, "_seconds", lambda run: (order.append("begin"), run(), order.append("end"), 1.0)[3])
    PromptChoice(case.spec, LIMITS, plan).wait(TIMEOUT_S)
    assert order == ["plan 3", "plan 1", "begin", "end", "begin", "end"]


@pytest.mark.parametrize("name, asleep, times", [("auto", False, 1), ("triton", False, 0), ("auto", True, 0)])
def test_only_an_engine_that_may_choose_does(name, asleep, times, monkeypatch):
    from ramet.srt.model_executor.model_runner import ModelRunner

    asked = []
    runner = SimpleNamespace(
        config=SimpleNamespace(attention_backend=name, max_prefill_tokens=4096),
        page_size=16,
        max_req_len=1000,
        max_total_num_tokens=1600,
        windows=None,
        req_pool=SimpleNamespace(req_to_page=torch.zeros(3, 63)),
        attn_backend=SimpleNamespace(use_quiet_moment=asked.append),
        kv_pool=SimpleNamespace(is_put_away=asleep),
    )
    ModelRunner.use_quiet_moment(runner)
    assert asked == [PassLimits(max_tokens=1000, max_keys=1008, num_pages=101)] * times


def test_leader_and_followers_look_for_faster_ways_when_nothing_is_to_do():
    from ramet.srt.managers.follower import Follower
    from ramet.srt.managers.scheduler_loop import SchedulerLoop

    moments, inbox = [], []
    runner = SimpleNamespace(use_quiet_moment=lambda: moments.append(len(ran)))
    ran = []
    plans = SimpleNamespace(receive=lambda timeout_s: inbox.pop(0) if inbox else None)
    follower = Follower(SimpleNamespace(model_runner=runner), ran.append, plans, 4, lambda: None)
    scheduler = SimpleNamespace(
        can_go_on=False, spare_s=lambda: 0.0, use_quiet_moment=runner.use_quiet_moment, check_caches=lambda: None
    )
    leader = SimpleNamespace(
        scheduler=scheduler,
        has_work=False,
        _lora=(),
        _weight_updates=SimpleNamespace(is_busy=False, is_joining=False),
        _load_log=SimpleNamespace(note=lambda batch: None),
        _channel=SimpleNamespace(receive=lambda timeout_s: inbox[:1] and [inbox.pop(0)]),
        handle=ran.append,
        step=lambda: None,
    )
    plan = BatchPlan(sequences=[], page_writes=[], new_states=[], ended_rids=[], grammar_masks={})
    for run_once in (follower.run_once, lambda: SchedulerLoop.run_once(leader)):
        ran.clear()
        inbox.append(plan)
        run_once()
        assert ran == [plan] and not moments, "there was something to do"
        run_once()
        assert moments == [1]
        moments.clear()
    leader.has_work, scheduler.passes = True, True
    SchedulerLoop.run_once(leader)
    assert not moments, "requests run"
