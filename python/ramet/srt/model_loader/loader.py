"""Owns the choice of a loader, and making weights up. The loaders choose their sources; those move the bytes."""

import hashlib
import time
from typing import Protocol

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.managers.io_struct import LoadReport
from ramet.srt.model_loader.checkpoint_loader import DefaultModelLoader, log_report
from ramet.srt.model_loader.remote_instance_loader import RemoteInstanceModelLoader
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_manifest import WeightEntry, WeightManifest

DUMMY_SCALE = 0.02
DUMMY_PATTERN_LEN = 1_048_573  # a prime, so that repeating the pattern makes no two rows of a matrix equal


class ModelLoader(Protocol):
    """Fills a rank's arena."""

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        """Fill the arena in place and say how.

        Raises:
            ValueError: if what the user gave (a folder, an address) does not give the weights.
            MemoryError: if they don't fit into memory.
            WeightTransferError: if a seed failed and there is no fallback.
        """
        ...


def get_model_loader(config: LoadConfig) -> ModelLoader:
    """The loader for a load format."""
    if config.load_format in ("auto", "safetensors"):
        return DefaultModelLoader()
    if config.load_format == "dummy":
        return DummyModelLoader(config.random_seed)
    if config.load_format == "remote_instance":
        return RemoteInstanceModelLoader(config)
    raise ValueError(f"unknown load format {config.load_format!r}")


class DummyModelLoader:
    """Makes weights up: the same ones for the same random seed, tensor names and slices."""

    def __init__(self, random_seed: int) -> None:
        self.random_seed = random_seed

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        start = time.perf_counter()
        arena.restore_own_memory()
        arena.require_memory()
        for entry in manifest.entries:
            self._fill_entry(entry, arena)
        report = LoadReport(
            source="dummy", num_bytes=manifest.payload_nbytes, seconds=time.perf_counter() - start, verified=False
        )
        log_report(manifest, report)
        return report

    def _fill_entry(self, entry: WeightEntry, arena: WeightArena) -> None:
        import torch

        tensor = arena.tensor(entry)
        for box in entry.boxes:
            view = tensor[tuple(slice(start, stop) for start, stop in box.target)]
            identity = f"{self.random_seed} {box.checkpoint_name} {box.source}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(identity).digest()[:7], "little"))
            pattern = torch.rand(min(view.numel(), DUMMY_PATTERN_LEN), generator=generator).sub_(0.5)
            pattern = pattern.mul_(2 * DUMMY_SCALE).add_(1.0 if "norm" in box.checkpoint_name else 0.0)
            repeats = -(-view.numel() // max(1, pattern.numel()))
            view.copy_(pattern.to(view.dtype).repeat(repeats)[: view.numel()].view(view.shape))
