"""Plans to a replica's other ranks and results back: who talks to whom, in which order, and what if nothing comes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import zmq
from ramet.srt.batch.batch_plan import BatchPlan, BatchResult, SequencePlan
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.managers.io_struct import StartProfileReqInput, StopProfileReqInput
from ramet.srt.managers.plan_channel import PLANS_KEY, RESULTS_KEY, PlanReceiver, PlanSender

TIMEOUT_S = 10.0
STOP = StopProfileReqInput(request_id="stop")
START = StartProfileReqInput(
    request_id="start",
    profile_id="id",
    output_dir="/tmp",
    num_steps=3,
    activities=["CPU"],
    with_stack=False,
    record_shapes=True,
)


class Board:
    """Stands in for the rendezvous: what each rank puts, the others get."""

    def __init__(self):
        self.values = {}

    def of_rank(self, world_rank):
        rendezvous = BoardOfRank()
        rendezvous.world_rank, rendezvous.values = world_rank, self.values
        return rendezvous


class BoardOfRank:
    def put(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]


class Replica:
    """The channels of an instance's ranks: all open first, then all connect."""

    def __init__(self, address, **sizes):
        self.board = Board()
        world_size = sizes.get("tp_size", 1) * sizes.get("pp_size", 1) * sizes.get("dp_size", 1)
        self.ranks = [ParallelConfig.of_rank(rank, **sizes) for rank in range(world_size)]
        self.senders, self.receivers, self.results = {}, {}, {}
        for rank, parallel in enumerate(self.ranks):
            if rank == parallel.leader_rank:
                self.senders[rank] = PlanSender(self.board.of_rank(rank), address)
            else:
                self.receivers[rank] = PlanReceiver(self.board.of_rank(rank), address)
        for rank, sender in self.senders.items():
            sender.connect(self.ranks[rank])
        for rank, receiver in self.receivers.items():
            if rank == self.ranks[rank].sampling_rank:
                self.results[rank] = receiver.open_results(self.ranks[rank])

    def close(self):
        for channel in (*self.senders.values(), *self.receivers.values()):
            channel.close()


@pytest.fixture(params=["folder", "127.0.0.1"])
def make_replica(request, tmp_path_factory):
    address = str(tmp_path_factory.mktemp("s")) if request.param == "folder" else request.param
    replicas = []

    def make(**sizes):
        replicas.append(Replica(address, **sizes))
        return replicas[-1]

    yield make
    for replica in replicas:
        replica.close()


def make_plan(number):
    sequence = SequencePlan(rid=str(number), row=0, start=number, input_ids=[number], is_sampled=True)
    return BatchPlan(
        sequences=[sequence],
        page_writes=[],
        new_states=[],
        ended_rids=[],
        grammar_masks={"a": b"\x01\x00"},
    )


def make_result(number):
    return BatchResult(token_ids=[number], output_logprobs={}, prompt_logprobs={})


def test_every_follower_gets_every_message_in_order(make_replica):
    """What belongs between two passes comes between their plans, on every rank."""
    replica = make_replica(tp_size=3)
    messages = [make_plan(0), START, make_plan(1), make_plan(2), STOP, *(make_plan(number) for number in range(3, 100))]
    for message in messages:
        replica.senders[0].send(message)
    for receiver in replica.receivers.values():
        assert [receiver.receive(TIMEOUT_S) for _ in messages] == messages


def test_results_come_in_the_order_of_the_plans(make_replica):
    replica = make_replica(pp_size=2)

    def follow():
        for _ in range(50):
            plan = replica.receivers[1].receive(TIMEOUT_S)
            replica.results[1].send(make_result(plan.sequences[0].start))

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        for number in range(50):
            replica.senders[0].send(make_plan(number))
        results = [replica.senders[0].receive(TIMEOUT_S) for _ in range(50)]
        following.result(TIMEOUT_S)
    assert results == [make_result(number) for number in range(50)]


def test_each_replica_has_its_own_leader(make_replica):
    replica = make_replica(dp_size=2, pp_size=2, tp_size=2)
    assert sorted(replica.senders) == [0, 4] and sorted(replica.results) == [2, 6]
    for leader in (0, 4):
        replica.senders[leader].send(make_plan(leader))
    for rank, receiver in replica.receivers.items():
        assert receiver.receive(TIMEOUT_S) == make_plan(rank // 4 * 4)
        assert receiver.receive(0.0) is None
    for rank, results in replica.results.items():
        results.send(make_result(rank))
    assert replica.senders[0].receive(TIMEOUT_S) == make_result(2)
    assert replica.senders[4].receive(TIMEOUT_S) == make_result(6)


def test_a_leader_alone_sends_to_nobody(make_replica):
    replica = make_replica(dp_size=2)
    assert not replica.receivers
    replica.senders[0].send(make_plan(0))
    assert replica.senders[1].receive(0.0) is None


@pytest.mark.parametrize("timeout_s", [0.0, 0.02])
def test_without_a_message_waiting_ends_in_time(make_replica, timeout_s):
    replica = make_replica(pp_size=2)
    began = time.monotonic()
    assert replica.receivers[1].receive(timeout_s) is None and replica.senders[0].receive(timeout_s) is None
    assert 2 * (timeout_s - 0.001) <= time.monotonic() - began < TIMEOUT_S  # ZeroMQ counts whole milliseconds


def test_waiting_ends_with_the_message(make_replica):
    replica = make_replica(pp_size=2)
    timer = threading.Timer(0.05, replica.senders[0].send, [make_plan(7)])
    timer.start()
    began = time.monotonic()
    assert replica.receivers[1].receive(TIMEOUT_S) == make_plan(7)
    assert time.monotonic() - began < TIMEOUT_S
    timer.join()


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"type": "AbortReq"}), b"[1, 2]"])
def test_what_is_no_plan_and_no_result_is_an_error(make_replica, data):
    replica = make_replica(pp_size=2)
    context = zmq.Context()
    try:
        for key in (f"{PLANS_KEY}/1", f"{RESULTS_KEY}/0"):
            socket = context.socket(zmq.PUSH)
            socket.connect(replica.board.values[key])
            socket.send(data)
        with pytest.raises(msgspec.DecodeError):
            replica.receivers[1].receive(TIMEOUT_S)
        with pytest.raises(msgspec.DecodeError):
            replica.senders[0].receive(TIMEOUT_S)
    finally:
        context.destroy(linger=0)
