"""Owns how planned ranges become few large broadcasts, and what is packed together. Both sides of a pair use it."""

from collections.abc import Iterator, Sequence

import msgspec
import torch

from ramet.srt.weights.copy_op import CopyOp, join_neighbours, split_op

DIRECT_BYTES = 1 << 30  # a broadcast straight out of the one arena into the other
MIN_DIRECT_BYTES = 1 << 20
PACKED_BYTES = 32 << 20  # rows and small ranges, gathered into a buffer


class ByteRows(msgspec.Struct, frozen=True, array_like=True):
    """Rows of bytes in an arena, `stride` bytes apart."""

    offset: int
    nbytes: int  # of each
    count: int = 1
    stride: int = 0

    @property
    def stop(self) -> int:
        return self.offset + (self.count - 1) * self.stride + self.nbytes

    @property
    def total_nbytes(self) -> int:
        return self.nbytes * self.count


Broadcast = tuple[ByteRows, ...]  # what one broadcast carries, in this order


def make_broadcast_steps(ops: Sequence[CopyOp]) -> Iterator[list[CopyOp]]:
    """The operations of each broadcast: one long range, or several that are packed."""
    packed: list[CopyOp] = []
    nbytes = 0
    for op in join_neighbours(ops):  # the planner has cut ranges to share them between seeds
        if op.num_rows == 1 and op.nbytes >= MIN_DIRECT_BYTES:
            yield from ([part] for part in split_op(op, DIRECT_BYTES))
            continue
        for part in (piece for rows in split_op(op, PACKED_BYTES) for piece in split_op(rows, PACKED_BYTES)):
            if packed and nbytes + part.nbytes > PACKED_BYTES:
                yield packed
                packed, nbytes = [], 0
            packed.append(part)
            nbytes += part.nbytes
    if packed:
        yield packed


def source_rows(step: Sequence[CopyOp]) -> Broadcast:
    """What the sender must send for a step."""
    return tuple(ByteRows(op.source_offset, op.row_nbytes, op.num_rows, op.source_stride) for op in step)


def target_rows(step: Sequence[CopyOp]) -> Broadcast:
    """Where the receiver puts it."""
    return tuple(ByteRows(op.target_offset, op.row_nbytes, op.num_rows, op.target_stride) for op in step)


def is_direct(broadcast: Broadcast) -> bool:
    return len(broadcast) == 1 and broadcast[0].count == 1


def pack(broadcast: Broadcast, memory: torch.Tensor) -> torch.Tensor:
    """What to send: a view into the arena's bytes (uint8, 1-D), or its rows gathered into a new tensor."""
    if is_direct(broadcast):
        rows = broadcast[0]
        return memory[rows.offset : rows.stop]
    buffer = packing_buffer(broadcast, memory.device)
    position = 0
    for rows in broadcast:
        part = buffer[position : position + rows.total_nbytes].view(rows.count, rows.nbytes)
        part.copy_(_view(rows, memory))
        position += rows.total_nbytes
    return buffer


def unpack(buffer: torch.Tensor, broadcast: Broadcast, memory: torch.Tensor) -> None:
    """Put what was received where it belongs."""
    position = 0
    for rows in broadcast:
        part = buffer[position : position + rows.total_nbytes].view(rows.count, rows.nbytes)
        _view(rows, memory).copy_(part)
        position += rows.total_nbytes


def packing_buffer(broadcast: Broadcast, device: torch.device) -> torch.Tensor:
    return torch.empty(sum(rows.total_nbytes for rows in broadcast), dtype=torch.uint8, device=device)


def _view(rows: ByteRows, memory: torch.Tensor) -> torch.Tensor:
    """[count, nbytes] of the arena's bytes."""
    return memory.as_strided((rows.count, rows.nbytes), (rows.stride or rows.nbytes, 1), rows.offset)


def check_broadcasts(broadcasts: Sequence[Broadcast], arena_nbytes: int) -> None:
    """Raise ValueError unless all rows lie inside of an arena, and a buffer suffices for each broadcast."""
    for broadcast in broadcasts:
        for rows in broadcast:
            if min(rows.offset, rows.nbytes, rows.count - 1, rows.stride) < 0 or rows.stop > arena_nbytes:
                raise ValueError(f"the range {tuple(msgspec.to_builtins(rows))} is outside of the weights")
        limit = DIRECT_BYTES if is_direct(broadcast) else PACKED_BYTES
        if sum(rows.total_nbytes for rows in broadcast) > limit:
            raise ValueError(f"a broadcast may have {limit} bytes")
