"""A rank's memberships in trainers' groups: what leaves, what takes the place of what, and what is expected to come."""

import threading

import msgspec
import pytest
import torch
from ramet.srt.model_executor import trainer_groups
from ramet.srt.model_executor.trainer_groups import TrainerGroups, expected_broadcasts
from ramet.srt.weights.update_messages import BroadcastTensors, JoinGroupReq


class FakeReceiver:
    """Joins when it is told to, and receives counting bytes."""

    def __init__(self):
        self.may_join = threading.Event()
        self.closed = threading.Event()
        self.place, self.fault, self.received = None, "", []

    def join(self, place):
        self.place = place
        self.may_join.wait(10)
        if self.closed.is_set():
            raise OSError("the group was left meanwhile")

    def receive(self, nbytes, timeout_s):
        if self.fault:
            raise OSError(self.fault)
        self.received.append(nbytes)
        return torch.arange(nbytes, dtype=torch.uint8)

    def close(self):
        self.closed.set()
        self.may_join.set()


@pytest.fixture
def receivers(monkeypatch):
    made = []

    def make():
        made.append(FakeReceiver())
        return made[-1]

    monkeypatch.setattr(trainer_groups, "GlooReceiver", make)
    return made


def request(number, name="group", **more):
    place = {"host": "127.0.0.1", "port": 1, "rank_offset": 4, "size": 8, "backend": "gloo"}
    return JoinGroupReq(request_id="", name=name, number=number, **place | more)


def joined(groups, receivers, number, name="group"):
    thread = threading.Thread(target=groups.join, args=(request(number, name),))
    thread.start()
    while len(receivers) < number:
        pass
    receivers[-1].may_join.set()
    thread.join()
    return receivers[-1]


SOURCE = BroadcastTensors(
    group="group", names=["a", "b", "c"], dtypes=["uint8", "float32", "bfloat16"], shapes=[[3], [2, 2], [4]]
)


def test_a_rank_has_its_number_behind_the_offset_and_names_are_torchs_alone(receivers):
    groups = TrainerGroups(2, torch.device("cpu"))
    assert joined(groups, receivers, 1).place.rank == 6 and receivers[0].place.name == "group"
    groups.leave("group", 1)
    assert receivers[0].closed.is_set()
    with pytest.raises(ValueError, match="there is no group 'group' with a trainer"):
        list(groups.receive(SOURCE))
    with pytest.raises(ValueError, match="can't be joined, one with gloo can"):
        groups.join(request(2, backend="nccl"))


def test_a_new_group_takes_the_place_of_one_and_is_not_left_in_its_stead(receivers):
    groups = TrainerGroups(0, torch.device("cpu"))
    errors = []

    def join():
        try:
            groups.join(request(1))
        except OSError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=join)
    waiting.start()
    while not receivers:
        pass
    second = joined(groups, receivers, 2)
    waiting.join()
    assert errors == ["the group 'group' can't be joined: the group was left meanwhile"]
    groups.leave("group", 1)
    assert not second.closed.is_set()
    groups.close()
    assert second.closed.is_set()


def test_a_group_that_was_left_before_it_was_joined_is_not_joined(receivers):
    groups = TrainerGroups(0, torch.device("cpu"))
    groups.leave("group", 7)
    with pytest.raises(OSError, match="was left meanwhile"):
        groups.join(request(7))
    assert receivers[0].closed.is_set()


def test_tensors_are_cut_out_of_what_comes(receivers):
    groups = TrainerGroups(0, torch.device("cpu"))
    receiver = joined(groups, receivers, 1)
    bucket = msgspec.structs.replace(SOURCE, bucket_nbytes=99)
    for source, sizes in ((SOURCE, [3, 16, 8]), (bucket, [27])):
        receiver.received.clear()
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in groups.receive(source)}
        assert receiver.received == sizes
        assert tensors == {"a": (torch.uint8, (3,)), "b": (torch.float32, (2, 2)), "c": (torch.bfloat16, (4,))}
    found = dict(groups.receive(bucket))
    assert bytes(found["b"].view(torch.uint8).flatten().tolist()) == bytes(range(3, 19))


@pytest.mark.parametrize(
    ("nbytes", "sizes"), [(None, [3, 16, 8]), (2, [3, 16, 8]), (3, [19, 8]), (18, [19, 8]), (19, [27])]
)
def test_a_broadcast_ends_with_the_tensor_that_exceeds_the_buffer(nbytes, sizes):
    """As vLLM's trainers pack them."""
    source = msgspec.structs.replace(SOURCE, bucket_nbytes=nbytes)
    assert [sum(one.nbytes for one in broadcast) for broadcast in expected_broadcasts(source)] == sizes


def test_the_rest_is_received_when_a_tensor_is_refused_and_a_failure_leaves_the_group(receivers):
    groups = TrainerGroups(0, torch.device("cpu"))
    receiver = joined(groups, receivers, 1)
    tensors = groups.receive(SOURCE)
    next(tensors)
    tensors.close()
    assert receiver.received == [3, 16, 8] and not receiver.closed.is_set()
    receiver.fault = "nothing came"
    with pytest.raises(OSError, match="a did not come, and the group 'group' is left: nothing came"):
        list(groups.receive(SOURCE))
    assert receiver.closed.is_set()


def test_what_was_sent_with_a_call_that_was_refused_is_not_taken_for_the_next_ones(receivers):
    """It lies in the sockets: bytes of the step before, of the same sizes."""
    groups = TrainerGroups(0, torch.device("cpu"))
    receiver = joined(groups, receivers, 1)
    for call in (1, 2):
        list(groups.receive(msgspec.structs.replace(SOURCE, call=call)))
    receiver.received.clear()
    with pytest.raises(
        OSError, match="with 1 calls that were refused has not been received: the group 'group' is left"
    ):
        list(groups.receive(msgspec.structs.replace(SOURCE, call=4)))
    assert receiver.closed.is_set() and not receiver.received
    joined(groups, receivers, 2)
    list(groups.receive(msgspec.structs.replace(SOURCE, call=1)))
