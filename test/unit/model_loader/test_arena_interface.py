"""What everybody relies on of an arena: filling, hashing, sharing and receiving, without asking for its device."""

import contextlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_model as toy
import xxhash
from ramet.srt.model_loader.arena import base, cuda, host_hash
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import LentMemory, SharedFile, WeightArena
from ramet.srt.model_loader.arena.cuda_ipc import CudaIpcMemory
from ramet.srt.utils import host_memory
from ramet.srt.weights.copy_op import CopyOp


class FakeMemory:
    """Stands in for a GPU's memory that can be given back."""

    def __init__(self, buffer):
        self.buffer = buffer
        self._nbytes = buffer.nbytes

    def give_back(self):
        self.buffer = None

    def take(self):
        self.buffer = torch.full((self._nbytes,), 9, dtype=torch.uint8)

    def take_over(self, other):
        self.buffer, other.buffer = other.buffer, None


def alive():
    return True


@pytest.fixture
def manifest():
    return toy.make_manifest(toy.make_model())


@pytest.fixture
def arena(manifest):
    return allocate_arena(manifest, "cpu")


def random_bytes(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


@pytest.fixture
def seed(manifest):
    """A published arena with random content."""
    seed = allocate_arena(manifest, "cpu")
    seed.memory[:] = random_bytes(seed.nbytes)
    seed.publish()
    return seed


@pytest.fixture
def open_file(tmp_path):
    with contextlib.ExitStack() as stack:

        def write(data):
            path = tmp_path / "file"
            path.write_bytes(data)
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield write


# Host memory


@pytest.mark.parametrize("block_nbytes", [1, 50, 4 << 20])
@pytest.mark.parametrize(("row_nbytes", "num_rows", "stride"), [(6, 5, 20), (7, 1, 0), (8, 9, 8), (1, 3, 64)])
def test_rows_hash_like_the_bytes_gathered(arena, monkeypatch, block_nbytes, row_nbytes, num_rows, stride):
    monkeypatch.setattr(host_hash, "BLOCK_BYTES", block_nbytes)
    arena.memory[:] = data = random_bytes(arena.nbytes)
    starts = [300, 3]
    offsets = [start + row * stride for start in starts for row in range(num_rows)]
    gathered = b"".join(data[offset : offset + row_nbytes] for offset in offsets)
    assert arena.hash_rows(starts, row_nbytes, num_rows, stride) == xxhash.xxh3_64_hexdigest(gathered)


def test_entries_hash_in_any_selection_and_order(arena, manifest):
    arena.memory[:] = data = random_bytes(arena.nbytes)
    chosen = [manifest.entries[2], manifest.entries[0]]
    expected = tuple(xxhash.xxh3_64_hexdigest(data[e.offset : e.offset + e.nbytes]) for e in chosen)
    assert arena.hash_entries(chosen) == expected
    assert len(arena.hash_samples(chosen)) == 2
    assert arena.hash_entries([]) == arena.hash_samples([]) == ()


def test_files_fill_ranges_rows_and_other_dtypes(arena, open_file):
    data = random_bytes(2000)
    floats = np.arange(12, dtype=np.float32)
    fds = [open_file(data), open_file(data + floats.tobytes())]
    ops = [
        CopyOp(source=0, source_offset=5, target_offset=3, row_nbytes=100),
        CopyOp(source=1, source_offset=11, target_offset=200, row_nbytes=8, num_rows=4, source_stride=30,
               target_stride=10),
        CopyOp(source=1, source_offset=2000, target_offset=512, row_nbytes=8, num_rows=2, source_stride=24,
               target_stride=64, source_dtype="float32", target_dtype="bfloat16"),
    ]  # fmt: skip
    arena.memory[:] = bytes([9]) * arena.nbytes
    arena.fill_from_files(ops, fds)
    expected = bytearray([9]) * arena.nbytes
    expected[3:103] = data[5:105]
    for row in range(4):
        expected[200 + 10 * row : 208 + 10 * row] = data[11 + 30 * row : 19 + 30 * row]
    for row, first in ((0, 0), (1, 6)):
        values = torch.tensor(floats[first : first + 4]).bfloat16().view(torch.uint8).numpy().tobytes()
        expected[512 + 64 * row : 520 + 64 * row] = values
    assert arena.memory == expected


def test_a_file_that_is_too_short_is_an_error(arena, open_file):
    op = CopyOp(source=0, source_offset=0, target_offset=0, row_nbytes=100)
    with pytest.raises(OSError, match="shorter"):
        arena.fill_from_files([op], [open_file(b"short")])


def test_what_one_arena_shares_another_maps(seed, arena):
    memory = arena.open_shared(seed.share())
    assert memory.can_map()
    memory.map()
    assert arena.memory == seed.memory and arena.share() != seed.share()
    arena.memory[0] ^= 1
    assert arena.memory[0] != seed.memory[0]
    memory.close()
    memory.close()


def test_what_one_arena_shares_another_copies_wherever_it_is_needed(seed, arena):
    memory = arena.open_shared(seed.share())
    memory.open()
    op = CopyOp(source=3, source_offset=64, target_offset=7, row_nbytes=100)  # the plan's third seed
    assert memory.copy([op], alive, 5.0) == 0.0
    assert arena.memory[7:107] == seed.memory[64:164] and not any(arena.memory[:7])


def test_memory_that_is_not_published_is_not_mapped(arena, manifest):
    other = allocate_arena(manifest, "cpu")
    with pytest.raises(ValueError, match="not sealed"):
        arena.open_shared(other.share()).map()


def test_host_memory_can_not_take_from_a_gpu(arena):
    with pytest.raises(ValueError, match="the seed's memory is on a GPU, this instance's is not"):
        arena.open_shared(LentMemory(b"h" * 64, 0))


def test_a_receive_buffer_is_the_arena_until_it_is_cut_off(arena):
    buffer = arena.open_receive_buffer()
    assert buffer.memory.shape == (arena.nbytes,) and buffer.memory.dtype == torch.uint8
    buffer.memory[5] = 1
    assert arena.memory[5] == 1
    buffer.cut_off()
    buffer.memory[5] = 2  # a late writer
    assert arena.memory[5] == 1
    buffer.close()


def test_a_published_arena_receives_nothing(seed):
    with pytest.raises(RuntimeError, match="immutable"):
        seed.open_receive_buffer()


def test_an_arena_that_is_put_away_takes_no_memory_and_comes_back_with_its_copy(arena):
    arena.memory[:] = data = random_bytes(arena.nbytes)
    address, file_nbytes = arena.address, host_memory.resident_file_nbytes(arena.own_fd)
    assert file_nbytes >= arena.nbytes and resident_nbytes(address) > 0
    arena.put_away(keeps_copy=True)
    assert resident_nbytes(address) == 0
    for read in (lambda: arena.memory, lambda: arena.tensor(arena.manifest.entries[0]), arena.share,
                 arena.byte_tensor, lambda: arena.hash_entries(arena.manifest.entries)):  # fmt: skip
        with pytest.raises(RuntimeError, match="given back"):
            read()
    assert arena.take_back() and arena.memory == data and arena.address == address
    arena.put_away(keeps_copy=False)
    assert host_memory.resident_file_nbytes(arena.own_fd) == 0 and not arena.take_back()


def test_memory_is_not_given_back_under_those_who_read_it(arena, monkeypatch):
    monkeypatch.setattr(base, "READERS_TIMEOUT_S", 0.01)
    with arena.reading():
        with pytest.raises(RuntimeError, match="read by others for 0.01 s"):
            arena.put_away(keeps_copy=False)
        assert not any(arena.memory)
    arena.put_away(keeps_copy=False)
    with pytest.raises(RuntimeError, match="given back"), arena.reading():
        pass


def test_other_content_takes_the_place_of_an_arena_that_is_put_away(arena, manifest):
    stage = arena.open_stage(manifest)
    stage.memory[:] = data = random_bytes(arena.nbytes)
    arena.put_away(keeps_copy=True)
    arena.exchange(stage)
    assert arena.memory == data and stage.is_put_away and not arena.is_put_away
    arena.put_away(keeps_copy=False)
    assert not arena.take_back(), "the copy was of what is there no more"


def test_who_has_mapped_the_memory_keeps_it_when_its_owner_puts_it_away(seed, arena):
    content = bytes(seed.memory)
    arena.open_shared(seed.share()).map()
    seed.put_away(keeps_copy=False)
    assert arena.memory == content


def resident_nbytes(address):
    """Of the mapping at an address, by the kernel's account."""
    with open("/proc/self/smaps", encoding="ascii") as file:
        lines = iter(file)
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(int(one.split()[1]) * 1024 for one in lines if one.startswith("Rss:"))
    raise AssertionError(f"nothing is mapped at {address:#x}")


# A GPU's memory, with stand-ins for the GPU: test/gpu has the real one


@pytest.fixture
def gpu_arena(manifest, monkeypatch):
    """`calls` says what was waited for and made current."""
    arena = object.__new__(cuda.CudaWeightArena)
    WeightArena.__init__(arena, manifest)
    arena.calls = []
    arena.torch_device, arena.stream = torch.device("cuda", 1), "the arena's stream"
    arena._memory = FakeMemory(torch.zeros(manifest.arena_nbytes + 8, dtype=torch.uint8))
    arena._copy, arena._has_copy, arena._kind = None, False, FakeMemory
    arena.nbytes = arena._memory.buffer.nbytes
    arena.address = arena.buffer.data_ptr()

    def current_stream(device):
        return SimpleNamespace(synchronize=lambda: arena.calls.append(("wait", device)))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: arena.calls.append(("set", device)))
    return arena


def test_a_gpu_arena_waits_for_the_callers_stream_on_its_device(gpu_arena):
    gpu_arena.make_current()
    gpu_arena.synchronize()
    assert gpu_arena.calls == [("set", torch.device("cuda", 1)), ("wait", torch.device("cuda", 1))]


def test_a_gpu_arena_exchanges_its_content_by_copies(gpu_arena, manifest, monkeypatch):
    """Through a spare part of memory, and waits for them."""
    monkeypatch.setattr(cuda, "EXCHANGED_NBYTES", 1000)
    stage = object.__new__(cuda.CudaWeightArena)
    stage.__dict__.update(gpu_arena.__dict__)
    contents = [torch.randint(256, (gpu_arena.nbytes,), dtype=torch.uint8) for _ in range(2)]
    gpu_arena._memory, stage._memory = FakeMemory(contents[0].clone()), FakeMemory(contents[1].clone())
    stage.spare = torch.zeros(1000).byte()
    gpu_arena.checksums, stage.checksums = "old", "new"
    gpu_arena.content_digest = stage.content_digest = None
    assert not gpu_arena.in_host_memory
    gpu_arena.exchange(stage)
    assert torch.equal(gpu_arena.buffer, contents[1]) and torch.equal(stage.buffer, contents[0])
    assert (gpu_arena.checksums, stage.checksums) == ("new", "old")
    assert gpu_arena.calls == [("wait", torch.device("cuda", 1))]


def test_a_gpu_arena_stages_only_where_there_is_room(gpu_arena, manifest, monkeypatch):
    gpu_arena.gpu_id = 1
    held = {"mem_get_info": (cuda.STAGE_RESERVE_NBYTES + 5, 1 << 40), "memory_reserved": 10, "memory_allocated": 10}
    for name in held:
        monkeypatch.setattr(torch.cuda, name, lambda _device, name=name: held[name])
    monkeypatch.setattr(host_memory, "available_memory_nbytes", lambda: gpu_arena.nbytes - 1)
    with pytest.raises(MemoryError, match=r"GPU 1 has no room for other weights of rank 0 .* host has none either"):
        gpu_arena.open_stage(manifest)
    prepared = []

    def make(_manifest, _device, kind):
        in_host_memory = kind is cuda.PinnedMemory
        return SimpleNamespace(kind=kind, in_host_memory=in_host_memory, prepare_swap=lambda: prepared.append(kind))

    monkeypatch.setattr(torch, "empty", lambda nbytes, **_options: nbytes)
    monkeypatch.setattr(cuda, "CudaWeightArena", make)
    stage = gpu_arena.open_stage(manifest)
    assert stage.kind is cuda.PinnedMemory and stage.spare == gpu_arena.nbytes and not prepared
    held["memory_reserved"] += gpu_arena.nbytes  # of a stage that was dropped
    assert gpu_arena.open_stage(manifest).kind is FakeMemory and prepared == [FakeMemory]

    refusals = [MemoryError("what is free belongs to graphs"), torch.OutOfMemoryError("or is in pieces")]

    def only_on_host(manifest, device, kind):
        if kind is not cuda.PinnedMemory:
            raise refusals.pop()
        return make(manifest, device, kind)

    monkeypatch.setattr(cuda, "CudaWeightArena", only_on_host)
    while refusals:
        assert gpu_arena.open_stage(manifest).kind is cuda.PinnedMemory


def test_a_gpu_arena_is_put_away_and_taken_back(gpu_arena, manifest, monkeypatch):
    content = gpu_arena.buffer.random_(256).clone()
    gpu_arena.stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(cuda.CudaWeightArena, "work_context", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(
        cuda, "PinnedMemory", lambda nbytes, _device: SimpleNamespace(host=torch.zeros(nbytes, dtype=torch.uint8))
    )
    with pytest.raises(RuntimeError, match="--enable-memory-saver"):
        gpu_arena.put_away(keeps_copy=False)
    monkeypatch.setattr(cuda, "ReturnableMemory", FakeMemory)
    gpu_arena.put_away(keeps_copy=True)
    gpu_arena.put_away(keeps_copy=False)  # there is nothing more to give
    with pytest.raises(RuntimeError, match="given back"):
        gpu_arena.byte_tensor()
    assert gpu_arena.take_back() and torch.equal(gpu_arena.buffer, content)
    gpu_arena.put_away(keeps_copy=False)
    assert not gpu_arena.take_back() and gpu_arena.is_put_away
    other = object.__new__(cuda.CudaWeightArena)
    other.__dict__.update(gpu_arena.__dict__, is_put_away=False, _memory=FakeMemory(content.clone()))
    gpu_arena.exchange(other)
    assert torch.equal(gpu_arena.buffer, content) and other.is_put_away and other._memory.buffer is None


def test_a_gpu_arena_is_filled_on_its_own_stream(gpu_arena, monkeypatch):
    filled = []
    monkeypatch.setattr(cuda, "fill_cuda_from_files", lambda *arguments: filled.append(arguments))
    gpu_arena.fill_from_files(["op"], [3])
    assert filled == [(["op"], [3], gpu_arena.buffer, "the arena's stream")]


def test_a_gpu_arena_copies_from_host_memory_and_does_not_map_it(gpu_arena, monkeypatch):
    filled = []
    monkeypatch.setattr(cuda, "fill_cuda_from_files", lambda ops, fds, *_: filled.append((ops, fds)))
    memory = gpu_arena.open_shared(SharedFile(17))
    assert not memory.can_map()
    with pytest.raises(ValueError, match="can't be mapped"):
        memory.map()
    memory.copy([CopyOp(source=2, source_offset=1, target_offset=0, row_nbytes=4)], alive, 5.0)
    assert filled == [([CopyOp(source=0, source_offset=1, target_offset=0, row_nbytes=4)], [17])]


def test_a_gpu_arena_shares_a_handle_and_takes_one(gpu_arena):
    gpu_arena._memory.share = lambda: LentMemory(b"h" * 64, 512)
    share = gpu_arena.share()
    assert share == LentMemory(b"h" * 64, 512)
    memory = gpu_arena.open_shared(share)
    assert isinstance(memory, CudaIpcMemory) and not memory.can_map()


def test_a_gpu_that_can_not_be_shared_says_so(gpu_arena):
    def refuse():
        raise OSError("cuIpcGetMemHandle: not supported")

    gpu_arena._memory.share = refuse
    with pytest.raises(OSError, match="the GPU's memory can't be lent: cuIpcGetMemHandle: not supported"):
        gpu_arena.share()


def test_a_gpu_arena_receives_into_its_own_memory(gpu_arena):
    assert gpu_arena.open_receive_buffer().memory is gpu_arena.buffer
    gpu_arena.publish()
    with pytest.raises(RuntimeError, match="immutable"):
        gpu_arena.open_receive_buffer()


def test_gathering_from_all_over(seed, monkeypatch):
    content = bytes(seed.memory)
    ranges = [(7, 12), (0, 3), (100, 1124), (100, 101), (len(content) - 5, len(content))]
    expected = b"".join(content[start:stop] for start, stop in ranges)
    assert seed.gather(ranges) == expected and seed.gather([]) == b""
    monkeypatch.setattr(cuda, "GATHERED_NBYTES", 6)  # in several steps
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert cuda.gather_bytes(buffer, ranges) == expected and cuda.gather_bytes(buffer, []) == b""
