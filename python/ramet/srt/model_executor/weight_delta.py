"""Owns reading a delta on a rank: whether it belongs on what serves, and what it has. See weights/delta.py."""

import contextlib
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.read_range import ShortReadError, read_range
from ramet.srt.model_loader.checkpoint.file_stamps import check_stamps, file_stamp
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, read_header, read_metadata
from ramet.srt.model_loader.checkpoint.whole_model import EMBEDDING, HEAD, WholeModel
from ramet.srt.model_loader.checksums.tensor_digest import digest_tensor
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.model_loader.tensor_stage import ElementChange, TensorStage
from ramet.srt.weights.delta import BASE, BITS, CHANGED, INDICES, VALUES, DeltaTables, Elements, decode_delta
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightManifest, element_size
from ramet.srt.weights.report import LoadReport
from ramet.srt.weights.update_messages import DeltaFile

Changes = Generator[tuple[str, torch.Tensor | ElementChange], None, None]


@dataclass(frozen=True)
class Delta:
    """A delta that fits what serves."""

    source: DeltaFile
    header: Mapping[str, TensorInfo]
    tables: DeltaTables
    elements: Mapping[str, Elements]

    def read(self) -> Changes:
        """What has changed, by the names of the checkpoint.

        Raises:
            ValueError: if the file has something else than its hashes say, or changes meanwhile.
        """
        with _opened(self.source.path) as fd:
            for name in self.tables.changed:
                if name in self.elements:
                    yield name, self._elements(fd, name)
                else:
                    yield name, self._tensor(fd, name)
        check_stamps(self.source.path, [file_stamp(self.source.path)], [self.source.stamp], self.source.host_identity)

    def check_result(self, stage: WeightArena) -> None:
        """Make sure of every tensor of which only elements have come. All others were compared when they came.

        Raises:
            ValueError: if one is not what the delta says that it becomes.
        """
        check = check_bands(stage, self.tables.result, set(self.elements))
        if check.wrong:
            raise ValueError(f"the delta does not make what it says of {name_some(sorted(check.wrong))}")
        if check.unchecked:
            name = min(check.unchecked)
            raise ValueError(f"nobody can tell whether the delta has made the right {name}: {check.unchecked[name]}")

    def _tensor(self, fd: int, name: str) -> torch.Tensor:
        content, known = _read(fd, self.source.path, self.header[name]), self.tables.result.tensors[name]
        if digest_tensor(name, known.dtype, known.shape, content.numpy().data) != known:
            raise ValueError(f"{self.source.path}: {name} is not what its hashes are of")
        return content.view(getattr(torch, known.dtype)).view(known.shape)

    def _elements(self, fd: int, name: str) -> ElementChange:
        path, one = self.source.path, self.elements[name]
        infos = [self.header[name + end] for end in (INDICES, VALUES)]
        indices, values = (_read(fd, path, info).view(getattr(torch, info.dtype)) for info in infos)
        return ElementChange(one.dtype, one.shape, indices.long(), values, one.by == "xor")


def stage_delta(
    source: DeltaFile, serving: WeightArena, manifest: WeightManifest, whole: WholeModel
) -> tuple[WeightArena, LoadReport]:
    """What serves with a delta on top of it, compared with the delta's hashes; it knows its digest.

    Raises:
        ValueError: if the delta does not belong on what serves, or does not make what it says.
        MemoryError: if there is no room.
    """
    start = time.perf_counter()
    delta = open_delta(source, serving, whole)
    stage = TensorStage(serving, manifest, whole, is_known=True)
    with contextlib.closing(delta.read()) as changes:
        for name, change in changes:
            stage.put(name, change)
    stage.seal()
    delta.check_result(stage.arena)
    result = stage.arena.content_digest = delta.tables.result
    seconds = time.perf_counter() - start
    report = LoadReport(source="delta", num_bytes=stage.num_bytes, seconds=seconds, verified=True, digest=result.digest)
    return stage.arena, report


def open_delta(source: DeltaFile, serving: WeightArena, whole: WholeModel) -> Delta:
    """A delta, if it is whole and belongs on what serves.

    Raises:
        ValueError: if it doesn't.
    """
    path = source.path
    check_stamps(path, [file_stamp(path)], [source.stamp], source.host_identity)
    header = read_header(path)
    if BASE not in header or CHANGED not in header:
        raise ValueError(f"{path} is no delta: it has no hashes")
    with _opened(path) as fd:
        base, changed = (_read(fd, path, header[name]).numpy().tobytes() for name in (BASE, CHANGED))
    try:
        tables, elements = decode_delta(read_metadata(path), base, changed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_content(path, header, tables, elements)
    if source.digest not in (None, tables.result.digest):
        raise ValueError(f"{path} makes weights of the digest {tables.result.digest}, not {source.digest}")
    after = tables.result.tensors
    if whole.is_tied and whole.has_head and HEAD in after:
        head, embedding = after[HEAD], after.get(EMBEDDING)
        if embedding is None or (head.rows, head.columns) != (embedding.rows, embedding.columns):
            raise ValueError(f"{path} makes an output head that is not the embedding, which the model has in its place")
    _check_base(path, serving, tables)
    return Delta(source, header, tables, elements)


def _check_base(path: str, serving: WeightArena, tables: DeltaTables) -> None:
    known, base = serving.content_digest, tables.base
    words = f"{path} belongs on weights of the digest {base.digest}"
    if known is not None:
        if known.digest != base.digest:
            raise ValueError(f"{words}; those that serve have {known.digest}")
        return
    check = check_bands(serving, base)
    if check.wrong:
        raise ValueError(f"{words}; those that serve are others: {name_some(sorted(check.wrong))} differ")
    if check.unchecked:
        name = min(check.unchecked)
        raise ValueError(f"{words}; nobody can tell whether those that serve are these: {check.unchecked[name]}")


def _check_content(
    path: str, header: Mapping[str, TensorInfo], tables: DeltaTables, elements: Mapping[str, Elements]
) -> None:
    """Raises ValueError unless a file has what its hashes are of, in the right shapes and types, and nothing else."""
    wanted = {BASE, CHANGED}
    for name in tables.changed:
        known = tables.result.tensors[name]
        if name not in elements:
            wanted.add(name)
            if name in header and (header[name].dtype, header[name].shape) != (known.dtype, known.shape):
                raise ValueError(f"{path}: {name} is {header[name].dtype} {header[name].shape}, not what it should be")
            continue
        wanted |= {name + INDICES, name + VALUES}
        indices, values = header.get(name + INDICES), header.get(name + VALUES)
        if indices is None or values is None:
            continue
        dtype = BITS[element_size(known.dtype)] if elements[name].by == "xor" else known.dtype
        is_right = indices.dtype in ("int32", "int64") and values.dtype == dtype
        if not is_right or len(indices.shape) != 1 or indices.shape != values.shape:
            raise ValueError(f"{path}: the elements of {name} are {values.dtype} {values.shape} at {indices.dtype} "
                             f"{indices.shape}")  # fmt: skip
    if different := sorted(wanted ^ header.keys()):
        raise ValueError(f"{path}: {name_some(different)} should not be there, or should")


@contextlib.contextmanager
def _opened(path: str) -> Generator[int, None, None]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _read(fd: int, path: str, info: TensorInfo) -> torch.Tensor:
    """A tensor's bytes: uint8."""
    content = torch.empty(info.nbytes, dtype=torch.uint8)
    try:
        read_range([fd], 0, info.offset, content.numpy().data)
    except ShortReadError as error:
        raise ValueError(f"{path} is truncated: {error}") from error
    return content
