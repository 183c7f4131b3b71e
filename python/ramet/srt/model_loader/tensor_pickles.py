"""Owns what a pickle of named tensors may look like, in the ways in which torch and SGLang make one.

Tensors lie in the pickle itself (pickle, torch.save), in shared memory of the host (torch.multiprocessing with the
strategy file_system), or in a GPU's memory that another process lends (CUDA IPC). All of a payload is read and checked
before the first memory is opened. PROTOCOL: torch.multiprocessing.reductions, torch._utils and torch.serialization of
torch 2; sglang's MultiprocessingSerializer, LocalSerializedTensor and FlattenedTensorBucket.
"""

import io
import math
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ramet.srt.model_loader.tensor_memory import CudaMemory, HeldBytes, Memory, PickledTensor, SharedMemory
from ramet.srt.utils.pickled_values import Call, Name, PickleError, Reference, is_named, read_values
from ramet.srt.weights.manifest import DTYPE_BYTES, element_size

TYPED_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
REDUCTIONS, UTILS = "torch.multiprocessing.reductions", "torch._utils"
SHARED_TENSOR, CUDA_TENSOR = Name(REDUCTIONS, "rebuild_tensor"), Name(REDUCTIONS, "rebuild_cuda_tensor")
TYPED, BY_NAME = Name(REDUCTIONS, "rebuild_typed_storage"), Name(REDUCTIONS, "rebuild_storage_filename")
BY_DESCRIPTOR, EMPTY = Name(REDUCTIONS, "rebuild_storage_fd"), Name(REDUCTIONS, "rebuild_storage_empty")
DESCRIPTOR = Name("multiprocessing.resource_sharer", "DupFd")
TENSOR, TENSOR_OF_TYPE = Name(UTILS, "_rebuild_tensor_v2"), Name(UTILS, "_rebuild_tensor_v3")
PARAMETER, STORAGE_IN_BYTES = Name(UTILS, "_rebuild_parameter"), Name("torch.storage", "_load_from_bytes")
SIZE = Name("torch", "Size")
KNOWN = {SHARED_TENSOR, CUDA_TENSOR, TYPED, BY_NAME, BY_DESCRIPTOR, EMPTY, DESCRIPTOR, TENSOR, TENSOR_OF_TYPE}
KNOWN |= {PARAMETER, STORAGE_IN_BYTES, SIZE, Name("collections", "OrderedDict")}
KNOWN |= {Name("torch", "Tensor"), Name("torch.nn.parameter", "Parameter")}
KNOWN |= {Name("torch.storage", name) for name in ("TypedStorage", "UntypedStorage")}
KNOWN |= {Name("torch", name) for name in (*TYPED_STORAGES, *DTYPE_BYTES)}
# SGLang's, wherever the sender has them from: no module is looked into.
LENT_TENSOR, BUCKET_PART, FOR_RANKS = (
    "_rebuild_cuda_tensor_modified",
    "FlattenedTensorMetadata",
    "LocalSerializedTensor",
)

ZIP = b"PK\x03\x04"
OLD_FILE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote before it wrote archives
OLD_PROTOCOL = 1001
MAX_DIMS = 8

Value = TypeVar("Value")
NamedTensors = list[tuple[str, PickledTensor]]


@dataclass(frozen=True)
class BucketPart:
    """A tensor in a flat one; `first` and `stop` count the flat one's elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Several tensors in a flat one."""

    flat: PickledTensor
    parts: list[BucketPart]


def read_tensors(payload: bytes, tp_rank: int) -> NamedTensors | Bucket:
    """What a payload for one rank holds. Opens no memory.

    Raises:
        PickleError: if it is anything else than named tensors.
    """
    value, held = _read(payload)
    reader = _Reader(held, tp_rank)
    if isinstance(value, dict) and set(value) == {"flattened_tensor", "metadata"}:
        flat = reader.tensor(value["flattened_tensor"])
        if len(flat.size) != 1:
            raise PickleError("the flat tensor of a bucket has more than one dimension")
        return Bucket(flat, [_bucket_part(one, flat.size[0]) for one in _is(value["metadata"], list)])
    pairs = list(value.items()) if isinstance(value, dict) else _is(value, list, tuple)
    named = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise PickleError("it is no list of names with tensors")
        named.append((pair[0], reader.tensor(pair[1])))
    return named


def read_handle(payload: bytes) -> PickledTensor:
    """What torch's reduce_tensor gives for one tensor: the function that opens it, and its arguments. Opens no memory.

    Raises:
        PickleError: if it is anything else.
    """
    value, held = _read(payload)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Name):
        value = Call(value[0], _is(value[1], tuple))
    return _Reader(held, 0).tensor(value)


def _is_known(name: Name) -> bool:
    return name in KNOWN or name.name in (LENT_TENSOR, BUCKET_PART, FOR_RANKS)


def _read(payload: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    """What a payload says, and the content of what it refers to."""
    if payload.startswith(ZIP):
        return _read_archive(payload)
    if payload.startswith(OLD_FILE):
        return _read_old_file(payload)
    file = io.BytesIO(payload)
    value = read_values(file, _is_known)
    if file.read(1):
        raise PickleError("something stands behind it")
    return value, {}


def _read_archive(payload: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    """What torch.save writes: an archive that is not compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED or one.file_size > len(payload) for one in members):
                raise PickleError("it is a compressed archive")
            if sum(one.file_size for one in members) > len(payload):
                raise PickleError("it is an archive whose parts lie over each other")
            content = {one.filename.partition("/")[2]: archive.read(one) for one in members}
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise PickleError(f"it is a broken archive: {error}") from None
    if "data.pkl" not in content or content.get("byteorder", b"little") != sys.byteorder.encode():
        raise PickleError("it is an archive without tensors, or from another kind of host")
    held = {name.removeprefix("data/"): memoryview(one) for name, one in content.items() if name.startswith("data/")}
    return read_values(io.BytesIO(content["data.pkl"]), _is_known, has_references=True), held


def _read_old_file(payload: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    """What torch.save wrote before, and what a pickled tensor has for its storage still."""
    file = io.BytesIO(payload)
    file.seek(len(OLD_FILE))
    protocol, host = (read_values(file, _is_known) for _ in range(2))
    if protocol != OLD_PROTOCOL or not isinstance(host, dict) or host.get("little_endian") is not True:
        raise PickleError("it is of another protocol, or from another kind of host")
    value = read_values(file, _is_known, has_references=True)
    keys = [_is(key, str) for key in _is(read_values(file, _is_known), list)]
    sizes = _element_sizes(value)
    held, start = {}, file.tell()
    for key in keys:
        nbytes = int.from_bytes(payload[start : start + 8], "little") * sizes.get(key, 1)
        if start + 8 + nbytes > len(payload):
            raise PickleError("it ends before its tensors do")
        held[key] = memoryview(payload)[start + 8 : start + 8 + nbytes]
        start += 8 + nbytes
    return value, held


def _element_sizes(value: Any) -> dict[str, int]:
    """Bytes of an element of all storages that a value refers to."""
    found: dict[str, int] = {}
    left, seen = [value], {id(value)}
    while left:  # each once: a few lists that hold each other many times have more paths than anybody can walk
        one = left.pop()
        if isinstance(one, Reference):
            key, dtype, _ = _reference(one)
            found[key] = element_size(dtype)
            continue
        inner = one.values() if isinstance(one, dict) else one.args if isinstance(one, Call) else one
        for part in inner if isinstance(inner, tuple | list) or isinstance(one, dict) else ():
            if id(part) not in seen:
                seen.add(id(part))
                left.append(part)
    return found


def _reference(value: Reference) -> tuple[str, str, int]:
    """A storage's key, its dtype and its elements."""
    key = value.key
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage" or not isinstance(key[1], Name):
        raise PickleError("it refers to what is no storage")
    dtype = TYPED_STORAGES.get(key[1].name)
    if dtype is None or key[3] != "cpu" or key[5:] not in ((), (None,)):
        raise PickleError(f"it has a storage {key[1]} on {_words(key[3])}, which can't be sent by value")
    return _is(key[2], str), dtype, _natural(key[4])


class _Reader:
    """Makes tensors of what a pickle says, without opening them.

    Args:
        held: content of what it refers to.
        tp_rank: of the rank, where it holds a tensor for each.
    """

    def __init__(self, held: Mapping[str, memoryview], tp_rank: int):
        self._held = held
        self._tp_rank = tp_rank

    def tensor(self, value: Any) -> PickledTensor:
        """A tensor, in any of the ways."""
        if is_named(value, (PARAMETER,)):
            value = _args(value, 3)[0]
        if isinstance(value, Call) and value.function.name == FOR_RANKS:
            return replace(self.tensor(self._of_rank(value)), is_of_rank=True)
        if is_named(value, (SHARED_TENSOR,)):
            _, storage, place = _args(value, 3)
            dtype, memory = self._typed(storage)
            return _checked(memory, dtype, *_args_of(place, 4)[:3])
        if is_named(value, (TENSOR, TENSOR_OF_TYPE)):
            storage, offset, size, stride, *rest = value.args
            dtype, memory = self._plain(storage)
            if value.function == TENSOR_OF_TYPE:
                dtype = _dtype(rest[2] if len(rest) > 2 else None)
            return _checked(memory, dtype, offset, size, stride)
        if is_named(value, (CUDA_TENSOR,)) or isinstance(value, Call) and value.function.name == LENT_TENSOR:
            return _lent(_args(value, 15))
        raise PickleError(f"it has {_words(value)} where a tensor belongs")

    def _of_rank(self, value: Call) -> Any:
        values = _is(_is(value.state, dict).get("values"), list)
        if self._tp_rank >= len(values):
            raise PickleError(f"it has tensors for {len(values)} ranks and none for rank {self._tp_rank}")
        inner, held = _read(_is(values[self._tp_rank], bytes))
        if held or isinstance(inner, Call) and inner.function.name == FOR_RANKS:
            raise PickleError("it has an archive, or ranks of ranks, where a tensor belongs")
        return inner

    def _typed(self, value: Any) -> tuple[str, Memory]:
        if not is_named(value, (TYPED,)):
            raise PickleError(f"it has {_words(value)} where a storage belongs")
        storage, dtype = _args(value, 2)
        if is_named(storage, (EMPTY,)):
            return _dtype(dtype), HeldBytes(memoryview(b""))
        if is_named(storage, (BY_DESCRIPTOR,)):
            raise PickleError(
                "its tensors are in shared memory that only the sender's own children can open: the sender must call "
                "torch.multiprocessing.set_sharing_strategy('file_system') first"
            )
        if not is_named(storage, (BY_NAME,)):
            raise PickleError(f"it has {_words(storage)} where a storage belongs")
        _, manager, handle, nbytes = _args(storage, 4)
        return _dtype(dtype), SharedMemory(_is(manager, bytes), _is(handle, bytes), _natural(nbytes))

    def _plain(self, value: Any) -> tuple[str, Memory]:
        held = self._held
        if is_named(value, (STORAGE_IN_BYTES,)):
            value, held = _read_old_file(_is(_args(value, 1)[0], bytes))
        if not isinstance(value, Reference):
            raise PickleError(f"it has {_words(value)} where a storage belongs")
        key, dtype, _ = _reference(value)
        if key not in held:
            raise PickleError("it refers to a storage that is not there")
        return dtype, HeldBytes(held[key])


def _lent(args: tuple[Any, ...]) -> PickledTensor:
    """A tensor in a GPU's memory; args of rebuild_cuda_tensor."""
    _, size, stride, offset, _, dtype, device, handle, nbytes, start, _, *counters = args
    if handle is None:
        return _checked(HeldBytes(memoryview(b"")), _dtype(dtype), offset, size, stride)
    counter, place, event, has_event = counters
    memory = CudaMemory(
        device=_is(device, int, str),
        handle=_is(handle, bytes),
        nbytes=_natural(nbytes),
        offset_nbytes=_natural(start),
        counter=_is(counter, bytes),
        counter_place=_natural(place),
        event=_is(event, bytes),
        has_event=_is(has_event, bool),
    )
    return _checked(memory, _dtype(dtype), offset, size, stride)


def _checked(memory: Memory, dtype: str, offset: Any, size: Any, stride: Any) -> PickledTensor:
    """Raises PickleError unless a tensor lies inside of its memory, no element of which it has twice."""
    if is_named(size, (SIZE,)):
        size = _args(size, 1)[0]
    extents, steps = (tuple(_natural(one) for one in _is(given, tuple)) for given in (size, stride))
    first = _natural(offset)
    if len(extents) != len(steps) or len(extents) > MAX_DIMS:
        raise PickleError(f"it has a tensor of the shape {extents[:MAX_DIMS]} with the strides {steps[:MAX_DIMS]}")
    count = math.prod(extents)
    stop = first + 1 + sum((extent - 1) * step for extent, step in zip(extents, steps, strict=True))
    if count and (max(stop, count) * element_size(dtype) > memory.nbytes):
        raise PickleError(f"it has a tensor of the shape {extents} that reaches beyond its memory")
    return PickledTensor(memory, dtype, first, extents, steps)


def _bucket_part(value: Any, flat_len: int) -> BucketPart:
    if not isinstance(value, Call) or value.function.name != BUCKET_PART or not isinstance(value.state, dict):
        raise PickleError(f"it has {_words(value)} where a part of a bucket belongs")
    state = value.state
    shape = _args(state["shape"], 1)[0] if is_named(state.get("shape"), (SIZE,)) else state.get("shape")
    extents = tuple(_natural(one) for one in _is(shape, tuple, list))
    first, stop = _natural(state.get("start_idx")), _natural(state.get("end_idx"))
    name = _is(state.get("name"), str)
    if not first <= stop <= flat_len or math.prod(extents) != _natural(state.get("numel")):
        raise PickleError(f"{name} reaches beyond its bucket, or has another shape than numbers")
    return BucketPart(name, _dtype(state.get("dtype")), extents, first, stop)


def _dtype(value: Any) -> str:
    if not isinstance(value, Name) or value.module != "torch" or value.name not in DTYPE_BYTES:
        raise PickleError(f"it has {_words(value)} where a type belongs")
    return value.name


def _args(call: Call, count: int) -> tuple[Any, ...]:
    return _args_of(call.args, count)


def _args_of(args: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or len(args) != count:
        raise PickleError("it makes a tensor of other things than torch does")
    return args


def _natural(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PickleError(f"it has {_words(value)} where a number belongs that is not negative")
    return value


def _is(value: Any, *kinds: Callable[..., Any]) -> Any:
    if not isinstance(value, kinds):  # type: ignore[arg-type]
        raise PickleError(f"it has {_words(value)} where {' or '.join(kind.__name__ for kind in kinds)} belongs")
    return value


def _words(value: Any) -> str:
    """A value in a message: a container by its kind, as it may hold others, and those again, without end."""
    match value:
        case Call():
            return str(value.function)
        case str() | bytes():
            return str(value[:100])
        case bool() | int() | None | Name():
            return str(value)
    return f"a {type(value).__name__}"
