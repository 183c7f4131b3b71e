"""Owns the choice of a loader, and making weights up. The loaders choose their sources; those move the bytes."""

import functools
import hashlib
import time
from typing import TYPE_CHECKING, Protocol

from ramet.srt.configs.load_config import NO_WEIGHTS, LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import DefaultModelLoader, OpenCheckpoint
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.checkpoint.whole_model import SCALE_SUFFIXES
from ramet.srt.model_loader.client.fan_out import DoorOpener
from ramet.srt.model_loader.client.seed_finder import FinderMaker
from ramet.srt.model_loader.client.seeds_by_address import SeedsByAddress
from ramet.srt.model_loader.remote_instance_loader import RemoteInstanceModelLoader
from ramet.srt.weights.manifest import WeightBox, WeightManifest
from ramet.srt.weights.report import LoadReport, LoadResult

if TYPE_CHECKING:
    import torch

DUMMY_SCALE = 0.02
DUMMY_EXPONENT = 118  # of a scale that is a power of two: 2 ** -9
DUMMY_PATTERN_LEN = 1_048_573  # a prime, so that repeating the pattern makes no two rows of a matrix equal


class ModelLoader(Protocol):
    """Fills a rank's arena."""

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str, /) -> LoadResult:
        """Fill the arena in place and say how; a claim on the files is released if that fails.

        Raises:
            ValueError: if what the user gave (a folder, an address) does not give the weights.
            MemoryError: if they don't fit into memory.
            WeightTransferError: if a seed failed and there is no fallback.
        """
        ...


def get_model_loader(
    config: LoadConfig,
    make_finder: FinderMaker | None = None,
    open_checkpoint: OpenCheckpoint = CheckpointSource,
    open_doors: DoorOpener | None = None,
) -> ModelLoader:
    """The loader for a load format.

    Args:
        make_finder: makes who finds seeds, where they are not at the addresses in `config`.
        open_checkpoint: opens files, where they are read.
        open_doors: lets others take what has come from instances before all has; None: they have to wait.
    """
    if config.load_format in ("auto", "safetensors"):
        return DefaultModelLoader(open_checkpoint, weights_digest=config.weights_digest)
    if config.load_format == "dummy":
        return DummyModelLoader(config.random_seed)
    if config.load_format == NO_WEIGHTS:
        return NoWeightsLoader()
    if config.load_format == "remote_instance":
        finder = make_finder or functools.partial(SeedsByAddress, config)
        return RemoteInstanceModelLoader(config, finder, open_checkpoint, open_doors)
    raise ValueError(f"unknown load format {config.load_format!r}")


class NoWeightsLoader:
    """Leaves zeros in the place of weights that will come by an update: enough to warm up with, and never served."""

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, _model_path: str) -> LoadResult:
        """Clear the arena; see ModelLoader. The path is not read."""
        arena.prepare_fill([(0, manifest.arena_nbytes)])
        arena.is_made_up = True
        return LoadResult(LoadReport(source="none", num_bytes=0, seconds=0.0, verified=False))


class DummyModelLoader:
    """Makes weights up: the same ones for the same random seed, tensor names and slices."""

    def __init__(self, random_seed: int) -> None:
        self.random_seed = random_seed

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, _model_path: str) -> LoadResult:
        """Fill the arena; see ModelLoader. The path is not read."""
        import torch

        start = time.perf_counter()
        arena.prepare_fill([(0, manifest.arena_nbytes)])
        # Twice the pattern, so that it can be read from any place in its first half on.
        noise = torch.rand(DUMMY_PATTERN_LEN, generator=torch.Generator().manual_seed(self.random_seed)).sub_(0.5)
        noise = noise.mul_(2 * DUMMY_SCALE).repeat(2).to(arena.byte_tensor().device)
        for entry in manifest.entries:
            tensor = arena.tensor(entry)
            if entry.name.endswith("_column_groups"):
                continue  # zeros: each is the place of another number
            for box in entry.boxes:
                self._fill_box(tensor[tuple(slice(start, stop) for start, stop in box.target)], box, noise)
        arena.synchronize()  # checksums are computed on another stream
        report = LoadReport(
            source="dummy", num_bytes=manifest.payload_nbytes, seconds=time.perf_counter() - start, verified=False
        )
        return LoadResult(report)

    def _fill_box(self, view: "torch.Tensor", box: WeightBox, noise: "torch.Tensor") -> None:
        """Fill a slice of a parameter; where the pattern starts depends on which slice of which tensor it is."""
        identity = f"{box.checkpoint_name} {box.source}".encode()
        first = int.from_bytes(hashlib.sha256(identity).digest()[:8], "little") % DUMMY_PATTERN_LEN
        pattern = noise[first : first + DUMMY_PATTERN_LEN]
        if "norm" in box.checkpoint_name:
            pattern = pattern + 1.0
        elif box.checkpoint_name.endswith(SCALE_SUFFIXES):
            pattern = pattern.abs()
        if not view.dtype.is_floating_point:
            pattern = self._bits(pattern, view.dtype, is_scale=box.checkpoint_name.endswith(SCALE_SUFFIXES))
        num_repeats = -(-view.numel() // DUMMY_PATTERN_LEN)
        view.copy_(pattern.to(view.dtype).repeat(num_repeats)[: view.numel()].view(view.shape))

    def _bits(self, pattern: "torch.Tensor", dtype: "torch.dtype", *, is_scale: bool) -> "torch.Tensor":
        """Packed numbers of any value; exponents of small scales."""
        import torch

        bits = pattern.contiguous().view(torch.int32)
        return (bits & 3) + DUMMY_EXPONENT if is_scale and dtype == torch.uint8 else bits
