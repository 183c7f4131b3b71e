"""The two kinds of passes under way: when their results are dealt with, and what the watchdog sees meanwhile."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from ramet.srt.batch.batch_plan import BatchResult
from ramet.srt.managers.passes import LocalPasses, PipelinePasses, make_passes


class Request:
    def __init__(self, num_remaining_tokens=5, num_pending=0, grammar=None):
        self.num_remaining_tokens = num_remaining_tokens
        self.num_pending = num_pending
        self.req = SimpleNamespace(grammar=grammar)


@dataclass(frozen=True)
class Batch:
    plan: int
    num_tokens: int = 1
    num_prompt_tokens: int = 0


class Worker:
    """Has the result of a pass, which is its plan, when the test asks; `on_wait` is called in between."""

    def __init__(self):
        self.launched = []
        self.on_launch = self.on_wait = lambda: None

    def launch(self, plan):
        self.on_launch()
        self.launched.append(plan)

    def launch_for_result(self, plan):
        self.launch(plan)
        return lambda: self.on_wait() or result_of(plan)


class Sender:
    """Its results come in the order in which the test adds them."""

    def __init__(self):
        self.sent, self.results, self.timeouts = [], [], []

    def send(self, message):
        self.sent.append(message)

    def receive(self, timeout_s):
        self.timeouts.append(timeout_s)
        return self.results.pop(0) if self.results else None


def result_of(plan):
    return BatchResult(token_ids=[plan], output_logprobs={}, prompt_logprobs={})


def launch(passes, plan):
    passes.launch(Batch(plan), plan)


def plans(finished):
    found = list(finished)
    assert all(one.result == result_of(one.plan) and one.batch == Batch(one.plan) for one in found)
    return [one.plan for one in found]


@pytest.mark.parametrize(
    "sender, num_stages, kind", [(None, 1, LocalPasses), (Sender(), 1, LocalPasses), (Sender(), 3, PipelinePasses)]
)
def test_who_chooses_the_tokens_decides_the_kind(sender, num_stages, kind):
    passes = make_passes(Worker(), sender, num_stages, overlap=False)
    assert type(passes) is kind and not passes and passes.has_room
    passes.tell("a message")
    assert sender is None or sender.sent == ["a message"]


def test_a_pass_goes_to_all_ranks():
    worker, sender = Worker(), Sender()
    for num_stages in (1, 2):
        launch(make_passes(worker, sender, num_stages, overlap=False), num_stages)
    assert sender.sent == worker.launched == [1, 2]


def test_without_overlap_a_pass_ends_before_the_next_is_planned():
    passes = make_passes(Worker(), None, 1, overlap=False)
    launch(passes, 1)
    assert plans(passes.results(has_launched=True)) == [1] and not passes


def test_with_overlap_the_newest_stays_under_way_while_there_is_another_to_launch():
    passes = make_passes(Worker(), None, 1, overlap=True)
    launch(passes, 1)
    assert plans(passes.results(has_launched=True)) == []
    launch(passes, 2)
    assert not passes.has_room
    assert plans(passes.results(has_launched=True)) == [1]
    assert plans(passes.results(has_launched=False)) == [2] and not passes


def test_settling_leaves_nothing_under_way():
    passes = make_passes(Worker(), None, 1, overlap=True)
    launch(passes, 1)
    launch(passes, 2)
    assert plans(passes.settle()) == [1, 2] and not passes


def test_who_ends_with_the_pass_under_way_is_not_decoded_again():
    passes = make_passes(Worker(), None, 1, overlap=True)
    running = [Request(), Request(num_remaining_tokens=0, num_pending=1), Request(num_pending=1)]
    assert passes.decodable(running) == [running[0], running[2]]


def test_a_constraint_takes_its_token_before_the_next_is_chosen():
    passes = make_passes(Worker(), None, 1, overlap=True)
    running = [Request(grammar=object()), Request(num_pending=1, grammar=object())]
    assert passes.decodable(running) == [running[0]]


def test_a_pipeline_has_a_pass_for_each_stage_and_takes_results_one_by_one():
    sender = Sender()
    passes = make_passes(Worker(), sender, 3, overlap=True)
    for plan in (1, 2, 3):
        assert passes.has_room
        launch(passes, plan)
        assert plans(passes.results(has_launched=True)) == []
    assert not passes.has_room and plans(passes.settle()) == []
    sender.results = [result_of(1), result_of(2)]
    assert plans(passes.results(has_launched=False)) == [1]
    assert plans(passes.results(has_launched=False)) == [2]
    assert plans(passes.results(has_launched=False)) == [] and len(passes) == 1
    assert sender.timeouts[:3] == [0.0] * 3 and min(sender.timeouts[3:]) > 0


def test_a_pipeline_with_nothing_under_way_waits_for_nothing():
    sender = Sender()
    assert plans(make_passes(Worker(), sender, 2, overlap=False).results(has_launched=False)) == []
    assert sender.timeouts == []


def test_each_stage_has_its_share_of_the_running_requests():
    passes = make_passes(Worker(), Sender(), 3, overlap=False)
    running = [Request(num_pending=number % 2) for number in range(8)]
    assert passes.decodable(running) == [running[0], running[2], running[4]]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_watchdog_sees_a_pass_that_hangs_wherever_it_does(num_stages):
    worker, sender = Worker(), Sender()
    passes = make_passes(worker, sender, num_stages, overlap=False)
    seen = []
    worker.on_launch = worker.on_wait = lambda: seen.append(passes.waiting_since)
    assert passes.waiting_since is None
    launch(passes, 1)
    sender.results = [result_of(1)]
    assert plans(passes.results(has_launched=True)) == [1]
    assert len(seen) == 3 - num_stages and None not in seen
    assert passes.waiting_since is None


def test_a_pass_counts_from_the_end_of_the_one_before_it():
    """Each stage computes one after the other: the second of two passes has not taken the time of both."""
    now = 100.0
    sender = Sender()
    passes = make_passes(Worker(), sender, 2, overlap=False, clock=lambda: now)
    launch(passes, 1)
    now = 101.0
    launch(passes, 2)
    assert passes.waiting_since == 100.0
    now, sender.results = 350.0, [result_of(1)]
    assert plans(passes.results(has_launched=False)) == [1] and passes.waiting_since == 350.0


def test_a_pass_says_how_long_it_took():
    """From its launch, or from the end of the one before it where that was later."""
    now = 100.0
    passes = make_passes(Worker(), None, 1, overlap=True, clock=lambda: now)
    launch(passes, 1)
    now = 101.0
    launch(passes, 2)
    now = 104.0
    assert next(passes.settle()).seconds == 4.0
    now = 106.0
    assert next(passes.settle()).seconds == 2.0
    now = 110.0
    launch(passes, 3)
    now = 111.5
    assert next(passes.settle()).seconds == 1.5


def test_only_with_overlap_and_without_a_pipeline_planning_can_wait():
    now, worker = 0.0, Worker()

    def compute():
        nonlocal now
        now += 0.04

    worker.on_wait = compute
    spare = {}
    for name, sender, num_stages, overlap in (
        ("overlap", None, 1, True),
        ("several ranks", Sender(), 1, True),
        ("no overlap", None, 1, False),
        ("pipeline", Sender(), 2, True),
    ):
        passes = make_passes(worker, sender, num_stages, overlap, clock=lambda: now)
        for plan in range(6):
            if num_stages == 2:
                compute()
                sender.results.append(result_of(plan))
            passes.begin_planning()
            launch(passes, plan)
            list(passes.results(has_launched=True))
        spare[name] = passes.spare_s()
    assert spare["overlap"] == pytest.approx(0.038) and spare["several ranks"] == pytest.approx(0.038)
    assert spare["no overlap"] == spare["pipeline"] == 0.0


def test_with_nothing_under_way_planning_waits_for_nothing():
    assert make_passes(Worker(), None, 1, overlap=True).spare_s() == 0.0
    assert make_passes(Worker(), None, 1, overlap=False).spare_s() == 0.0
