"""Owns the checksums of an arena in GPU memory, computed there at the memory's speed."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ramet.srt.weights.manifest import WeightEntry, align_up

BLOCK_WORDS = 4096
WORD_BYTES = 8


@triton.jit
def _mix(state):
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _mix64_kernel(data_ptr, out_ptr, num_words, tail_mask, BLOCK: tl.constexpr):
    """Add the mixed words of one block, each told from its like by its place, to one sum modulo 2^64."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = places < num_words
    words = tl.load(data_ptr + places, mask=valid, other=0)
    words = tl.where(places == num_words - 1, words & tail_mask, words)
    mixed = _mix(words.to(tl.uint64, bitcast=True) ^ _mix((places + 1).to(tl.uint64, bitcast=True)))
    tl.atomic_add(out_ptr, tl.sum(tl.where(valid, mixed.to(tl.int64, bitcast=True), 0), axis=0))


def mix64(data: torch.Tensor, nbytes: int, out: torch.Tensor) -> None:
    """Add the sum over the first `nbytes` bytes to `out`.

    The sum over 8-byte words w_i (little endian, the last one filled up with zeros) of mix(w_i ^ mix(i + 1)), modulo
    2^64, where mix is SplitMix64's finaliser.

    Args:
        data: int64, contiguous, at least as long.
        out: int64 scalar.
    """
    num_words = -(-nbytes // WORD_BYTES)
    if num_words:
        tail = nbytes % WORD_BYTES
        tail_mask = (1 << (8 * tail)) - 1 if tail else -1
        _mix64_kernel[(triton.cdiv(num_words, BLOCK_WORDS),)](data, out, num_words, tail_mask, BLOCK=BLOCK_WORDS)


def hash_buffer(entries: Sequence[WeightEntry], buffer: torch.Tensor) -> tuple[str, ...]:
    """The checksums of entries in a uint8 buffer that ends on a word's end."""
    words = buffer.view(torch.int64)
    sums = torch.zeros(max(1, len(entries)), dtype=torch.int64, device=buffer.device)
    for index, entry in enumerate(entries):
        mix64(words[entry.offset // WORD_BYTES :], entry.nbytes, sums[index])
    return tuple(format_sum(value) for value in sums.tolist()[: len(entries)])


def gather_and_hash(buffer: torch.Tensor, starts: Sequence[int], row_nbytes: int, num_rows: int, stride: int) -> str:
    """The checksum of rows of a contiguous uint8 buffer, one behind the other.

    There are `num_rows` from each of `starts` on, `stride` bytes apart.
    """
    nbytes = len(starts) * num_rows * row_nbytes
    gathered = torch.empty(align_up(nbytes, WORD_BYTES), dtype=torch.uint8, device=buffer.device)
    parts = gathered[:nbytes].view(len(starts), num_rows, row_nbytes)
    for part, start in zip(parts, starts, strict=True):
        part.copy_(buffer[start:].as_strided((num_rows, row_nbytes), (stride, 1)))
    result = torch.zeros((), dtype=torch.int64, device=buffer.device)
    mix64(gathered.view(torch.int64), nbytes, result)
    return format_sum(int(result.item()))


def format_sum(value: int) -> str:
    """A sum modulo 2^64, which torch holds as a signed number, as 16 hex digits."""
    return f"{value & (1 << 64) - 1:016x}"
