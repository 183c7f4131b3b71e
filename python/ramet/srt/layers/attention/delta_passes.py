"""Owns what the linear layers of a rank share of a pass, where it is launched and where it is captured."""

from collections.abc import Sequence

import numpy as np
import torch

from ramet.srt.batch.delta_pass import CHUNK, CHUNK_FIELDS, SEQUENCE_FIELDS, DeltaPass, describe_tokens
from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.layers.kernels.runtime import can_run_kernels
from ramet.srt.utils.device import to_device

CAPTURED_SEQUENCES = 32  # that a captured pass has at most beside single tokens
CAPTURED_MORE = 64  # chunks that it has at most beyond the fewest for its tokens


class _Captured:
    """Where captured passes of a shape with chunks find them."""

    def __init__(self, num_tokens: int, device: torch.device):
        self.sizes = (
            num_tokens,
            (num_tokens // CHUNK + CAPTURED_MORE) * CHUNK_FIELDS,
            CAPTURED_SEQUENCES * SEQUENCE_FIELDS,
        )
        self.buffer = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        singles, chunks, sequences = self.buffer.split(self.sizes)
        self.singles, self.chunks, self.sequences = (
            singles,
            chunks.view(-1, CHUNK_FIELDS),
            sequences.view(-1, SEQUENCE_FIELDS),
        )

    def fill(self, parts: Sequence[np.ndarray]) -> None:
        padded = np.zeros(sum(self.sizes), dtype=np.int32)
        start = 0
        for part, size in zip(parts, self.sizes, strict=True):
            padded[start : start + part.size] = part.ravel()
            start += size
        self.buffer.copy_(to_device(padded, torch.int32, self.buffer.device))


class DeltaPasses:
    """The pass under way: one object for all linear layers of a rank."""

    current: DeltaPass

    def __init__(self) -> None:
        self._captured: dict[CapturedShape, _Captured] = {}

    def begin(self, batch: ForwardBatch) -> None:
        """A pass begins; with `batch.is_captured` it reads what `prepare` has put there before each replay."""
        device = batch.positions.device
        if not can_run_kernels(device):
            return
        if batch.is_captured:
            kept = self._captured.get(CapturedShape(len(batch.positions), True))
            if kept is not None and batch.forward_mode is ForwardMode.EXTEND:
                self.current = DeltaPass(kept.singles, batch.positions, True, kept.chunks, kept.sequences)
                return
        if batch.is_captured or batch.tokens.is_decode:
            nothing = torch.empty((0, CHUNK_FIELDS), dtype=torch.int32, device=device)
            self.current = DeltaPass(batch.rows, batch.positions, True, nothing, nothing)
            return
        singles, chunks, sequences = (to_device(part, torch.int32, device) for part in describe_tokens(batch.tokens))
        has_singles = bool((batch.tokens.lens == 1).any())
        self.current = DeltaPass(singles, batch.positions, has_singles, chunks, sequences)

    def init_captured(self, shapes: Sequence[CapturedShape], device: torch.device) -> None:
        """Make what captured passes of these shapes keep at fixed addresses."""
        self._captured = {shape: _Captured(shape.num_tokens, device) for shape in shapes if shape.has_chunks}

    def prepare(self, shape: CapturedShape, tokens: PassTokens) -> bool:
        """Prepare the next captured pass; False if it has more sequences or chunks than the shape has places for."""
        kept = self._captured.get(shape)
        if kept is None:
            return True
        parts = describe_tokens(tokens)
        if any(part.size > size for part, size in zip(parts, kept.sizes, strict=True)):
            return False
        kept.fill(parts)
        return True
