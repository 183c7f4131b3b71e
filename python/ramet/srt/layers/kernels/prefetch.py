"""Owns bringing words of weights into the L2 cache before they are read: nothing that a kernel waits for makes them."""

import triton
import triton.language as tl


@triton.jit
def prefetch_sectors(ptrs):
    """The 32 bytes around each pointer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_words(ptr, first_row, num_rows, first_word, num_words, stride, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """A tile of 32-bit words, a sector of 32 bytes with each instruction; what lies outside is its nearest inside."""
    rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1)
    words = tl.minimum(first_word + tl.arange(0, WORDS // 8) * 8, num_words - 1)
    prefetch_sectors(ptr + rows[:, None] * stride + words[None, :])
