"""Owns writing deltas: for trainers, which have both versions of a checkpoint in memory. See weights/delta.py."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import save_file

from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.model_loader.checksums.tensor_digest import digest_tensor
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.content_digest import DigestTable, TensorDigest, build_table
from ramet.srt.weights.delta import (
    BITS,
    INDICES,
    VALUES,
    DeltaTables,
    Elements,
    encode_metadata,
    encode_tables,
    result_table,
)
from ramet.srt.weights.manifest import dtype_name

MIN_ELEMENTS = 1024  # a smaller tensor is written as a whole
MAX_INT32 = (1 << 31) - 1


def write_delta(
    path: str,
    base: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    *,
    base_table: DigestTable | None = None,
    by: str = "values",
) -> DigestTable:
    """Write what `new` has that `base` has not, for /update_weights_delta.

    Args:
        path: of the file, which is replaced in one step.
        base: all tensors of a checkpoint, by their names there, on any device.
        new: the same names, shapes and types.
        base_table: what the call that has made `base` returned, so that it is not hashed again.
        by: how changed elements are given: "values", which are what they are afterwards, or "xor", which is of no use
            without the base.

    Returns:
        The hashes of `new`; its `digest` is what `ramet digest` prints for the same tensors in files.

    Raises:
        ValueError: if names, shapes or types differ.
        OSError: if the file can't be written.
    """
    if by not in ("values", "xor"):
        raise ValueError(f"by must be values or xor; got {by!r}")
    old = {whole_name(name): tensor for name, tensor in base.items()}
    later = {whole_name(name): tensor for name, tensor in new.items()}
    if different := sorted(old.keys() ^ later.keys()):
        raise ValueError(f"only one of the checkpoints has {different[0]}")
    table = base_table or build_table(_digests(old.items()))
    content: dict[str, torch.Tensor] = {}
    elements: dict[str, Elements] = {}
    changed = []
    for name, tensor in later.items():
        if (tensor.dtype, tensor.shape) != (old[name].dtype, old[name].shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and was {old[name].dtype} "
                             f"{tuple(old[name].shape)}")  # fmt: skip
        indices = torch.nonzero(_bits(tensor) != _bits(old[name]).to(tensor.device)).view(-1)
        if not len(indices):
            continue
        changed.append(name)
        places = indices.to(torch.int32 if tensor.numel() <= MAX_INT32 else torch.int64)
        nbytes = len(indices) * (places.element_size() + tensor.element_size())
        if tensor.numel() < MIN_ELEMENTS or nbytes >= tensor.nbytes:
            content[name] = tensor.detach().contiguous().cpu()
            continue
        values = _bits(tensor)[indices]
        if by == "xor":
            values ^= _bits(old[name]).to(tensor.device)[indices]
        else:
            values = values.view(tensor.dtype)
        content[name + INDICES], content[name + VALUES] = places.cpu(), values.cpu()
        elements[name] = Elements(dtype_name(tensor.dtype), tuple(tensor.shape), by)
    after = result_table(table, _digests((name, later[name]) for name in changed))
    tables = DeltaTables(table, after, tuple(changed))
    content |= {
        name: torch.frombuffer(bytearray(one), dtype=torch.uint8) for name, one in encode_tables(tables).items()
    }
    _save(path, content, encode_metadata(tables, elements))
    return after


def _save(path: str, content: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    os.close(handle)
    try:
        save_file(content, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorDigest]:
    """The hashes of some tensors, in several threads."""

    def run(item: tuple[str, torch.Tensor]) -> TensorDigest:
        name, tensor = item
        content = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        return digest_tensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), content)

    with ThreadPoolExecutor(num_copy_threads(), "digest-tensors") as pool:
        return list(pool.map(run, tensors))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order, as integers of the same size."""
    return tensor.detach().contiguous().view(-1).view(getattr(torch, BITS[tensor.element_size()]))
