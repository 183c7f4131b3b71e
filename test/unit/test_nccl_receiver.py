"""Members of trainers' NCCL groups without a GPU: gloo stands in for torch's NCCL, and a fake for the library."""

import ctypes
import pickle
import threading
import time

import pytest
import torch
from ramet.srt.distributed import nccl_library, pair_group
from ramet.srt.distributed.nccl_receiver import UNIQUE_ID_KEY, NcclReceiver, StatelessReceiver, read_unique_id
from ramet.srt.distributed.receiver_messages import Place
from safetensors.torch import load_file, save_file
from trainers import Trainer, pickled_unique_id

CPU = torch.device("cpu")
UNIQUE_ID = bytes(range(128))


def place(port, name="group", timeout_s=30.0):
    return Place(host="127.0.0.1", port=port, rank=1, size=2, name=name, timeout_s=timeout_s)


def test_a_group_of_torchs_receives_until_its_trainer_dies(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(40, 30).bfloat16(), "b": torch.randn(7)}, path)
    with Trainer() as trainer:
        receiver = NcclReceiver(CPU)
        trainer.join(2, "group")
        receiver.join(place(trainer.port))
        trainer.send(path)
        for tensor in load_file(path).values():
            assert torch.equal(receiver.receive(tensor.nbytes, 30.0), tensor.view(torch.uint8).view(-1))
        trainer.send(path, ["a"], more=-8)
        with pytest.raises(OSError, match="fewer bytes"):
            receiver.receive(2400, 30.0)
        with pytest.raises(OSError):
            receiver.receive(8, 0.3)
        threading.Timer(0.2, trainer.process.kill).start()
        with pytest.raises(OSError, match="the other side has gone"):
            receiver.receive(8, 30.0)
        receiver.close()
        with pytest.raises(OSError, match="was left meanwhile"):
            receiver.receive(8, 30.0)


class FakeNccl:
    """As much of NCCL as one member needs, which is given `content` by the others. Each call takes some polls."""

    def __init__(self, content=b"", polls=2, failure=0):
        self.content, self.polls, self.failure = content, polls, failure
        self.calls = []
        self._left = 0

    def _begin(self, *call):
        self.calls.append(call)
        self._left = self.polls
        return nccl_library.IN_PROGRESS

    def ncclCommInitRankConfig(self, handle, size, unique_id, rank, config):
        handle._obj.value = 4711
        assert config._obj.size == 24 and config._obj.magic == 0xCAFEBEEF and config._obj.blocking == 0
        return self._begin("init", size, bytes(unique_id), rank)

    def ncclCommGetAsyncError(self, handle, state):
        self._left -= 1
        state._obj.value = self.failure or (nccl_library.IN_PROGRESS if self._left > 0 else nccl_library.SUCCESS)
        return nccl_library.SUCCESS

    def ncclAllReduce(self, source, target, count, dtype, op, handle, stream):
        assert source == target
        return self._begin("sum", count, dtype, op)

    def ncclBroadcast(self, source, target, count, dtype, root, handle, stream):
        assert source == target and handle.value == 4711
        ctypes.memmove(target, self.content, min(count, len(self.content)))
        return self._begin("broadcast", count, dtype, root)

    def ncclCommAbort(self, handle):
        self.calls.append(("abort", handle.value))

    def ncclGetErrorString(self, result):
        return b"unhandled system error"


@pytest.fixture
def store():
    listener = pair_group.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    store = pair_group.open_store(listener, "127.0.0.1", 10)
    return store, port


def test_a_group_of_vllms_is_joined_by_its_id_warmed_up_and_left(store):
    store, port = store
    content = bytes(range(40))
    library = FakeNccl(content)
    receiver = StatelessReceiver(CPU, library)
    threading.Timer(0.3, store.set, (UNIQUE_ID_KEY, pickled_unique_id(UNIQUE_ID))).start()
    receiver.join(place(port, ""))
    assert bytes(receiver.receive(40, 5.0).tolist()) == content
    with pytest.raises(OSError, match="fewer bytes"):
        receiver.receive(48, 5.0)
    receiver.close()
    while ("abort", 4711) not in library.calls:
        time.sleep(0.01)
    assert library.calls == [
        ("init", 2, UNIQUE_ID, 1),
        ("sum", 1, nccl_library.FLOAT32, nccl_library.SUM),
        ("broadcast", 40, nccl_library.UINT8, 0),
        ("broadcast", 48, nccl_library.UINT8, 0),
        ("abort", 4711),
    ]


def test_what_is_broken_off_has_not_come(store):
    """NCCL ends what it was at then, and the GPU knows no difference."""
    store, port = store
    store.set(UNIQUE_ID_KEY, pickled_unique_id(UNIQUE_ID))
    library = FakeNccl(bytes(40))
    receiver = StatelessReceiver(CPU, library)
    receiver.join(place(port, ""))
    begin = library.ncclBroadcast
    library.ncclBroadcast = lambda *call: receiver.close() or begin(*call)
    with pytest.raises(OSError, match="was left meanwhile"):
        receiver.receive(40, 5.0)


@pytest.mark.parametrize(
    ("library", "words"),
    [(FakeNccl(polls=1 << 40), "no progress within"), (FakeNccl(failure=2), "NCCL: unhandled system error")],
)
def test_nccl_that_hangs_or_fails_is_an_error(store, library, words):
    store, port = store
    store.set(UNIQUE_ID_KEY, pickled_unique_id(UNIQUE_ID))
    with pytest.raises(OSError, match=words):
        StatelessReceiver(CPU, library).join(place(port, "", timeout_s=1.0))
    assert library.calls[-1] == ("abort", 4711)


def test_only_an_id_is_unpickled():
    assert read_unique_id(pickled_unique_id(UNIQUE_ID)) == UNIQUE_ID
    far = b"\x80\x04\x8c\x00r\xff\xff\xff\xff."  # for whose place Python's own unpickler takes 64 GB
    for data in (pickle.dumps(print), pickle.dumps(17), b"", b"nonsense", pickled_unique_id(UNIQUE_ID, "other"), far):
        with pytest.raises(OSError, match="something else than a unique id"):
            read_unique_id(data)
    with pytest.raises(OSError, match="has 128 bytes, and this one 3"):
        nccl_library.Communicator(FakeNccl(), b"123", 1, 2, 1.0)
