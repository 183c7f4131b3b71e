"""Owns sorting rows out on the device where an arena lies."""

import torch

from ramet.srt.weights.copy_op import CopyOp


def scatter_device_rows(op: CopyOp, source: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy rows, converting them if the operation says so.

    Args:
        source: uint8, starts with the first row.
        buffer: uint8, the whole arena.
    """
    source_dtype = getattr(torch, op.source_dtype) if op.source_dtype else torch.uint8
    target_dtype = getattr(torch, op.target_dtype) if op.target_dtype else torch.uint8
    length = op.row_nbytes // target_dtype.itemsize

    def rows(data: torch.Tensor, dtype: torch.dtype, stride: int) -> torch.Tensor:
        return data.view(dtype).as_strided((op.num_rows, length), (stride // dtype.itemsize, 1))

    target = rows(buffer[op.target_offset : op.target_stop], target_dtype, op.target_stride)
    target.copy_(rows(source, source_dtype, op.source_stride))
