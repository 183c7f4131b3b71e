"""Named tensors as SGLang's trainers pickle them."""

import base64
import io
import sys
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass
class FlattenedTensorMetadata:
    """As SGLang's."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


@dataclass
class LocalSerializedTensor:
    """As SGLang's: a tensor for each rank."""

    values: list[bytes]


def forked(value: Any) -> bytes:
    """As SGLang's MultiprocessingSerializer makes it."""
    file = io.BytesIO()
    ForkingPickler(file).dump(value)
    return file.getvalue()


def flat_bucket(tensors: dict[str, torch.Tensor], *, is_bytes: bool = False) -> dict[str, Any]:
    """All tensors in one of their type, or of their bytes."""
    parts, flats, start = [], [], 0
    for name, tensor in tensors.items():
        flat = tensor.flatten().view(torch.uint8) if is_bytes else tensor.flatten()
        place = start, start + len(flat), tensor.numel()
        parts.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, *place))
        flats.append(flat)
        start += len(flat)
    return {"flattened_tensor": torch.cat(flats), "metadata": parts}


def lend(path: str, devices: str, num_buckets: str = "1") -> None:
    """A trainer: print a file's tensors, each bucket pickled for two ranks, and keep them.

    Args:
        devices: one for each rank, divided by commas, or one for both.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")
    copies = [list(load_file(path, device).items()) for device in devices.split(",")]
    for bucket in range(int(num_buckets)):
        for rank in range(2):
            tensors = copies[rank % len(copies)][bucket :: int(num_buckets)]
            print(base64.b64encode(forked(tensors)).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    lend(*sys.argv[1:])
