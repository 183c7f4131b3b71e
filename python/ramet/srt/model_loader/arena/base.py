"""Owns what an arena is to everybody else: a rank's weights at addresses that stay, on a device that it alone knows."""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.content_digest import DigestTable
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry, WeightManifest, dtype_name

if TYPE_CHECKING:
    import torch

    from ramet.srt.weights.copy_op import CopyOp


READERS_TIMEOUT_S = 10.0  # for those who read the memory before it is given back


@dataclass(frozen=True)
class SharedFile:
    """Host memory for other processes of the host: a file that outlives the process that made it."""

    fd: int


@dataclass(frozen=True)
class LentMemory:
    """A GPU's memory for other processes of the host, to be read while its own process lends it."""

    cuda_ipc_handle: bytes
    offset: int  # of the arena in the memory that the handle opens


@dataclass(frozen=True)
class LentFile:
    """The same by a descriptor, of memory whose pages can be given back; the arena is at its beginning."""

    fd: int  # whoever has it closes it
    nbytes: int  # of all of the memory


MemoryShare = SharedFile | LentMemory | LentFile


class ArenaDoors(Protocol):
    """What others take an arena's content through."""

    def close(self) -> None: ...


class WeightArena(ABC):
    """A rank's weights at addresses that never change, on some device."""

    device: str  # its name, for messages
    broadcast_backend: str  # of torch.distributed, which sends from this memory and receives into it
    checksum_algorithm: str
    watched_nbytes: int  # that may be hashed at once, now and then, beside serving
    can_pass_on = False  # pieces of it can be given on before it is full
    gpu_id = -1  # of the GPU that it is on, among those that this process sees; -1: none
    nbytes: int
    address: int

    def __init__(self, manifest: WeightManifest) -> None:
        self.manifest = manifest
        self.checksums: WeightChecksums | None = None  # of what is in it, once a source has made sure
        self.content_digest: DigestTable | None = None  # of the checkpoint that it was filled from, where that is known
        self.doors: ArenaDoors | None = None  # that are open already; whoever publishes the arena takes them over
        self.is_published = False
        self.is_put_away = False  # there is no memory at the addresses
        self._num_readers = 0  # beside passes
        self._readers_changed = threading.Condition()
        self.is_made_up = False  # of content that must never serve, nor be a part of what does

    def close_doors(self) -> None:
        """Let nobody in any more who came before the arena was published."""
        doors, self.doors = self.doors, None
        if doors is not None:
            doors.close()

    @property
    def content_digest_text(self) -> str:
        """The digest of the checkpoint that it was filled from; "" where that is not known."""
        return "" if self.content_digest is None else self.content_digest.digest

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

    def synchronize(self) -> None:
        """Wait for what the calling thread has queued on the arena's device, in the context that it is in."""
        return

    def make_current(self) -> None:
        """Make the arena's device the one on which the calling thread computes: for threads that begin."""
        return

    @abstractmethod
    def host_buffer(self, nbytes: int) -> "torch.Tensor":
        """Host memory from which bytes go to the arena's device without another copy: uint8, [nbytes]."""

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
    def fill_from_files(self, ops: "Sequence[CopyOp]", fds: Sequence[int]) -> None:
        """Execute operations whose sources are open files: `op.source` is an index into `fds`.

        Raises:
            OSError: if a file can't be read or is shorter than planned.
        """

    @abstractmethod
    def hash_entries(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        """The checksum of each of some entries of the arena, by its algorithm."""

    def hash_samples(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        """Checksums of a sample of each entry; of all of it where that is as fast."""
        return self.hash_entries(entries)

    @abstractmethod
    def quick_samples(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        """As `hash_samples`, where that costs next to nothing; empty where it doesn't."""

    @abstractmethod
    def hash_rows(self, starts: Sequence[int], row_nbytes: int, num_rows: int, stride: int) -> str:
        """The checksum of rows as if one lay behind the other: of `num_rows` from each of `starts` on, `stride` apart.

        All numbers but `num_rows` are bytes.
        """

    @abstractmethod
    def hash_content(self, content: "torch.Tensor") -> str:
        """The checksum of a contiguous tensor on the arena's device, as of an entry that holds the same."""

    @abstractmethod
    def share(self) -> MemoryShare:
        """What another process of the host needs to have the arena's memory.

        Raises:
            OSError: if it can't be given away.
        """

    @abstractmethod
    def open_shared(self, share: MemoryShare) -> "SeedMemory":
        """What another process's arena has shared, to be taken into this one.

        Args:
            share: stays the caller's, who keeps it until the result is closed.

        Raises:
            ValueError: if this arena can't take from such memory.
        """

    @abstractmethod
    def open_receive_buffer(self) -> "ReceiveBuffer":
        """The arena's bytes for a transport that writes to tensors, and may have to be abandoned."""

    @abstractmethod
    def open_receive_window(self, max_batch_nbytes: int) -> "ReceiveWindow":
        """Files for another process that writes to them, and may have to be abandoned.

        Args:
            max_batch_nbytes: most source bytes that it receives in one batch.
        """

    @abstractmethod
    def drop_memory(self) -> None:
        """Part the arena from what an abandoned writer may still write to; the content is lost."""

    @abstractmethod
    def gather(self, ranges: Sequence[ByteRange]) -> bytes:
        """The bytes of some ranges, one behind the other, on the host."""

    def populate(self) -> None:
        """Take all memory now, where that has not been done: for a writer that is slow at the first touch of a page."""
        return

    def publish(self) -> None:
        """Declare the content final: from now on others may read it, and no source may fill it."""
        self.is_published = True

    @property
    def in_host_memory(self) -> bool:
        """Whether this is a stage in host memory of an arena that is elsewhere."""
        return False

    # Without memory

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads the memory beside passes: so long it is not given back.

        Raises:
            RuntimeError: if it has been.
        """
        with self._readers_changed:
            self._require_memory()
            self._num_readers += 1
        try:
            yield
        finally:
            with self._readers_changed:
                self._num_readers -= 1
                self._readers_changed.notify_all()

    def put_away(self, *, keeps_copy: bool) -> None:
        """Give the memory back; the addresses stay, and nobody may read them. What others have mapped is left to them.

        For a moment when no pass runs. Does nothing if there is no memory.

        Args:
            keeps_copy: have the content in host memory, for `take_back`.

        Raises:
            MemoryError: if there is none for the copy; nothing has changed then.
            RuntimeError: if the memory can't be given back, or somebody reads it for too long.
        """
        with self._readers_changed:
            if self.is_put_away:
                return
            if not self._readers_changed.wait_for(lambda: not self._num_readers, READERS_TIMEOUT_S):
                raise RuntimeError(f"the weights have been read by others for {READERS_TIMEOUT_S:g} s: try again")
            self._give_back(keeps_copy=keeps_copy)
            self.is_put_away, self.is_published = True, False

    @abstractmethod
    def _give_back(self, *, keeps_copy: bool) -> None:
        """See `put_away`."""

    @abstractmethod
    def take_back(self) -> bool:
        """Have memory at the addresses again, with what `put_away` has copied. Whether that is sound, callers find out.

        Returns:
            False, and nothing changes, if there is no copy.

        Raises:
            MemoryError: if there is not enough; nothing has changed then.
        """

    @abstractmethod
    def drop_copy(self, *, keeps_room: bool = False) -> None:
        """Forget the copy in host memory, if there is one.

        Args:
            keeps_room: its memory stays, for the next one.
        """

    def _require_memory(self) -> None:
        if self.is_put_away:
            raise RuntimeError("the memory of the weights has been given back")

    # Other content

    @abstractmethod
    def open_stage(self, manifest: WeightManifest) -> "WeightArena":
        """Memory for other content of the same layout, which can take the place of what is here; see `exchange`.

        Raises:
            MemoryError: if there is not enough.
        """

    def exchange(self, staged: "WeightArena") -> None:
        """Show what `staged` holds at the addresses that this arena has, which keeps what was here instead.

        For a moment when nobody reads the weights. The content is nobody's but the own process's afterwards, until it
        is published. Where this arena had no memory, `staged` has none afterwards.

        Raises:
            OSError: if the kernel refuses; nothing has changed then.
        """
        for name in ("manifest", "checksums", "content_digest", "is_published", "is_put_away", "is_made_up"):
            mine, theirs = getattr(self, name), getattr(staged, name)
            setattr(self, name, theirs)
            setattr(staged, name, mine)

    def _require_private(self) -> None:
        if self.is_published:
            raise RuntimeError("a published arena is immutable")


class SeedMemory(ABC):
    """Another process's weights on the same host, as one arena can take them."""

    def can_map(self) -> bool:
        """Whether the memory can stand in for the arena's own where both are laid out equally."""
        return False

    def map(self) -> None:
        """Show the memory in place of the arena's own, copy-on-write. It outlives the seed.

        Raises:
            ValueError: if it can't be mapped, or is not sealed or too small.
            OSError: if the kernel refuses.
        """
        raise ValueError("the seed's memory can't be mapped here")

    def open(self) -> None:
        """Get ready to copy now, so that where this is not allowed there is still time to go another way.

        Raises:
            OSError: if the memory can't be opened.
        """
        return

    @abstractmethod
    def copy(self, ops: "Sequence[CopyOp]", seed_is_alive: Callable[[], bool], timeout_s: float, /) -> float:
        """Execute operations whose source is the seed's arena, whatever the layouts. No copy is under way afterwards.

        Returns:
            The seconds that the copies took by the device's own clock; 0 if it has none.

        Raises:
            OSError: if the memory is not as large as the seed said, or the seed ends too early.
            TimeoutError: if the seed can end too early, and the copies take longer than `timeout_s`.
        """

    def close(self) -> None:
        """Give the memory back. May be called again."""
        return


class SeedFile(SeedMemory):
    """Host memory of another process. Read as a file it needs no page tables here: faster than mapping and copying."""

    def __init__(self, arena: WeightArena, fd: int) -> None:
        self._arena = arena
        self._fd = fd

    def copy(self, ops: "Sequence[CopyOp]", _seed_is_alive: Callable[[], bool], _timeout_s: float) -> float:
        """The file outlives the seed."""
        self._arena.fill_from_files([msgspec.structs.replace(op, source=0) for op in ops], [self._fd])
        return 0.0


class ReceiveBuffer(ABC):
    """All bytes of an arena as a tensor that a transport fills, and which can be cut off from it as a window can."""

    memory: "torch.Tensor"  # uint8, [nbytes], on the arena's device

    @abstractmethod
    def cut_off(self) -> None:
        """Part the buffer from the arena for good, where whoever was given up might still write; it stays valid."""

    @abstractmethod
    def close(self) -> None:
        """Give the buffer back: only when nobody writes to it any more."""


class ReceiveWindow(ABC):
    """Files through which another process fills an arena.

    A transfer that was given up may still write when its peer comes back, until that process is ended. So whoever
    gives one up ends the process first, and closes the window then.
    """

    files: tuple[tuple[int, int], ...]  # descriptor and bytes, in whole pages, of each: one behind the other

    @abstractmethod
    def place(self, batch: "Sequence[CopyOp]") -> list[int]:
        """Where in the files to receive the source bytes of each of a batch's operations, from first row to last."""

    @abstractmethod
    def deliver(self, batch: "Sequence[CopyOp]") -> None:
        """Bring a batch that has been received into the arena."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything delivered is in the arena."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back: only when nobody writes to it any more. May be called again."""
