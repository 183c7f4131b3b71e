"""Owns the copy operations of a plan: which bytes of which source fill which bytes of an arena; cutting, joining."""

import random
from collections.abc import Iterable, Iterator

import msgspec

from ramet.srt.weights.manifest import element_size


class CopyOp(msgspec.Struct, frozen=True, kw_only=True):
    """A two-dimensional copy: `num_rows` rows, each contiguous on both sides. All numbers are bytes."""

    source: int  # index into the sources that were planned with
    source_offset: int
    target_offset: int
    row_nbytes: int  # in the target
    num_rows: int = 1
    source_stride: int = 0
    target_stride: int = 0
    source_dtype: str = ""  # both empty unless the elements are converted
    target_dtype: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return self.row_nbytes * self.num_rows

    @property
    def source_row_nbytes(self) -> int:
        """Bytes of a row in the source."""
        if not self.source_dtype:
            return self.row_nbytes
        return self.row_nbytes // element_size(self.target_dtype) * element_size(self.source_dtype)

    @property
    def source_span_nbytes(self) -> int:
        """Source bytes from the first row's start to the last one's end."""
        return (self.num_rows - 1) * self.source_stride + self.source_row_nbytes

    @property
    def is_contiguous(self) -> bool:
        return self.num_rows == 1 and not self.source_dtype

    def rows(self) -> "Iterator[CopyOp]":
        """Its rows as operations of their own."""
        if self.num_rows == 1:
            yield self
            return
        for row in range(self.num_rows):
            yield msgspec.structs.replace(
                self,
                source_offset=self.source_offset + row * self.source_stride,
                target_offset=self.target_offset + row * self.target_stride,
                num_rows=1,
            )

    @property
    def target_stop(self) -> int:
        return self.target_offset + (self.num_rows - 1) * self.target_stride + self.row_nbytes


def split_op(op: CopyOp, max_nbytes: int) -> Iterator[CopyOp]:
    """The operation in parts of at most `max_nbytes`, by rows or, if there is one row, by bytes."""
    if op.nbytes <= max_nbytes:
        yield op
    elif op.num_rows > 1:
        step = max(1, max_nbytes // op.row_nbytes)
        for row in range(0, op.num_rows, step):
            yield msgspec.structs.replace(
                op,
                source_offset=op.source_offset + row * op.source_stride,
                target_offset=op.target_offset + row * op.target_stride,
                num_rows=min(step, op.num_rows - row),
            )
    else:
        size = element_size(op.target_dtype) if op.target_dtype else 1
        step = max(size, max_nbytes // size * size)
        for done in range(0, op.row_nbytes, step):
            source_done = done // size * element_size(op.source_dtype) if op.source_dtype else done
            yield msgspec.structs.replace(
                op,
                source_offset=op.source_offset + source_done,
                target_offset=op.target_offset + done,
                row_nbytes=min(step, op.row_nbytes - done),
            )


def random_part(op: CopyOp, max_nbytes: int, generator: random.Random) -> CopyOp:
    """At most `max_nbytes` of one of its rows, anywhere."""
    row = generator.randrange(op.num_rows)
    target_size = element_size(op.target_dtype) if op.target_dtype else 1
    source_size = element_size(op.source_dtype) if op.source_dtype else 1
    num_elements = op.row_nbytes // target_size
    length = min(num_elements, max(1, max_nbytes // target_size))
    first = generator.randrange(num_elements - length + 1)
    return msgspec.structs.replace(
        op,
        source_offset=op.source_offset + row * op.source_stride + first * source_size,
        target_offset=op.target_offset + row * op.target_stride + first * target_size,
        row_nbytes=length * target_size,
        num_rows=1,
    )


def split_by_source(op: CopyOp, max_nbytes: int) -> Iterator[CopyOp]:
    """The operation in parts that reach over at most `max_nbytes` of the source, or by single rows that are longer."""
    reach = max(op.source_stride, op.source_row_nbytes) / op.row_nbytes  # source bytes per target byte
    return split_op(op, max(1, int(max_nbytes / reach)))


def join_neighbours(ops: Iterable[CopyOp]) -> list[CopyOp]:
    """The same copies, in their order, with those in one that follow each other on both sides."""
    joined: list[CopyOp] = []
    for op in ops:
        last = joined[-1] if joined else None
        if last is not None and last.is_contiguous and op.is_contiguous:
            source_stop = last.source_offset + last.row_nbytes
            if (source_stop, last.target_stop) == (op.source_offset, op.target_offset):
                joined[-1] = msgspec.structs.replace(last, row_nbytes=last.row_nbytes + op.row_nbytes)
                continue
        joined.append(op)
    return joined
