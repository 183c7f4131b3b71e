"""Owns reading rows of checkpoint matrices and quantising them into an arena, where the arena is."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.read_range import read_range
from ramet.srt.model_loader.checkpoint.quantized import QuantizeJob
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.utils.threads import run_in_threads

COMMON_BLOCK = 128


def fill_quantized(jobs: Sequence[QuantizeJob], fds: Mapping[str, int], arena: WeightArena) -> None:
    """Run the jobs, several at a time.

    Args:
        fds: open files by path.

    Raises:
        OSError: if a file can't be read or is shorter than its header says.
    """

    def make_worker() -> Callable[[QuantizeJob], None]:
        arena.make_current()
        return lambda job: _run(job, fds, arena)

    run_in_threads(jobs, make_worker, "quantize-weights")
    arena.synchronize()


def _run(job: QuantizeJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    num_columns = job.info.shape[1]
    start, stop = job.rows
    row_nbytes = job.info.nbytes // job.info.shape[0]
    raw = _read(fds[job.path], job.info, start * row_nbytes, (stop - start) * row_nbytes, arena)
    values = raw.view(stop - start, num_columns).float()
    if job.source_scale is not None:
        path, info = job.source_scale
        scales = _read(fds[path], info, 0, info.nbytes, arena).float().view(info.shape)
        values = values * _expand_scales(scales, job)
    quantized, scale = quantize_rows(values)
    *outer, row, column = job.target_start
    rows: tuple[int | slice, ...] = (*outer, slice(row, row + stop - start))
    first, last = job.columns
    arena.tensor(job.weight)[(*rows, slice(column, column + last - first))] = quantized[:, first:last]
    arena.tensor(job.scale)[rows] = scale


def _read(fd: int, info: TensorInfo, offset: int, nbytes: int, arena: WeightArena) -> torch.Tensor:
    """Some bytes of a checkpoint tensor, on the arena's device, as a flat tensor of its type."""
    buffer = arena.host_buffer(nbytes)
    read_range([fd], 0, info.offset + offset, buffer.numpy().data)
    return buffer.to(arena.byte_tensor().device, non_blocking=True).view(getattr(torch, info.dtype))


def _expand_scales(scales: torch.Tensor, job: QuantizeJob) -> torch.Tensor:
    """The checkpoint's scales as something that multiplies the job's rows.

    Raises:
        ValueError: if their shape is not that of a tensor, of rows or of equal blocks.
    """
    num_rows, num_columns = job.info.shape
    if scales.numel() == 1:
        return scales.view(1, 1)
    if scales.dim() == 1:
        scales = scales.unsqueeze(1)
    if scales.dim() != 2:
        raise ValueError(
            f"{job.path}: scales of the shape {tuple(scales.shape)} for {job.info.shape} are not supported"
        )
    rows = torch.arange(*job.rows, device=scales.device) // _block_len(num_rows, scales.shape[0], job)
    columns = torch.arange(num_columns, device=scales.device) // _block_len(num_columns, scales.shape[1], job)
    return scales[rows][:, columns]


def _block_len(extent: int, count: int, job: QuantizeJob) -> int:
    """Rows or columns that share a scale: equal parts, or the common length with a shorter last one."""
    if extent % count == 0:
        return extent // count
    if -(-extent // COMMON_BLOCK) == count:
        return COMMON_BLOCK
    raise ValueError(f"{job.path}: {count} scales for {extent} rows or columns of a matrix for {job.weight.name}")
