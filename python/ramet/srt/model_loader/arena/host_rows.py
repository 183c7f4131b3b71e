"""Owns copying rows out of a block of bytes into host memory, converted where their dtype is another."""

import numpy as np

from ramet.srt.weights.copy_op import CopyOp


def scatter_rows(op: CopyOp, memory: memoryview, block: memoryview) -> None:
    """Copy or convert the rows out of a block that starts with the first one."""
    if op.source_dtype:
        _convert_rows(op, memory, block)
        return
    shape = (op.num_rows, op.row_nbytes)
    source = np.ndarray(shape, np.uint8, block, strides=(op.source_stride, 1))
    target = np.ndarray(shape, np.uint8, memory, op.target_offset, strides=(op.target_stride, 1))
    np.copyto(target, source)


def _convert_rows(op: CopyOp, memory: memoryview, block: memoryview) -> None:
    import torch

    source_dtype, target_dtype = getattr(torch, op.source_dtype), getattr(torch, op.target_dtype)
    length = op.row_nbytes // target_dtype.itemsize

    def rows(buffer: memoryview, offset: int, dtype: "torch.dtype", stride: int) -> "torch.Tensor":
        span = (op.num_rows - 1) * stride // dtype.itemsize + length
        flat = torch.frombuffer(buffer, dtype=dtype, count=span, offset=offset)
        return flat.as_strided((op.num_rows, length), (stride // dtype.itemsize, 1))

    target = rows(memory, op.target_offset, target_dtype, op.target_stride)
    target.copy_(rows(block, 0, source_dtype, op.source_stride))
