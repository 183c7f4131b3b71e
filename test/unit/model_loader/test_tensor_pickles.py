"""Pickles of tensors as torch and SGLang make them are read; whatever else is in one is refused before it is opened."""

import collections
import functools
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pickled_tensors import LocalSerializedTensor, flat_bucket, forked
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_executor.tensor_feeds import TensorFeeds
from ramet.srt.model_loader.checkpoint_engine import GivenUpError, _read_step
from ramet.srt.model_loader.tensor_memory import CudaMemory
from ramet.srt.model_loader.tensor_pickles import read_tensors
from ramet.srt.utils import pickled_values
from ramet.srt.utils.net import host_identity
from ramet.srt.utils.pickled_values import PickleError
from ramet.srt.weights.update_messages import PickledTensors


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _by_name() -> Any:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "plain": base.bfloat16(),
        "turned": base.t(),
        "part": base[2:5, ::2],
        "fp8": base.to(torch.float8_e4m3fn),
        "scale": torch.tensor(0.5),
        "none": torch.zeros(0, 3),
        "numbers": torch.arange(5),
        "bits": torch.arange(5, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(base[0], requires_grad=False),
    }


def read(payload: bytes, load_format: str | None = None, *, tp_rank: int = 0) -> dict[str, Any]:
    source = PickledTensors(payloads=[payload], load_format=load_format, host_identity=host_identity())
    feeds = TensorFeeds(ParallelConfig.of_rank(tp_rank, tp_size=2))
    return dict(feeds.open(source))


@pytest.mark.parametrize(
    "dump",
    [pickle.dumps, forked, saved, functools.partial(saved, _use_new_zipfile_serialization=False)],
    ids=["pickle", "shared", "archive", "old file"],
)
@pytest.mark.parametrize("kind", [list, collections.OrderedDict])
def test_tensors_come_out_as_they_went_in(dump: Any, kind: Any) -> None:
    tensors = make_tensors()
    found = read(dump(list(tensors.items()) if kind is list else kind(tensors)))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


def test_each_rank_takes_its_own_of_several() -> None:
    before = shared_files()
    tensors = [torch.full((3,), float(rank)) for rank in range(2)]
    payload = forked([("a", LocalSerializedTensor([forked(tensor) for tensor in tensors]))])
    for rank in range(2):
        assert torch.equal(read(payload, tp_rank=rank)["a"], tensors[rank])
    tensors.clear()
    assert shared_files() == before
    tensors = [torch.zeros(3)]
    with pytest.raises(ValueError, match="tensors for 1 ranks and none for rank 1"):
        read(forked([("a", LocalSerializedTensor([forked(tensors[0])]))]), tp_rank=1)


@pytest.mark.parametrize("is_bytes", [False, True])
def test_a_flat_bucket_is_taken_apart(is_bytes: bool) -> None:
    """Of one type, and of the bytes of several."""
    tensors = {"a": torch.randn(2, 3).bfloat16(), "b": torch.randn(4).bfloat16(), "c": torch.randn(3, 1)}
    if not is_bytes:
        del tensors["c"]
    bucket = flat_bucket(tensors, is_bytes=is_bytes)
    payload = forked(bucket)
    found = read(payload, "flattened_bucket")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="holds a flat bucket, but the load_format is None"):
        read(payload)
    with pytest.raises(ValueError, match="holds no flat bucket"):
        read(forked(list(tensors.items())), "flattened_bucket")
    bucket["metadata"][0].end_idx = len(bucket["flattened_tensor"]) + 1
    with pytest.raises(ValueError, match="reaches beyond its bucket"):
        read(forked(bucket), "flattened_bucket")


def shared_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")}


def test_shared_memory_is_given_back() -> None:
    """When the receiver has told that it has it, and both have let it go."""
    before = shared_files()
    tensor = torch.randn(64)
    payload = forked([("a", tensor)])
    assert shared_files() > before
    found = read(payload)
    assert torch.equal(found["a"], tensor)
    del found, tensor
    assert shared_files() == before


def test_memory_that_is_gone_or_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared_files()
    tensor = torch.randn(64)
    payload = forked([("a", tensor)])
    (name,) = shared_files() - before
    wrong = payload.replace(name.encode(), name.replace("torch_", "torch_9").encode()[: len(name)])
    with pytest.raises(ValueError, match="shared memory .* is gone"):
        read(wrong)
    assert payload.count(b"M\x00\x01") == 1  # 256 bytes
    larger = payload.replace(b"M\x00\x01", b"J\x00\x00\x10\x00"[:1] + struct.pack("<i", 1 << 20))
    with pytest.raises(ValueError, match="has .* bytes, not 1048576"):
        read(larger)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="is another user's"):
        read(payload)


def test_descriptors_are_refused_with_advice() -> None:
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    with pytest.raises(ValueError, match=r"must call .*set_sharing_strategy\('file_system'\) first"):
        read(forked([("a", torch.zeros(3))]))


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def lent(**changes: Any) -> Any:
    """What a process that lends a GPU's memory sends."""
    values = {
        "cls": torch.Tensor,
        "size": torch.Size((2, 3)),
        "stride": (3, 1),
        "offset": 0,
        "storage": torch.storage.TypedStorage,
        "dtype": torch.bfloat16,
        "device": 0,
        "handle": b"h" * 66,
        "nbytes": 12,
        "start": 0,
        "grad": False,
        "counter": b"/torch_1_2_3",
        "place": 4,
        "event": b"e" * 64,
        "has_event": True,
    }
    return Evil(torch.multiprocessing.reductions.rebuild_cuda_tensor, *(values | changes).values())


def test_lent_memory_of_a_gpu_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, found),) = read_tensors(pickle.dumps([("a", lent())]), 0)
    assert (name, found.size, found.stride, found.dtype) == ("a", (2, 3), (3, 1), "bfloat16")
    assert isinstance(found.memory, CudaMemory)
    assert (found.memory.device, found.memory.nbytes, found.memory.counter) == (0, 12, b"/torch_1_2_3")
    with pytest.raises(PickleError, match="reaches beyond its memory"):
        read_tensors(pickle.dumps([("a", lent(nbytes=11))]), 0)
    for changes, words in (
        ({"place": 10_000}, "counter of lent memory is none of torch's"),
        ({"counter": b"/etc/x"}, "counter of lent memory is none of torch's"),
        ({"device": 3}, "the GPU 3, which is not among this rank's 0"),
        ({"device": "GPU-1"}, "the GPU GPU-1, which is not among"),
        ({"device": -1}, "the GPU -1, which is not among"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match=words):
            read(pickle.dumps([("a", lent(**changes))]))


def hostile() -> list[Any]:
    rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
    tensor = torch.zeros(3)
    return [
        pytest.param(pickle.dumps(Evil(os.system, "touch {path}")), "names posix.system", id="system"),
        pytest.param(pickle.dumps([("a", Evil(os.system, "touch {path}"))]), "names posix.system", id="in a list"),
        pytest.param(pickle.dumps(Evil(eval, "open('{path}', 'w')")), "names builtins.eval", id="eval"),
        pytest.param(pickle.dumps(Evil(getattr, "torch", "load")), "names builtins.getattr", id="getattr"),
        pytest.param(b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.", "names torch._utils.os.system", id="dots"),
        pytest.param(b"ctorch.serialization\nos\n.", "names torch.serialization.os", id="module"),
        pytest.param(b"cos\nsystem\n(S'touch {path}'\ntR.", "names os.system", id="protocol 0"),
        pytest.param(b"(S'touch {path}'\nios\nsystem\n.", "the operation STRING", id="inst"),
        pytest.param(b"\x80\x02\x82\x01.", "the operation EXT1", id="extension"),
        pytest.param(b"\x80\x05\x97.", "the operation NEXT_BUFFER", id="buffer"),
        pytest.param(pickle.dumps({1, 2}), "the operation EMPTY_SET", id="set"),
        pytest.param(pickle.dumps([("a", 1.5)]), "the operation BINFLOAT", id="float"),
        pytest.param(pickle.dumps([("a", 1 << 90)]), "beyond 64 bits", id="long"),
        pytest.param(pickle.dumps([("a", Evil(torch.load, "{path}"))]), "names torch.serialization.load", id="load"),
        pytest.param(pickle.dumps(Evil(torch.Tensor, 1 << 40)), "no list of names|where list or tuple", id="huge"),
        pytest.param(pickle.dumps([("a", Evil(rebuild, tensor._typed_storage(), 0, (1 << 40,), (1,), False, {}))]),
                     "reaches beyond its memory", id="huge size"),
        pytest.param(pickle.dumps([("a", Evil(rebuild, tensor._typed_storage(), 0, (1 << 40,), (0,), False, {}))]),
                     "reaches beyond its memory", id="repeated"),
        pytest.param(pickle.dumps([("a", Evil(rebuild, tensor._typed_storage(), -1, (2,), (1,), False, {}))]),
                     "not negative", id="negative"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.", "is broken", id="huge bytes"),
        pytest.param(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.", "is broken", id="huge text"),
        pytest.param(pickle.dumps([("a", torch.zeros(3))])[:-1], "has no end|is broken", id="cut off"),
        pytest.param(pickle.dumps([]) + b"x", "something stands behind it", id="longer"),
        pytest.param(b"\x80\x04R.", "takes more than there is", id="empty stack"),
        pytest.param(b"\x80\x04h\x05.", "remembers what it has not noted", id="memo"),
        pytest.param(b"\x80\x04]}b.", "changes what it has not just made", id="state of a list"),
        pytest.param(pickle.dumps(["a"]), "no list of names with tensors", id="names alone"),
        pytest.param(pickle.dumps([("a", "b")]), "it has b where a tensor belongs", id="text"),
        pytest.param(b"", "has no end|is broken", id="nothing"),
        pytest.param(b"PK\x03\x04 no archive", "a broken archive", id="no archive"),
    ]  # fmt: skip


@pytest.mark.parametrize(("payload", "words"), hostile())
def test_whatever_else_is_in_a_pickle_is_refused_and_nothing_is_called(
    payload: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "touched")
    payload = payload.replace(b"{path}", path.encode())

    def looked_up(*_args: Any) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(pickle, "loads", looked_up)
    modules = set(sys.modules)
    with pytest.raises(PickleError, match=words):
        read_tensors(payload, 0)
    assert not os.path.exists(path) and set(sys.modules) == modules


def test_archives_that_are_compressed_or_lie_over_themselves_are_refused() -> None:
    archive = saved([("a", torch.zeros(1000))])
    squeezed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for one in old.namelist():
            new.writestr(one, old.read(one))
    with pytest.raises(PickleError, match="a compressed archive"):
        read_tensors(squeezed.getvalue(), 0)
    with pytest.raises(PickleError, match="a storage that is not there|broken archive"):
        read_tensors(archive.replace(b"data/0", b"data/9"), 0)


def test_a_pickle_may_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled_values, "MAX_OPERATIONS", 100)
    with pytest.raises(PickleError, match="more than 100 operations"):
        read_tensors(pickle.dumps(list(range(1000))), 0)


def laughs() -> list[Any]:
    """A list that holds another one ten times, and so on: little to send, and 10^30 places to go through."""
    value: list[Any] = []
    for _ in range(30):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (pickle.dumps([("a", laughs())]), "a list where a tensor belongs"),
        (pickle.dumps([("a", Evil(torch.Tensor, laughs()))]), "has torch.Tensor where a tensor belongs"),
        (saved([laughs()], _use_new_zipfile_serialization=False), "no list of names with tensors"),
    ],
    ids=["list", "call", "old file"],
)
def test_lists_that_hold_each_other_are_not_gone_through(payload: bytes, words: str) -> None:
    with pytest.raises(PickleError, match=words):
        read_tensors(payload, 0)


def test_what_a_sender_says_as_it_gives_up_is_not_either() -> None:
    with pytest.raises(GivenUpError, match="RuntimeError: no$"):
        _read_step(pickle.dumps(RuntimeError("no", laughs())))


def test_another_host_has_no_part_in_it() -> None:
    source = PickledTensors(payloads=[pickle.dumps([])], load_format=None, host_identity="another")
    with pytest.raises(ValueError, match="on another host than the tensors"):
        list(TensorFeeds(ParallelConfig()).open(source))
