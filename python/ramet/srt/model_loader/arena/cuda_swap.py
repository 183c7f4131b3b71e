"""Owns exchanging what two pieces of a GPU's memory hold, at the memory's speed: each byte is read and written once."""

import torch
import triton
import triton.language as tl

BLOCK_WORDS = 1024  # measured on an H200: with 4096, half the rate
BLOCK_NBYTES = 4 * BLOCK_WORDS


@triton.jit
def _swap_kernel(one_ptr, other_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, other = tl.load(one_ptr + places), tl.load(other_ptr + places)
    tl.store(one_ptr + places, other)
    tl.store(other_ptr + places, one)


def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange the content of two contiguous uint8 tensors of the same size, a multiple of BLOCK_NBYTES."""
    num_blocks, rest = divmod(len(one), BLOCK_NBYTES)
    assert len(one) == len(other) and rest == 0
    _swap_kernel[(num_blocks,)](one.view(torch.int32), other.view(torch.int32), BLOCK=BLOCK_WORDS)
