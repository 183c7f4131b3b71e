"""Owns filling an arena from safetensors files. Knows the container and its failures; the planner says what to read."""

import contextlib
import itertools
import logging
import os
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host_reader import fill_memory_from_files
from ramet.srt.model_loader.arena.read_range import ShortReadError
from ramet.srt.model_loader.checkpoint.cache_scales import settle_cache_scales
from ramet.srt.model_loader.checkpoint.checks import check_checkpoint, is_harmless, is_quantised_here, settle_scales
from ramet.srt.model_loader.checkpoint.fused_tensors import split_fused
from ramet.srt.model_loader.checkpoint.idle_tensors import without_idle
from ramet.srt.model_loader.checkpoint.quantized import (
    CacheScaleJob,
    Job,
    QuantizeJob,
    ScaleJob,
    TurnJob,
    split_manifest,
)
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, find_checkpoint_files, read_header
from ramet.srt.model_loader.checkpoint.stacked_experts import has_transposed_experts, split_stacked_experts
from ramet.srt.model_loader.checkpoint.tied_head import has_own_head
from ramet.srt.model_loader.checkpoint.whole_model import EMBEDDING, HEAD, WholeModel, describe_rank
from ramet.srt.weights.copy_op import CopyOp, random_part, split_op
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.planner import TensorSource, TransferPlan, plan, whole_tensor, zero_ranges

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
MIN_SAMPLED_BYTES = 64 << 10  # one sample stands for at least so many bytes
MAX_SAMPLES = 2048  # and a few more, where operations are short


def settle_names(
    path: str, tensors: Mapping[str, TensorInfo], whole: WholeModel, are_transposed: bool = False
) -> dict[str, TensorInfo]:
    """The tensors of a file under the names, and in the pieces, that boxes have.

    Args:
        are_transposed: see `has_transposed_experts`.

    Raises:
        ValueError: if it holds something twice, or scales that can't be taken apart.
    """
    block_size = None if whole.quantization is None else whole.quantization.block_size
    block_rows = None if block_size is None else block_size[0]
    unstacked = split_stacked_experts(path, tensors, whole.shapes, block_size, are_transposed)
    settled = settle_scales(split_fused(path, unstacked, whole.shapes, block_rows), whole)
    return settle_cache_scales(path, settled, whole)


class CheckpointSource:
    """The safetensors files of one model folder.

    Everything about the files is checked when it is opened and planned, before the first byte of a
    tensor is read. Errors are ValueErrors that name the file and the tensor.
    """

    name = "checkpoint"

    def __init__(self, folder: str, whole: WholeModel | None = None) -> None:
        """
        Args:
            whole: what the files must hold; None where that is known by a rank's manifest alone.

        Raises:
            ValueError: if the files are broken, or hold something else.
        """
        self.folder = folder
        self._whole = whole
        self._jobs: list[Job] = []
        self.files: dict[str, dict[str, TensorInfo]] = {}
        self._unlisted: set[str] = set()
        for path, promised in find_checkpoint_files(folder).items():
            tensors = read_header(path)
            for name in sorted(promised or ()):
                if name not in tensors:
                    raise ValueError(f"{path} does not have {name}, though the index says so")
            self.files[path] = tensors
            self._unlisted.update(() if promised is None else tensors.keys() - promised)
        self._reject_duplicates()
        if whole is not None:
            self._settle(whole)

    def _reject_duplicates(self) -> None:
        first: dict[str, str] = {}
        for path, tensors in self.files.items():
            for name in tensors:
                if name in first:
                    raise ValueError(f"{name} is in two files, {first[name]} and {path}")
                first[name] = path

    def _settle(self, whole: WholeModel) -> None:
        """Bring the tensors under the names that boxes have, and check that they are those of the model."""
        if unlisted := sorted(name for name in self._unlisted if not is_harmless(name)):
            raise ValueError(f"{self.folder}: the index does not name {name_some(unlisted)}, though its files have it")
        are_transposed = self._has_transposed_experts(whole)
        for path, tensors in self.files.items():
            self.files[path] = without_idle(path, settle_names(path, tensors, whole, are_transposed), whole)
        self._reject_duplicates()
        found = self._tensors()
        check_checkpoint(found, whole, self._describe())
        if whole.is_tied and whole.has_head and has_own_head(found):
            raise ValueError(
                f"{self.folder} holds an output head of its own ({HEAD} differs from {EMBEDDING}), but the model was "
                "built with the embedding's table in its place, as its config or another instance said"
            )

    def _has_transposed_experts(self, whole: WholeModel) -> bool:
        shapes = [(name, info.shape) for name, (_, info) in self._tensors().items() if name not in whole.shapes]
        try:
            return has_transposed_experts(shapes, whole.hidden_size)
        except ValueError as error:
            raise ValueError(f"{self._describe()}: {error}") from None

    def plan(self, manifest: WeightManifest, unfinished: Sequence[CopyOp] | None = None) -> TransferPlan:
        """What to read for a manifest; `op.source` is an index into the files.

        Args:
            unfinished: of another source's plan: only that is read.

        Raises:
            ValueError: if a tensor is missing, surplus or of the wrong shape or an unconvertible dtype.
        """
        whole = self._whole
        if whole is None:
            whole = describe_rank(manifest)
            self._settle(whole)
        tensors = self._tensors()
        manifest, self._jobs = split_manifest(manifest, tensors, is_online=is_quantised_here(tensors, whole))
        sources = [
            TensorSource(
                name=path,
                holdings={name: [whole_tensor(t.shape, t.offset, t.dtype, t.strides)] for name, t in tensors.items()},
                casts=True,
            )
            for path, tensors in self.files.items()
        ]
        return plan(manifest, sources, unfinished=unfinished)

    def fill(self, transfer_plan: TransferPlan, arena: WeightArena) -> None:
        """Read the planned ranges into the arena.

        Raises:
            MemoryError: if the arena does not fit into memory.
            ValueError: if a file can't be read any more or has become shorter.
        """
        arena.prepare_fill(zero_ranges(arena.manifest))
        with self._open_files() as fds:
            arena.fill_from_files(transfer_plan.ops, list(fds.values()))
        if self._jobs:
            from ramet.srt.model_loader.checkpoint.quantizing_reader import fill_quantized

            with self._open_files() as fds:
                fill_quantized(self._jobs, fds, arena)

    def find_difference(self, arena: WeightArena) -> str | None:
        """A tensor whose content in the arena is not that of the files, going by a few thousand samples.

        They are spread evenly and lie at random, so that nobody can know beforehand which bytes are not looked at.

        Raises:
            ValueError: if the files don't have the arena's tensors, or can't be read.
        """
        transfer_plan = self.plan(arena.manifest)
        grain = max(MIN_SAMPLED_BYTES, transfer_plan.nbytes // MAX_SAMPLES)
        generator = random.Random(secrets.randbits(128))
        samples = [
            random_part(part, SAMPLE_BYTES, generator) for op in transfer_plan.ops for part in split_op(op, grain)
        ]
        ends = [0, *itertools.accumulate(sample.nbytes for sample in samples)]
        side_by_side = [replace(sample, target_offset=end) for sample, end in zip(samples, ends, strict=False)]
        expected = bytearray(ends[-1])
        with self._open_files() as fds, memoryview(expected) as memory:
            fill_memory_from_files(side_by_side, list(fds.values()), memory)
            if any(isinstance(job, TurnJob) for job in self._jobs):
                from ramet.srt.model_loader.checkpoint.quantizing_reader import find_wrong

                if wrong := find_wrong(self._jobs, fds, arena, MAX_SAMPLES, generator):
                    return wrong
        held = arena.gather([(sample.target_offset, sample.target_stop) for sample in samples])
        if held == expected:
            return None
        first = next(i for i, (a, b) in enumerate(itertools.pairwise(ends)) if held[a:b] != expected[a:b])
        offset = samples[first].target_offset
        return next(entry.name for entry in reversed(arena.manifest.entries) if entry.offset <= offset)

    @property
    def converted_names(self) -> list[str]:
        """Entries that the last plan does not copy but makes: what `find_difference` cannot compare."""
        quantised = {job.weight.name for job in self._jobs if isinstance(job, QuantizeJob)}
        return sorted(quantised | {job.scale.name for job in self._jobs if isinstance(job, ScaleJob | CacheScaleJob)})

    @contextlib.contextmanager
    def _open_files(self) -> Iterator[dict[str, int]]:
        """Descriptors of the files, by path, in their order; what goes wrong while they are read is a ValueError."""
        paths = list(self.files)
        with contextlib.ExitStack() as stack:
            fds = {}
            for path in paths:
                fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fds[path])
            try:
                yield fds
            except ShortReadError as error:
                raise ValueError(f"{paths[error.fd_index]} is truncated: {error}") from error
            except OSError as error:
                raise ValueError(f"cannot read the weights in {self.folder}: {error}") from error

    def _tensors(self) -> Mapping[str, tuple[str, TensorInfo]]:
        return {name: (path, info) for path, tensors in self.files.items() for name, info in tensors.items()}

    def _describe(self) -> str:
        paths = list(self.files)
        return paths[0] if len(paths) == 1 else f"{self.folder} ({len(paths)} files)"
