"""Owns the form of a delta: what one version of a checkpoint has that another one has not. Pure data, no torch.

A delta is a safetensors file. A tensor that has changed in most places stands in it as a whole, under its name. One
that has changed here and there stands in it as `NAME::indices` and `NAME::values`: int32 or int64 [n], the places in
its row-major order, rising; and what stands there afterwards, in the tensor's type, or what its bits are to be combined
with by exclusive or, in an integer type of the same size (uint8, int16, int32, int64). `::base` has the hashes of all
tensors of the base and `::changed` those of the changed ones afterwards, as weights/content_digest.py encodes them, in
uint8. The metadata has `format`, `base` and `digest` (of the base's content and the result's, as `ramet digest` prints
them), and `elements`: JSON `{name: {"dtype", "shape", "by": "values" | "xor"}}` of the tensors that are there in part.
"""

import msgspec

from ramet.srt.utils.outside_json import Natural
from ramet.srt.weights.content_digest import DigestTable, TensorDigest, build_table, decode_tensors, encode_tensors

FORMAT = "ramet-delta-1"
INDICES, VALUES = "::indices", "::values"
BASE, CHANGED = "::base", "::changed"
BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # types of values that are combined, by their bytes


class Elements(msgspec.Struct, frozen=True):
    """A tensor of which some elements have changed."""

    dtype: str
    shape: tuple[Natural, ...]
    by: str  # values or xor


class DeltaTables(msgspec.Struct, frozen=True):
    """The content before and after, and which tensors differ."""

    base: DigestTable
    result: DigestTable
    changed: tuple[str, ...]


def result_table(base: DigestTable, changed: list[TensorDigest]) -> DigestTable:
    """The hashes of a base when some tensors have others.

    Raises:
        ValueError: if the base lacks one of them, or has it in another shape or type.
    """
    for tensor in changed:
        old = base.tensors.get(tensor.name)
        if old is None or (old.dtype, old.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, which the base does not have")
    return build_table((base.tensors | {tensor.name: tensor for tensor in changed}).values())


def encode_metadata(tables: DeltaTables, elements: dict[str, Elements]) -> dict[str, str]:
    """For the header of a delta."""
    return {
        "format": FORMAT,
        "base": tables.base.digest,
        "digest": tables.result.digest,
        "elements": msgspec.json.encode(elements).decode(),
    }


def encode_tables(tables: DeltaTables) -> dict[str, bytes]:
    """The two tensors of hashes."""
    base, changed = tables.base.tensors, tables.result.tensors
    return {
        BASE: encode_tensors([base[name] for name in sorted(base)]),
        CHANGED: encode_tensors([changed[name] for name in tables.changed]),
    }


def decode_delta(metadata: dict[str, str], base: bytes, changed: bytes) -> tuple[DeltaTables, dict[str, Elements]]:
    """What `encode_metadata` and `encode_tables` were given.

    Raises:
        ValueError: if it is something else, or the hashes are not those that the digests are of.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"it is no delta of the format {FORMAT}")
    try:
        elements = msgspec.json.decode(metadata.get("elements", ""), type=dict[str, Elements])
        table = build_table(decode_tensors(base))
        differing = decode_tensors(changed)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"it is a broken delta: {error}") from None
    tables = DeltaTables(table, result_table(table, differing), tuple(tensor.name for tensor in differing))
    if (tables.base.digest, tables.result.digest) != (metadata.get("base"), metadata.get("digest")):
        raise ValueError("the hashes in the delta are not those that its digests are of")
    for name, one in elements.items():
        known = tables.result.tensors.get(name)
        if name not in tables.changed or known is None or (known.dtype, known.shape) != (one.dtype, one.shape):
            raise ValueError(f"the delta has elements of {name}, {one.dtype} {one.shape}, which its hashes don't have")
        if one.by not in ("values", "xor"):
            raise ValueError(f"the elements of {name} are given by {one.by!r}, not by values or xor")
    return tables, elements
