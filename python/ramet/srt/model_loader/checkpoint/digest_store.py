"""Owns the digest of a model folder's files: computing its table, and keeping it for as long as the files stay."""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from ramet.srt.environ import cache_folder, envs
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamps
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, find_checkpoint_files, read_header
from ramet.srt.model_loader.checksums.tensor_digest import digest_tensor
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.content_digest import DigestTable, TensorDigest, build_table, decode_tensors, encode_tensors
from ramet.srt.weights.update_messages import FileStamp

logger = logging.getLogger(__name__)

FILES = "files"  # in place of a digest: that of the own files


class _Stored(msgspec.Struct):
    folder: str
    files: list[FileStamp]
    digest: str
    tensors: bytes


def find_table(folder: str) -> DigestTable | None:
    """The table of the folder's files that was stored when their digest was computed; None if they have changed since.

    Raises:
        ValueError: if the folder has no checkpoint.
    """
    path = _store_path(folder)
    try:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            return None
        stored = msgspec.msgpack.decode(path.read_bytes(), type=_Stored)
        if stored.files != file_stamps(folder):
            return None
        table = build_table(decode_tensors(stored.tensors))
    except (OSError, msgspec.DecodeError):
        return None
    return table if table.digest == stored.digest else None


def load_table(folder: str) -> DigestTable:
    """The stored table of the folder's files, which are read first if there is none; then it is stored.

    Of several processes that want it one reads them.

    Raises:
        ValueError: if the folder has no checkpoint, or a file can't be read.
    """
    table = find_table(folder)
    if table is not None:
        return table
    with _alone(_store_path(folder)):
        return find_table(folder) or compute_table(folder)


def required_table(folder: str, digest: str | None) -> DigestTable | None:
    """The table of files that are about to be read.

    Args:
        digest: 64 hex digits that they must have, or "files" for whatever they have. None: the table is not needed,
            and only taken if it is stored.

    Raises:
        ValueError: if they have another digest, or can't be read.
    """
    if digest is None:
        return find_table(folder)
    table = load_table(folder)
    if digest not in (FILES, table.digest):
        raise ValueError(f"the weights in {folder} have the digest {table.digest}, not {digest} (--weights-digest)")
    return table


def compute_table(folder: str, on_bytes: Callable[[int], None] = lambda _nbytes: None) -> DigestTable:
    """Read all files of a model folder, and store the table if that can be done.

    Args:
        on_bytes: told how many bytes of tensors have been hashed, from several threads.

    Raises:
        ValueError: if the folder has no checkpoint, or a file can't be read or changes meanwhile.
    """
    start = time.perf_counter()
    before = file_stamps(folder)
    tensors: list[TensorDigest] = []
    for path in find_checkpoint_files(folder):
        tensors += _digest_file(path, read_header(path), on_bytes)
    if file_stamps(folder) != before:
        raise ValueError(f"the weights in {folder} have changed while they were read")
    table = build_table(tensors)
    nbytes = checkpoint_nbytes(folder)
    logger.info("the weights in %s have the digest %s (%.3f GB read in %.2f s)", folder, table.digest, nbytes / 1e9,
                time.perf_counter() - start)  # fmt: skip
    _store(folder, _Stored(os.path.realpath(folder), before, table.digest, encode_tensors(tensors)))
    return table


def checkpoint_nbytes(folder: str) -> int:
    """Bytes of the folder's weight files. Raises ValueError if it has no checkpoint."""
    return sum(stamp.nbytes for stamp in file_stamps(folder))


def _digest_file(path: str, header: Mapping[str, TensorInfo], on_bytes: Callable[[int], None]) -> list[TensorDigest]:
    def run(item: tuple[str, TensorInfo]) -> TensorDigest:
        name, info = item
        digest = digest_tensor(name, info.dtype, info.shape, memory[info.offset : info.offset + info.nbytes])
        on_bytes(info.nbytes)
        return digest

    largest_first = sorted(header.items(), key=lambda item: -item[1].nbytes)
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as memory,
            ThreadPoolExecutor(num_copy_threads(), "digest-files") as pool,
        ):
            return list(pool.map(run, largest_first))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _store_path(folder: str) -> Path:
    return store_folder() / f"{hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]}.msgpack"


def store_folder() -> Path:
    """Where digests are kept."""
    return cache_folder("digests", envs.RAMET_DIGEST_DIR)


def _store(folder: str, stored: _Stored) -> None:
    """Replace what is stored for the folder, in one step; only logged where that can't be done."""
    path = _store_path(folder)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.msgpack.encode(stored))
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("the digest of %s can't be kept in %s: %s", folder, path.parent, error)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process of the host is here for the same folder; at once where no lock can be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
