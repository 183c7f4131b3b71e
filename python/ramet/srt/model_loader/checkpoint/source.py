"""Owns filling an arena from safetensors files. Knows the container and its failures; the planner says what to read."""

import contextlib
import logging
import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host_reader import fill_memory_from_files
from ramet.srt.model_loader.arena.read_range import ShortReadError
from ramet.srt.model_loader.checkpoint.quantized import QuantizeJob, split_manifest
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, find_checkpoint_files, read_header
from ramet.srt.model_loader.checkpoint.stacked_experts import split_stacked_experts
from ramet.srt.weights.copy_op import CopyOp, random_part, split_op
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.planner import TensorSource, TransferPlan, plan, whole_tensor, zero_ranges

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
MIN_SAMPLED_BYTES = 64 << 10  # one sample stands for at least so many bytes
MAX_SAMPLES = 4096  # and a few more, where operations are short

# Tables that older checkpoints carry although every engine computes them, and the copy of the embedding that some
# checkpoints carry for a tied head: a model that needs its own lm_head has a box for it.
HARMLESS_SURPLUS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|^lm_head\.weight$"
    # Scales of activations and caches in quantised checkpoints: they are computed as they are needed.
    r"|\.(input|output|k|v|q)_scale$"
)


class CheckpointSource:
    """The safetensors files of one model folder.

    Everything about the files is checked when it is opened and planned, before the first byte of a
    tensor is read. Errors are ValueErrors that name the file and the tensor.
    """

    name = "checkpoint"

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._quantize_jobs: list[QuantizeJob] = []
        self.files: dict[str, dict[str, TensorInfo]] = {}
        for path, promised in find_checkpoint_files(folder).items():
            tensors = read_header(path)
            for name in sorted(promised or ()):
                if name not in tensors:
                    raise ValueError(f"{path} does not have {name}, though the index says so")
            self.files[path] = tensors
        self._reject_duplicates()

    def _reject_duplicates(self) -> None:
        first: dict[str, str] = {}
        for path, tensors in self.files.items():
            for name in tensors:
                if name in first:
                    raise ValueError(f"{name} is in two files, {first[name]} and {path}")
                first[name] = path

    def plan(self, manifest: WeightManifest, unfinished: Sequence[CopyOp] | None = None) -> TransferPlan:
        """What to read for a manifest; `op.source` is an index into the files.

        Args:
            unfinished: of another source's plan: only that is read.

        Raises:
            ValueError: if a tensor is missing, surplus or of the wrong shape or an unconvertible dtype.
        """
        wanted = {box.checkpoint_name for entry in manifest.entries for box in entry.boxes}
        self.files = {path: split_stacked_experts(path, tensors, wanted) for path, tensors in self.files.items()}
        self._reject_duplicates()
        manifest, self._quantize_jobs, used = split_manifest(manifest, self._tensors())
        self._check_names(manifest, used)
        self._check_shapes(manifest)
        sources = [
            TensorSource(
                name=path,
                holdings={name: [whole_tensor(t.shape, t.offset, t.dtype)] for name, t in tensors.items()},
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
        if self._quantize_jobs:
            from ramet.srt.model_loader.checkpoint.quantizing_reader import fill_quantized

            with self._open_files() as fds:
                fill_quantized(self._quantize_jobs, fds, arena)

    def find_difference(self, arena: WeightArena) -> str | None:
        """A tensor whose content in the arena is not that of the files, going by a few thousand samples.

        They are spread evenly and lie at random, so that nobody can know beforehand which bytes are not looked at.

        Raises:
            ValueError: if the files don't have the arena's tensors, or can't be read.
        """
        transfer_plan = self.plan(arena.manifest)
        grain = max(MIN_SAMPLED_BYTES, transfer_plan.nbytes // MAX_SAMPLES)
        samples = [random_part(part, SAMPLE_BYTES) for op in transfer_plan.ops for part in split_op(op, grain)]
        # As large as the arena, but memory is only taken where a sample is written.
        with mmap.mmap(-1, arena.nbytes) as scratch, memoryview(scratch) as memory:
            with self._open_files() as fds:
                fill_memory_from_files(samples, list(fds.values()), memory)
            for row in (row for op in samples for row in op.rows()):
                span = slice(row.target_offset, row.target_stop)
                if memory[span] != arena.read_bytes(row.target_offset, row.target_stop):
                    return next(e.name for e in reversed(arena.manifest.entries) if e.offset <= span.start)
        return None

    @property
    def quantized_names(self) -> list[str]:
        """Entries that the last plan quantises: what `find_difference` cannot compare."""
        return sorted({job.weight.name for job in self._quantize_jobs})

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

    def _check_names(self, manifest: WeightManifest, used: Collection[str]) -> None:
        """`used` are the tensors that are read although the manifest does not name them."""
        tensors = self._tensors()
        needed = {box.checkpoint_name: entry.name for entry in manifest.entries for box in entry.boxes}
        missing = [f"{name} (for {needed[name]})" for name in needed if name not in tensors]
        if missing:
            raise ValueError(f"{self._describe()} lacks {name_some(missing)}")
        parallel = manifest.parallel
        if parallel.pp_size > 1 or parallel.ep_size > 1 or parallel.tp_rank > 0:
            return  # the rest belongs to other ranks; a late one may have nothing but padding of a table
        surplus = []
        for name, (path, _) in tensors.items():
            if name not in needed and name not in used and not HARMLESS_SURPLUS.search(name):
                surplus.append(f"{name} in {os.path.basename(path)}")
        if surplus:
            raise ValueError(f"{self.folder} has tensors that the model does not have: {name_some(surplus)}")

    def _check_shapes(self, manifest: WeightManifest) -> None:
        """Each tensor's shape must be what the boxes reach to; ranks that read only a part can't see it all."""
        tensors = self._tensors()
        extents: dict[str, list[int]] = {}
        for entry in manifest.entries:
            for box in entry.boxes:
                reach = extents.setdefault(box.checkpoint_name, [0] * len(box.source))
                extents[box.checkpoint_name] = [max(a, stop) for a, (_, stop) in zip(reach, box.source, strict=False)]
        parallel = manifest.parallel
        is_whole = parallel.tp_size == parallel.pp_size == parallel.ep_size == 1
        for name, reach in extents.items():
            path, info = tensors[name]
            too_small = len(info.shape) != len(reach) or any(a < b for a, b in zip(info.shape, reach, strict=True))
            if too_small or (is_whole and info.shape != tuple(reach)):
                shape = tuple(reach)
                raise ValueError(f"{path}: {name} has the shape {info.shape}, the model needs {shape}")

    def _describe(self) -> str:
        paths = list(self.files)
        return paths[0] if len(paths) == 1 else f"{self.folder} ({len(paths)} files)"
