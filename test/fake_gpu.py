"""Owns tests' means of seeing which operations a layer calls, on a GPU that isn't there too."""

import contextlib
from collections.abc import Iterator

import torch
from ramet.srt.layers import grouped_linear
from ramet.srt.layers.kernels import runtime
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class RecordOutputs(TorchDispatchMode):
    """Keeps the name of every operation called within, and the tensors that it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.outputs: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        outputs = output if isinstance(output, tuple | list) else [output]
        self.outputs += [tensor for tensor in outputs if isinstance(tensor, torch.Tensor)]
        return output


@contextlib.contextmanager
def fake_gpu(monkeypatch, capability: tuple[int, int], *, has_triton: bool) -> Iterator[None]:
    """Tensors made within on the device "cuda" have a shape and a type and no values."""
    monkeypatch.setattr(runtime, "has_triton", lambda: has_triton)
    monkeypatch.setattr(grouped_linear, "_capability", lambda device: capability)
    with FakeTensorMode():
        yield
