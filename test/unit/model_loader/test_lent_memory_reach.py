"""Memory on a GPU that another process lends is as large as the driver says, whatever the lender says."""

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ramet.srt.model_loader import tensor_memory
from ramet.srt.model_loader.arena import cuda_ipc
from ramet.srt.model_loader.arena.base import LentFile, LentMemory
from ramet.srt.model_loader.arena.cuda_ipc import CudaIpcMemory
from ramet.srt.model_loader.tensor_memory import CudaMemory, PickledTensor
from ramet.srt.utils import cuda_driver
from ramet.srt.weights.copy_op import CopyOp

BASE = 1 << 40
PLAIN, EXPANDABLE = b"\x02c", b"\x02e"  # how torch's handles begin


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of what is at addresses here, as the driver tells it."""
    known = {BASE: 1 << 20, BASE + (1 << 20): 1 << 20}

    def call(name: str, base: Any, size: Any, address: int) -> None:
        assert name == "cuMemGetAddressRange_v2"
        for start, nbytes in known.items():
            if start <= address < start + nbytes:
                ctypes.cast(base, ctypes.POINTER(ctypes.c_uint64))[0] = start
                ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t))[0] = nbytes
                return
        raise OSError("no such address")

    monkeypatch.setattr(cuda_driver, "call_driver", call)
    for module in (tensor_memory, cuda_ipc):
        monkeypatch.setattr(module, "current_context", lambda _device: contextlib.nullcontext())
    return known


def open_tensor(monkeypatch: pytest.MonkeyPatch, handle: bytes, nbytes: int, offset: int) -> Any:
    memory = CudaMemory(device=0, handle=handle, nbytes=nbytes, offset_nbytes=offset, counter=b"/torch_1_2",
                        counter_place=0, event=b"", has_event=False)  # fmt: skip
    opened = SimpleNamespace(data_ptr=lambda: BASE + offset)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", lambda *_: opened)
    assert memory.open(False) is opened


@pytest.mark.parametrize(
    ("handle", "nbytes", "offset"),
    [(PLAIN, 1 << 20, 0), (PLAIN, 4, (1 << 20) - 4), (EXPANDABLE, 2 << 20, 0), (EXPANDABLE, 4, (2 << 20) - 4)],
)
def test_what_lies_inside_is_opened(
    allocations: Any, monkeypatch: Any, handle: bytes, nbytes: int, offset: int
) -> None:
    open_tensor(monkeypatch, handle, nbytes, offset)


@pytest.mark.parametrize(
    ("handle", "nbytes", "offset"),
    [
        (PLAIN, (1 << 20) + 1, 0),
        (PLAIN, 8, (1 << 20) - 4),
        (PLAIN, 4, 1 << 20),  # in what lies behind it here
        (PLAIN, 4, 1 << 50),
        (EXPANDABLE, 8, (2 << 20) - 4),
    ],
)
def test_what_reaches_beyond_is_refused(allocations: Any, monkeypatch: Any, handle: bytes, nbytes: int, offset: int
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=f"not {nbytes} from {offset} on"):
        open_tensor(monkeypatch, handle, nbytes, offset)


def test_where_the_driver_cannot_tell_torch_is_believed(allocations: Any, monkeypatch: Any) -> None:
    allocations.clear()
    open_tensor(monkeypatch, PLAIN, 8, 1 << 30)


def test_a_tensor_of_nothing_opens_nothing() -> None:
    memory: Any = SimpleNamespace(open=None)
    assert PickledTensor(memory, "uint8", 0, (0, 4), (4, 1)).open(takes_over=True).numel() == 0


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(("stop", "is_inside"), [(1 << 19, True), ((1 << 19) + 1, False), (1 << 40, False)])
def test_a_seed_s_memory_is_read_as_far_as_it_goes(
    allocations: Any, monkeypatch: Any, is_file: bool, stop: int, is_inside: bool
) -> None:
    half = 1 << 19
    closed: list[int] = []
    monkeypatch.setattr(cuda_driver, "open_memory", lambda _handle: BASE)
    monkeypatch.setattr(cuda_driver, "close_memory", closed.append)
    monkeypatch.setattr(cuda_ipc.cuda_virtual_memory, "imported", lambda *_: contextlib.nullcontext(BASE))
    monkeypatch.setattr(cuda_ipc, "_copy", lambda *_: 1.0)
    share = LentFile(3, half) if is_file else LentMemory(b"h", half)
    memory = CudaIpcMemory(share, target=0, device=torch.device("cpu"))
    op = CopyOp(source=0, source_offset=stop - 8, target_offset=0, row_nbytes=8)
    if is_inside:
        assert memory.copy([op], lambda: True, 1.0) == 1.0
    else:
        with pytest.raises(OSError, match=f"the seed's memory has {half} bytes, and not the {stop} that it said"):
            memory.copy([op], lambda: True, 1.0)
    assert closed == ([] if is_file else [BASE])
