"""Owns queueing planned copies between places of device memory."""

import ctypes
from collections.abc import Sequence

from ramet.srt.utils.cuda_driver import Copy2D, call_driver
from ramet.srt.weights.copy_op import CopyOp

_MEMORY_TYPE_DEVICE = 2


def queue_copies(ops: Sequence[CopyOp], source: int, target: int, stream: int) -> None:
    """Queue copies between device memories on a stream: the offsets of `ops` are from these addresses.

    Raises:
        OSError: if the driver refuses one.
    """
    for op in ops:
        source_address, target_address = source + op.source_offset, target + op.target_offset
        if op.num_rows == 1:
            call_driver("cuMemcpyDtoDAsync_v2", target_address, source_address, op.row_nbytes, stream)
            continue
        copy = Copy2D(
            source_memory_type=_MEMORY_TYPE_DEVICE,
            source_device=source_address,
            source_pitch=op.source_stride,
            target_memory_type=_MEMORY_TYPE_DEVICE,
            target_device=target_address,
            target_pitch=op.target_stride,
            width=op.row_nbytes,
            height=op.num_rows,
        )
        call_driver("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)
