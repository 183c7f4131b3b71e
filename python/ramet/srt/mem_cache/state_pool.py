"""Owns the memory of what linear layers keep of a sequence: one state for all of its tokens, in slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ramet.srt.mem_cache.pool_memory import PoolMemory

ALIGNMENT = 256  # bytes, of each part of a slot


@dataclass(frozen=True)
class StateSpec:
    """What a linear layer keeps of a sequence, of the heads of this rank."""

    num_channels: int  # of the convolution
    conv_len: int  # tokens whose input it keeps
    num_heads: int
    key_dim: int
    value_dim: int

    def part_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Of the convolution's inputs, in the model's type, and of the heads' matrices, in float32."""
        conv = self.conv_len * self.num_channels * dtype.itemsize
        matrices = self.num_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return _aligned(conv), _aligned(matrices)

    def num_bytes(self, dtype: torch.dtype) -> int:
        return sum(self.part_bytes(dtype))


class StatePool:
    """The states of all linear layers of a rank. Those of one sequence lie together, so that one copy moves them.

    Slot 0 belongs to nobody: padded reads and writes go there. What a slot holds when a request gets it doesn't matter:
    its first token begins with zeros.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        layers: Sequence[StateSpec],
        dtype: torch.dtype,
        device: torch.device,
        can_be_put_away: bool = False,
    ):
        """
        Args:
            layers: in the order of their places.
            can_be_put_away: whether `put_away` will be called.

        Raises:
            MemoryError, OSError: if there is no memory that can be given back.
        """
        slot_bytes = sum(spec.num_bytes(dtype) for spec in layers)
        self.slot_bytes = slot_bytes
        self._memory = PoolMemory((num_slots + 1) * slot_bytes, device, can_be_put_away=can_be_put_away)
        self.buffer = self._memory.bytes.view(num_slots + 1, slot_bytes)
        self._conv: list[torch.Tensor] = []
        self._matrices: list[torch.Tensor] = []
        start = 0
        for spec in layers:
            for parts, size, kind, shape in zip(
                (self._conv, self._matrices),
                spec.part_bytes(dtype),
                (dtype, torch.float32),
                ((spec.conv_len, spec.num_channels), (spec.num_heads, spec.key_dim, spec.value_dim)),
                strict=True,
            ):
                num_used = torch.Size(shape).numel() * kind.itemsize
                parts.append(self.buffer[:, start : start + num_used].view(kind).unflatten(-1, shape))
                start += size

    def conv(self, place: int) -> torch.Tensor:
        """[num_slots + 1, conv_len, num_channels]: the last inputs of a layer's convolution, the newest at the end."""
        return self._conv[place]

    def matrices(self, place: int) -> torch.Tensor:
        """float32 [num_slots + 1, num_heads, key_dim, value_dim] of a layer."""
        return self._matrices[place]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole slots, one after the other, as steps of the current stream."""
        for source, target in zip(sources, targets, strict=True):
            self.buffer[target].copy_(self.buffer[source])

    @property
    def is_put_away(self) -> bool:
        """See PoolMemory."""
        return self._memory.is_put_away

    def put_away(self) -> None:
        """See PoolMemory."""
        self._memory.put_away()

    def take_back(self) -> None:
        """See PoolMemory."""
        self._memory.take_back()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
