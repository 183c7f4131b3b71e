"""Owns what takes more than a copy: quantising rows of checkpoint matrices, and decoding scales, into an arena."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ramet.srt.layers.quantization.dequantize import powers_of_two
from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.read_range import read_range
from ramet.srt.model_loader.checkpoint.checks import EXPONENTS
from ramet.srt.model_loader.checkpoint.quantized import Job, QuantizeJob, ScaleJob
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.utils.threads import run_in_threads
from ramet.srt.weights.boxes import Region


def fill_quantized(jobs: Sequence[Job], fds: Mapping[str, int], arena: WeightArena) -> None:
    """Run the jobs, several at a time.

    Args:
        fds: open files by path.

    Raises:
        OSError: if a file can't be read or is shorter than its header says.
        ValueError: if a scale is no number.
    """

    def make_worker() -> Callable[[Job], None]:
        arena.make_current()
        return lambda job: _run(job, fds, arena)

    run_in_threads(jobs, make_worker, "quantize-weights")
    arena.synchronize()


def _run(job: Job, fds: Mapping[str, int], arena: WeightArena) -> None:
    if isinstance(job, QuantizeJob):
        _quantize(job, fds, arena)
    else:
        _settle_scales(job, fds, arena)


def _quantize(job: QuantizeJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    num_columns = job.info.shape[1]
    start, stop = job.rows
    row_nbytes = job.info.nbytes // job.info.shape[0]
    raw = _read(fds[job.path], job.info, start * row_nbytes, (stop - start) * row_nbytes, arena)
    quantized, scale = quantize_rows(raw.view(stop - start, num_columns))
    *outer, row, column = job.target_start
    rows: tuple[int | slice, ...] = (*outer, slice(row, row + stop - start))
    first, last = job.columns
    arena.tensor(job.weight)[(*rows, slice(column, column + last - first))] = quantized[:, first:last]
    arena.tensor(job.scale)[rows] = scale


def _settle_scales(job: ScaleJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    scales = _read(fds[job.path], job.info, 0, job.info.nbytes, arena)
    if not scales.isfinite().all():
        raise ValueError(f"{job.path}: {job.box.checkpoint_name} holds scales that are no numbers")
    target = arena.tensor(job.scale)[_slices(job.box.target)]
    if scales.numel() == 1:
        target.fill_(scales.item())
    else:
        target.copy_(scales.view(job.info.shape)[_slices(job.box.source)].reshape(target.shape))


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _read(fd: int, info: TensorInfo, offset: int, nbytes: int, arena: WeightArena) -> torch.Tensor:
    """Some bytes of a checkpoint tensor, on the arena's device, as a flat float32 tensor."""
    buffer = arena.host_buffer(nbytes)
    read_range([fd], 0, info.offset + offset, buffer.numpy().data)
    raw = buffer.to(arena.byte_tensor().device, non_blocking=True)
    return powers_of_two(raw) if info.dtype in EXPONENTS else raw.view(getattr(torch, info.dtype)).float()
