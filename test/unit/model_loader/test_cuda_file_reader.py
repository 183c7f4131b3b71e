"""Files reach a GPU's memory byte for byte though slices are used again: with a stand-in that copies late."""

import contextlib
import ctypes
import functools
import os
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ramet.srt.model_loader.arena import cuda_reader
from ramet.srt.model_loader.arena.read_range import ShortReadError
from ramet.srt.weights.copy_op import CopyOp


class LateStream:
    """Works when somebody waits for it, as late as it may."""

    current = threading.local()  # `.stream`, of each thread

    def __init__(self):
        self.pending = []
        self.num_done = 0
        self.lock = threading.Lock()
        self.cuda_stream = self  # what the driver is given

    def queue(self, work):
        with self.lock:
            self.pending.append(work)

    def run_to(self, position):
        with self.lock:
            while self.num_done < position:
                self.pending[self.num_done]()
                self.num_done += 1

    def synchronize(self):
        self.run_to(len(self.pending))


class LateEvent:
    def __init__(self):
        self.stream, self.position, self.recorded = None, 0, False

    @property
    def cuda_event(self):  # what the driver is given
        assert self.recorded, "an event is made when it is first recorded"
        return self

    def record(self, stream=None):
        self.recorded = True
        self.stream = stream or getattr(LateStream.current, "stream", None)
        self.position = 0 if self.stream is None else len(self.stream.pending)

    def query(self):
        return self.stream is None or self.stream.num_done >= self.position

    def synchronize(self):
        self.stream.run_to(self.position)


class PinnedTensor(torch.Tensor):
    """Goes to a device when the current stream gets to it."""

    def to(self, device, non_blocking):
        assert non_blocking
        copy = torch.full(self.shape, 0xEE, dtype=torch.uint8)
        LateStream.current.stream.queue(functools.partial(copy.copy_, self.as_subclass(torch.Tensor)))
        return copy


@contextlib.contextmanager
def make_current(stream):
    LateStream.current.stream = stream
    try:
        yield
    finally:
        del LateStream.current.stream


@pytest.fixture
def arena(monkeypatch):
    """Buffer and stream of an arena: of host memory, with the interface of a GPU's."""
    fake_cuda = SimpleNamespace(
        Event=LateEvent, set_device=lambda device: None, mem_get_info=lambda device: None, stream=make_current
    )  # fmt: skip

    def empty(size, dtype, pin_memory):
        assert pin_memory
        return torch.empty(size, dtype=dtype).as_subclass(PinnedTensor)

    def queue_upload(source, target, nbytes, stream):
        stream.queue(functools.partial(ctypes.memmove, target, source, nbytes))

    def record_event(event, stream):
        event.record(stream)

    def queue_scatter(op, source, buffer, scatter=cuda_reader.scatter_device_rows):
        LateStream.current.stream.queue(functools.partial(scatter, op, source, buffer))

    fake = SimpleNamespace(cuda=fake_cuda, uint8=torch.uint8, empty=empty)
    monkeypatch.setattr(cuda_reader, "torch", fake)
    monkeypatch.setattr(cuda_reader.cuda_driver, "queue_upload", queue_upload)
    monkeypatch.setattr(cuda_reader.cuda_driver, "record_event", record_event)
    monkeypatch.setattr(cuda_reader, "scatter_device_rows", queue_scatter)
    monkeypatch.setattr(cuda_reader, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(cuda_reader, "SLICE_BYTES", 1000)
    monkeypatch.setattr(cuda_reader, "PART_BYTES", 3500)
    monkeypatch.setattr(cuda_reader, "SPARE_SLICES", 2)
    monkeypatch.setattr(cuda_reader, "num_copy_threads", lambda limit: 4)
    buffer = torch.zeros(200_000, dtype=torch.uint8)
    return SimpleNamespace(buffer=buffer, stream=LateStream())


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd, data
    os.close(fd)


def test_ranges_and_rows_arrive(arena, file):
    fd, data = file
    generator = random.Random(0)
    ops, expected, position = [], np.zeros(200_000, np.uint8), 0
    for length in [1, 999, 1000, 1001, 3500, 3501, 40_000, 0, 20_000]:
        source = generator.randrange(0, len(data) - length)
        ops.append(CopyOp(source=0, source_offset=source, target_offset=position, row_nbytes=length))
        expected[position : position + length] = data[source : source + length]
        position += length + 7
    rows = CopyOp(source=0, source_offset=11, target_offset=position, row_nbytes=96, num_rows=300, source_stride=300,
                  target_stride=96)  # fmt: skip
    for row in range(300):
        start = 11 + row * 300
        expected[position + row * 96 : position + row * 96 + 96] = data[start : start + 96]
    cuda_reader.fill_cuda_from_files([*ops, rows], [fd], arena.buffer, arena.stream)
    assert np.array_equal(arena.buffer.numpy(), expected)


def test_a_file_that_ends_early_is_an_error_after_the_last_copy(arena, file):
    fd, data = file
    ops = [CopyOp(source=0, source_offset=start, target_offset=start, row_nbytes=10_000) for start in (0, 95_000)]
    with pytest.raises(ShortReadError):
        cuda_reader.fill_cuda_from_files(ops, [fd], arena.buffer, arena.stream)
    assert arena.stream.num_done == len(arena.stream.pending)


def test_nothing_to_read_starts_nothing(arena):
    cuda_reader.fill_cuda_from_files([], [], arena.buffer, arena.stream)
    assert arena.stream.pending == []
