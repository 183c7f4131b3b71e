"""Owns one pool's memory on a device: zeros at an address that stays, which can be given back where that is asked."""

import numpy as np
import torch

from ramet.srt.utils.returnable_zeros import ReturnableZeros


class PoolMemory:
    """Bytes that hold what running requests and cached prefixes need, and nothing once nobody needs it.

    Raises:
        MemoryError, OSError: if there is no memory that can be given back.
    """

    def __init__(self, num_bytes: int, device: torch.device, *, can_be_put_away: bool):
        """
        Args:
            can_be_put_away: whether `put_away` will be called.
        """
        self._can_be_put_away = can_be_put_away
        self._memory = ReturnableZeros(num_bytes, device) if can_be_put_away and num_bytes else None
        if self._memory is not None:
            self.bytes = self._memory.tensor  # uint8 [num_bytes]
        elif device.type == "cpu" and num_bytes:
            self.bytes = _lazy_zeros(num_bytes)
        else:
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    @property
    def is_put_away(self) -> bool:
        """Whether there is no memory at the addresses."""
        return self._memory is not None and not self._memory.is_there

    def put_away(self) -> None:
        """Give the memory back; the addresses stay, and nobody may read them. Does nothing if there is none.

        Raises:
            RuntimeError: if it can't be given back.
        """
        if not self._can_be_put_away:
            raise RuntimeError("the memory of the KV cache can only be given back with --enable-memory-saver")
        if self._memory is not None:
            self._memory.give_back()

    def take_back(self) -> None:
        """Have memory at the addresses again, all zeros. Does nothing if there is some.

        Raises:
            MemoryError: if there is not enough; nothing has changed then.
        """
        if self._memory is not None:
            self._memory.take()


def _lazy_zeros(num_bytes: int) -> torch.Tensor:
    """Zeros on the host that take memory only where something is written; torch.zeros writes all of them."""
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
