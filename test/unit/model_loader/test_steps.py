"""Owns the tests of cutting a plan into reads and broadcasts, and of the guess which ranks of a seed are needed."""

import pytest
import sharded_models as sm
import torch
from ramet.srt.model_loader.client.seed_instance import choose_replica, likely_shard_ranks
from ramet.srt.model_loader.client.transfer_engine import MAX_BATCH_BYTES, MAX_BATCH_RANGES, make_batches
from ramet.srt.model_loader.transport.broadcast_steps import (
    DIRECT_BYTES,
    MIN_DIRECT_BYTES,
    PACKED_BYTES,
    ByteRows,
    check_broadcasts,
    is_direct,
    make_broadcast_steps,
    pack,
    source_rows,
    target_rows,
    unpack,
)
from ramet.srt.weights.copy_op import CopyOp

MIB = 1 << 20


def rows(count, nbytes, source_stride, target_stride=None, offset=0):
    return CopyOp(
        source=0,
        source_offset=offset,
        target_offset=offset,
        row_nbytes=nbytes,
        num_rows=count,
        source_stride=source_stride,
        target_stride=target_stride or nbytes,
    )


def written(steps):
    return sum(op.nbytes for step in steps for op in step)


def test_short_rows_are_read_with_what_lies_between_them():
    op = rows(4096, 2048, 8192)
    steps = list(make_batches([op], range_cost=64 << 10))
    assert steps == [[op]] and op.source_span_nbytes < MAX_BATCH_BYTES


@pytest.mark.parametrize(
    "op", [rows(64, 128 << 10, 4 * MIB), rows(8, 2 * MIB, 2 * MIB + 4096)], ids=["far apart", "long"]
)
def test_rows_that_are_far_apart_or_long_are_read_one_by_one(op):
    steps = list(make_batches([op], range_cost=64 << 10))
    assert all(part.num_rows == 1 for step in steps for part in step) and written(steps) == op.nbytes


def test_rows_next_to_each_other_in_the_source_are_one_range_whatever_a_range_costs():
    (step,) = make_batches([rows(100, 1024, 1024, 4096)], range_cost=0x1000)
    assert len(step) == 1 and step[0].source_span_nbytes == 100 * 1024


def test_batches_are_bounded_in_bytes_and_ranges():
    ops = [rows(1, 100, 0, offset=1000 * i) for i in range(1000)]
    ops += [rows(1, 200 * MIB, 0, offset=MIB), rows(40000, 4096, 16384, offset=2 * MIB)]
    steps = list(make_batches(ops, range_cost=64 << 10))
    assert written(steps) == sum(op.nbytes for op in ops)
    for step in steps:
        assert len(step) <= MAX_BATCH_RANGES
        assert sum(part.source_span_nbytes for part in step) <= MAX_BATCH_BYTES


def test_broadcasts_are_long_ranges_or_packed_ones():
    ops = [rows(1, 3 * MIN_DIRECT_BYTES, 0), rows(1, 100, 0), rows(64, 2 * MIB, 4 * MIB), rows(1, DIRECT_BYTES + 8, 0)]
    steps = list(make_broadcast_steps(ops))
    assert written(steps) == sum(op.nbytes for op in ops)
    check_broadcasts([source_rows(step) for step in steps], DIRECT_BYTES + 8)
    long = [step for step in steps if is_direct(source_rows(step)) and written([step]) > PACKED_BYTES]
    assert [written([step]) for step in long] == [DIRECT_BYTES]
    assert all(written([step]) <= PACKED_BYTES for step in steps if step not in long)


def test_what_is_packed_is_unpacked_elsewhere():
    op = CopyOp(source=0, source_offset=5, target_offset=3, row_nbytes=4, num_rows=3, source_stride=10, target_stride=6)
    single = CopyOp(source=0, source_offset=40, target_offset=30, row_nbytes=7)
    source, target = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    unpack(pack(source_rows([op, single]), source), target_rows([op, single]), target)
    expected = torch.zeros(64, dtype=torch.uint8)
    for row in range(3):
        expected[3 + 6 * row : 7 + 6 * row] = source[5 + 10 * row : 9 + 10 * row]
    expected[30:37] = source[40:47]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("bad", [ByteRows(0, 101), ByteRows(-1, 4), ByteRows(0, 10, 11, 10), ByteRows(0, 4, 0)])
def test_rows_outside_of_the_arena_are_refused(bad):
    with pytest.raises(ValueError, match="outside of the weights"):
        check_broadcasts([(bad,)], 100)


@pytest.mark.parametrize(
    ("client", "rank", "seed", "expected"),
    [
        ({"tp_size": 2}, 1, {"tp_size": 2}, [1]),
        ({}, 0, {"tp_size": 2}, [0, 1]),
        ({"tp_size": 4}, 3, {}, [0]),
        ({"tp_size": 2}, 1, {"tp_size": 4}, [2, 3]),
        ({"tp_size": 2, "pp_size": 2}, 2, {"tp_size": 4}, [0, 1]),
        ({"tp_size": 4}, 0, {"tp_size": 2, "pp_size": 2}, [0, 2]),
        ({"pp_size": 2}, 1, {"pp_size": 4}, [2, 3]),
        ({"tp_size": 2}, 0, {"tp_size": 3}, [0, 1]),
        ({"tp_size": 2, "ep_size": 2}, 0, {"tp_size": 2, "ep_size": 1}, [0, 1]),
        ({"tp_size": 4, "ep_size": 4}, 1, {"tp_size": 4, "ep_size": 2}, [0, 1]),
    ],
)
def test_the_ranks_whose_shares_overlap_are_asked_first(client, rank, seed, expected):
    own, theirs = sm.ranks_of(**client)[rank], sm.ranks_of(**seed)[0]
    assert likely_shard_ranks(own, theirs) == expected


def test_replicas_are_taken_in_turns():
    own = sm.ranks_of(tp_size=2, dp_size=2)
    chosen = [choose_replica(parallel, 2) for parallel in own]
    assert chosen[0] != chosen[1] and chosen[0] != chosen[2] and set(chosen) == {0, 1}
    assert choose_replica(own[0], 1) == 0
