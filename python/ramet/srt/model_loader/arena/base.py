"""Owns the one allocation that holds a rank's weights, and the parameters' views into it. Moves no bytes itself."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry, WeightManifest, dtype_name

if TYPE_CHECKING:
    import torch

    from ramet.srt.weights.copy_op import CopyOp


class WeightArena(ABC):
    """A rank's weights at addresses that never change, on some device."""

    device: str  # "cpu" or "cuda"
    checksum_algorithm: str
    nbytes: int
    address: int

    def __init__(self, manifest: WeightManifest) -> None:
        self.manifest = manifest
        self.checksums: WeightChecksums | None = None  # of what is in it, once a source has made sure
        self.is_published = False

    def bind(self, model: "torch.nn.Module") -> None:
        """Make every parameter of the model a view into the arena; tied ones stay one object.

        Raises:
            ValueError: if a parameter is not in the manifest, or has another shape or dtype there.
        """
        import torch

        entries = {name: entry for entry in self.manifest.entries for name in (entry.name, *entry.aliases)}
        bound: dict[str, torch.nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            entry = entries.get(name)
            if entry is None:
                raise ValueError(f"parameter {name} is not in the arena's manifest")
            if tuple(parameter.shape) != entry.shape or dtype_name(parameter.dtype) != entry.dtype:
                raise ValueError(
                    f"parameter {name} is {tuple(parameter.shape)} {dtype_name(parameter.dtype)}, "
                    f"but {entry.shape} {entry.dtype} in the arena's manifest"
                )
            if entry.name not in bound:
                view = torch.nn.Parameter(self.tensor(entry), requires_grad=False)
                view.__dict__.update(parameter.__dict__)
                bound[entry.name] = view
            module_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module_name), attribute, bound[entry.name])

    @abstractmethod
    def tensor(self, entry: WeightEntry) -> "torch.Tensor":
        """The entry's view into the arena, of the entry's shape and dtype."""

    def work_context(self) -> contextlib.AbstractContextManager[object]:
        """Around work on the arena's tensors: on a GPU it goes to the arena's own stream, which is never captured."""
        return contextlib.nullcontext()

    @abstractmethod
    def byte_tensor(self) -> "torch.Tensor":
        """All bytes of the arena: uint8, [nbytes], on its device."""

    @abstractmethod
    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        """Get the own memory ready for a source that writes to it.

        Args:
            zeroed: byte ranges to clear, because the source will not write them.

        Raises:
            MemoryError: if less memory is free than the arena still has to take. It is an error now rather than
                a killed process later.
        """

    @abstractmethod
    def open_receive_window(self, max_batch_nbytes: int) -> "ReceiveWindow":
        """Addresses for a writer that may have to be abandoned.

        Args:
            max_batch_nbytes: most source bytes that it receives in one batch.
        """

    @abstractmethod
    def drop_memory(self) -> None:
        """Part the arena from what an abandoned writer may still write to; the content is lost."""

    @abstractmethod
    def read_bytes(self, start: int, stop: int) -> bytes:
        """A few of the arena's bytes, on the host."""

    def populate(self) -> None:
        """Take all memory now, where that has not been done: for a writer that is slow at the first touch of a page."""
        return

    def publish(self) -> None:
        """Declare the content final: from now on others may read it, and no source may fill it."""
        self.is_published = True

    def _require_private(self) -> None:
        if self.is_published:
            raise RuntimeError("a published arena is immutable")


class ReceiveWindow(ABC):
    """Addresses through which a transport fills an arena, and which can be cut off from it at any moment.

    A transfer that was given up may still write when its peer comes back: to the window, which is no part of the
    arena by then. The addresses stay taken for as long as the transport might use them.
    """

    address: int
    nbytes: int

    @abstractmethod
    def place(self, batch: "Sequence[CopyOp]") -> list[int]:
        """Where to receive the source bytes of each of a batch's operations, from its first row to its last."""

    @abstractmethod
    def deliver(self, batch: "Sequence[CopyOp]") -> None:
        """Bring a batch that has been received into the arena."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything delivered is in the arena."""

    @abstractmethod
    def cut_off(self) -> None:
        """Part the window from the arena for good; the addresses stay valid."""

    @abstractmethod
    def close(self) -> None:
        """Give the addresses back: only when nobody writes to them any more."""
