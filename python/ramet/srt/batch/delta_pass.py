"""Owns how a pass's sequences are told to the kernels of linear layers: single tokens, and chunks of longer ones.

A chunk ends where a sequence does, where its state is to be kept, or with CHUNK tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ramet.srt.batch.pass_tokens import PassTokens

CHUNK = 64  # tokens whose writes are found together
CHUNK_FIELDS = 4  # first token, tokens, sequence, slot where the state behind it is kept as well or -1
SEQUENCE_FIELDS = 5  # first chunk, chunks, row of the page table, 1 if it begins, first token


@dataclass(frozen=True)
class DeltaPass:
    """One pass as the kernels read it. What is beyond the pass's own chunks and sequences has no tokens."""

    single_rows: torch.Tensor  # [num_tokens]: row of the page table of a token that is a sequence by itself; or -1
    positions: torch.Tensor  # int64 [num_tokens]
    has_singles: bool
    chunks: torch.Tensor  # int32 [num_chunks, CHUNK_FIELDS]
    sequences: torch.Tensor  # int32 [num_sequences, SEQUENCE_FIELDS]
    chunk_size: int = CHUNK

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)


def describe_tokens(tokens: PassTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32: single rows [num_tokens], chunks, and sequences of several tokens."""
    is_single = tokens.lens == 1
    singles = np.repeat(np.where(is_single, tokens.rows, -1), tokens.lens).astype(np.int32)
    chunks: list[tuple[int, int, int, int]] = []
    sequences: list[tuple[int, int, int, int, int]] = []
    for index in np.flatnonzero(~is_single).tolist():
        first, stop = tokens.first_tokens[index : index + 2].tolist()
        first_chunk, start = len(chunks), first
        for length, save in (*tokens.saves_of(index), (stop - first, -1)):
            end = first + length
            while start < end:
                size = min(CHUNK, end - start)
                is_last = start + size == end
                chunks.append((start, size, len(sequences), save if is_last else -1))
                start += size
        row, is_new = int(tokens.rows[index]), int(tokens.starts[index] == 0)
        sequences.append((first_chunk, len(chunks) - first_chunk, row, is_new, first))
    return (
        singles,
        np.array(chunks, dtype=np.int32).reshape(-1, CHUNK_FIELDS),
        np.array(sequences, dtype=np.int32).reshape(-1, SEQUENCE_FIELDS),
    )
