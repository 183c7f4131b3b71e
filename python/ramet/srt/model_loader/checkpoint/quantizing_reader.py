"""Owns what takes more than a copy: quantising rows of checkpoint matrices, decoding scales, turning matrices round."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ramet.srt.layers.quantization.dequantize import powers_of_two
from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.read_range import read_range
from ramet.srt.model_loader.checkpoint.cache_scale_check import check_cache_scale
from ramet.srt.model_loader.checkpoint.checks import EXPONENTS
from ramet.srt.model_loader.checkpoint.quantized import CacheScaleJob, Job, QuantizeJob, ScaleJob, TurnJob
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
    elif isinstance(job, TurnJob):
        for target, source in _turned(job, fds, arena):
            target.copy_(source)
    elif isinstance(job, CacheScaleJob):
        _settle_cache_scale(job, fds, arena)
    else:
        _settle_scales(job, fds, arena)


def _quantize(job: QuantizeJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    start, stop = job.rows
    quantized, scale = quantize_rows(_read(fds[job.path], job.info.part(0, start, stop), arena))
    *outer, row, column = job.target_start
    rows: tuple[int | slice, ...] = (*outer, slice(row, row + stop - start))
    first, last = job.columns
    arena.tensor(job.weight)[(*rows, slice(column, column + last - first))] = quantized[:, first:last]
    arena.tensor(job.scale)[rows] = scale


def _settle_scales(job: ScaleJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    scales = _read(fds[job.path], job.info, arena)
    if not scales.isfinite().all():
        raise ValueError(f"{job.path}: {job.box.checkpoint_name} holds scales that are no numbers")
    target = arena.tensor(job.scale)[_slices(job.box.target)]
    if scales.numel() == 1:
        target.fill_(scales.item())
    else:
        target.copy_(scales[_slices(job.box.source)].reshape(target.shape))


def _settle_cache_scale(job: CacheScaleJob, fds: Mapping[str, int], arena: WeightArena) -> None:
    value = 1.0
    if job.found is not None:
        path, info = job.found
        value = float(_read(fds[path], info, arena).item())
        check_cache_scale(value, job.box.checkpoint_name, path)
    arena.tensor(job.scale)[_slices(job.box.target)].fill_(value)


def _turned(job: TurnJob, fds: Mapping[str, int], arena: WeightArena) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part of the arena, and what belongs there; read once."""
    start = min(info.offset for info, _ in job.parts)
    stop = max(info.offset + info.span_nbytes for info, _ in job.parts)
    raw = _read_bytes(fds[job.path], start, stop - start, arena)
    for info, place in job.parts:
        target = arena.tensor(job.entry)[_slices(place)]
        yield target, _as_tensor(raw[info.offset - start :], info).view(target.shape)


def find_wrong(
    jobs: Sequence[Job], fds: Mapping[str, int], arena: WeightArena, num_samples: int, generator: random.Random
) -> str | None:
    """An entry whose content is not what was to be turned round into it, going by some lines of the files.

    Raises:
        OSError: if a file can't be read.
    """
    turned = [job for job in jobs if isinstance(job, TurnJob)]
    for job in generator.choices(turned, k=num_samples) if turned else ():
        sample = TurnJob(job.path, (_line(*generator.choice(job.parts), generator),), job.entry)
        for held, expected in _turned(sample, fds, arena):
            if not torch.equal(_bytes(held), _bytes(expected.to(held.dtype))):
                return job.entry.name
    return None


def _line(info: TensorInfo, target: Region, generator: random.Random) -> tuple[TensorInfo, Region]:
    """Numbers of a part that lie side by side in the file, and where they belong."""
    place, first = list(target), len(target) - len(info.shape)
    dim = min(range(len(info.shape)), key=lambda axis: info.all_strides[axis])
    for axis, extent in enumerate(info.shape):
        if axis != dim:
            index = generator.randrange(extent)
            info = info.part(axis, index, index + 1)
            start = target[first + axis][0] + index
            place[first + axis] = (start, start + 1)
    return info, tuple(place)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _read(fd: int, info: TensorInfo, arena: WeightArena) -> torch.Tensor:
    """A checkpoint tensor on the arena's device, in float32."""
    raw = _read_bytes(fd, info.offset, info.span_nbytes, arena)
    if info.dtype in EXPONENTS:
        return powers_of_two(raw.as_strided(info.shape, info.all_strides))
    return _as_tensor(raw, info).float()


def _as_tensor(raw: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """The tensor whose first byte is the first of `raw`."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    size = dtype.itemsize
    elements = raw[: info.span_nbytes].view(dtype)
    return elements.as_strided(info.shape, [stride // size for stride in info.all_strides])


def _read_bytes(fd: int, offset: int, nbytes: int, arena: WeightArena) -> torch.Tensor:
    buffer = arena.host_buffer(nbytes)
    read_range([fd], 0, offset, buffer.numpy().data)
    return buffer.to(arena.byte_tensor().device, non_blocking=True)
