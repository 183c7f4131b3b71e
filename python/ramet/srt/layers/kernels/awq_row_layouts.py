"""Owns how the kernel for a row of AWQ's words cuts a matrix, and which thread has what of it."""

from typing import NamedTuple

import triton.language as tl
from triton.experimental.gluon import language as gl

NUM = tl.constexpr(8)  # numbers of a word
MAX_GROUPS = tl.constexpr(8)  # of columns for a program: each has a column of the matrix units' product
STEP = 64  # columns at a time; no group ends within


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    words: int  # of one thread, beside each other: 2 or 4
    num_warps: int  # beside each other, eight threads of words each
    num_stages: int  # steps of words in shared memory
    num_programs: int  # for a multiprocessor


TILE = Tile(2, 2, 4, 6)  # measured on an H200


def words_layout(tile: Tile) -> gl.DistributedLinearLayout:
    """Of [words, columns]: which of them a thread reads, so that it has what the matrix units take of it."""
    columns, width = [8], 8 * tile.words * tile.num_warps
    while columns[-1] < STEP // 2:
        columns.append(2 * columns[-1])
    beside = [[1 << bit, 0] for bit in range(tile.words.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], *([tile.words << bit, 0] for bit in range(3))]
    warps = [[8 * tile.words << bit, 0] for bit in range(tile.num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*beside, [0, 1], *([0, column] for column in columns)], lanes, warps, [], [width, STEP]
    )


def scales_layout(tile: Tile) -> gl.DistributedLinearLayout:
    """Of [words in the product's order, groups, places]: a thread has the scales of the sums that it has."""
    width, block = 8 * tile.words * tile.num_warps, 16 * tile.num_warps
    more = [[block << bit, 0, 0] for bit in range((width // block).bit_length() - 1)]
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [8, 0, 0], *more]
    lanes = [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    warps = [[16 << bit, 0, 0] for bit in range(tile.num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [width, MAX_GROUPS.value, NUM.value])
