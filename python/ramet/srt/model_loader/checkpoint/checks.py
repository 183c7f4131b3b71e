"""Owns the comparison of a checkpoint's tensors with those that a model needs: names, types, shapes. Reads no data."""

import os
import re
from collections.abc import Collection, Mapping, Sequence

from ramet.srt.configs.weight_format import BLOCKS, WHOLE
from ramet.srt.model_loader.checkpoint.cache_scales import is_cache_scale
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import FP8, HEAD, SCALE_SUFFIXES, WholeModel
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.planner import CASTABLE_DTYPES

Tensors = Mapping[str, tuple[str, TensorInfo]]  # name -> (file, where in it)

PLAIN_FLOATS = ("float32", "bfloat16", "float16")
EXPONENTS = ("float8_e8m0fnu", "uint8")  # of a scale that is a power of two; of the same bits

PACKED_SUFFIXES = (".qweight", ".weight_packed")

# Tensors that no model has a place for, and why they may be left out.
HARMLESS_SURPLUS = {
    "tables that older checkpoints carry although every engine computes them": re.compile(
        r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    ),
    "scales of activations and caches in quantised checkpoints: those that the model has no place for": re.compile(
        r"\.((input|output|activation)(_global)?_scale(_ub)?|([kvq]|kv|[kvq]_proj)_(scale|zero_point))$"
    ),
    "shapes of matrices before they were packed: the config says them": re.compile(r"\.weight_shape$"),
}


def is_harmless(name: str) -> bool:
    """Whether a tensor that the model has no place for changes nothing."""
    return any(pattern.search(name) for pattern in HARMLESS_SURPLUS.values())


def check_checkpoint(tensors: Tensors, whole: WholeModel, where: str) -> None:
    """Find out whether files hold a model, all of it and nothing else.

    Args:
        where: what to call the files.

    Raises:
        ValueError: the message names the tensors, their files and what is wrong.
    """
    _check_types(tensors, whole, where)  # first: what has other types has other names, too
    _check_names(tensors, whole, where)
    _check_shapes(tensors, whole)


def check_some(tensors: Tensors, whole: WholeModel) -> None:
    """Find out whether a model has a place for each of some tensors, under these names, as it is.

    Where plain weights are quantised as they come, they may come quantised too, each with its scales.

    Raises:
        ValueError: the message names the tensor and what is wrong.
    """
    source = _source(whole)
    for name, (path, info) in tensors.items():
        if name in whole.grids:
            _check_grid_type(name, path, info, whole)
        elif name in whole.quantised:
            plain = PLAIN_FLOATS if is_quantised_here(tensors, whole) else ()
            if info.dtype not in (whole.dtypes[name], *plain):
                words = " or plain" if plain else ""
                raise ValueError(
                    f"{path}: {name} is {info.dtype}, but {source} says that it is {whole.dtypes[name]}{words}"
                )
        elif name in whole.shapes:
            _check_type(name, path, info, whole)
        elif not _is_idle(name, whole):
            raise ValueError(f"{path}: the model has no tensor {name}")
    _check_shapes(tensors, whole)


def is_quantised_here(tensors: Tensors, whole: WholeModel) -> bool:
    """Whether the files hold plain weights that are quantised while they are read."""
    if whole.knows_config:
        return whole.quantization is not None and whole.quantization.is_online
    fp8 = [name for name in whole.quantised if whole.dtypes[name] == FP8]
    return bool(fp8) and not any(name in tensors and tensors[name][1].dtype == FP8 for name in fp8)


def _check_names(tensors: Tensors, whole: WholeModel, where: str) -> None:
    absent = set(whole.grids) if is_quantised_here(tensors, whole) else set()
    absent.update(name for name in whole.shapes if is_cache_scale(name))  # 1 then
    if lost := [name for name in whole.shapes if name not in tensors and name not in absent]:
        words = name_some([_with_purpose(name, whole) for name in lost])
        hint = _packed_hint(lost, tensors, whole) or _other_names_hint(_surplus(tensors, whole, absent))
        raise ValueError(f"{where} lacks {words}{hint}")
    if surplus := _surplus(tensors, whole, absent):
        told = [f"{name} in {os.path.basename(tensors[name][0])}" for name in surplus]
        raise ValueError(f"{where} has tensors that the model does not have: {name_some(told)}")


def _surplus(tensors: Tensors, whole: WholeModel, absent: Collection[str]) -> list[str]:
    """Names that no rank has a place for."""
    if not whole.is_complete:
        return []  # the rest belongs to other ranks
    known = {name for name in whole.shapes if name not in absent or is_cache_scale(name)}
    return [name for name in tensors if name not in known and not _is_idle(name, whole)]


def _other_names_hint(surplus: Sequence[str]) -> str:
    """What there is instead, if names are spelled in a way that nobody knows."""
    if not surplus:
        return ""
    rest = f" and {len(surplus) - 1} others that the model does not have" if len(surplus) > 1 else ""
    return f"; it has {surplus[0]}{rest}"


def _is_idle(name: str, whole: WholeModel) -> bool:
    """Whether files may hold a tensor that the model has no place for."""
    is_idle_head = name == HEAD and (whole.is_tied or not whole.has_head)
    return is_idle_head or bool(whole.surplus and re.match(whole.surplus, name)) or is_harmless(name)


def _packed_hint(lost: list[str], tensors: Tensors, whole: WholeModel) -> str:
    """What the files hold instead, if that is packed."""
    packed = [name.removesuffix(".weight") + end for name in lost for end in PACKED_SUFFIXES]
    found = next((name for name in packed if name in tensors), None)
    if found is None:
        return ""
    weight = f"{found.rpartition('.')[0]}.weight"
    if _is_said_quantised(weight, whole):
        return f"; it has {found}: {_never_quantised(weight)}"
    return f"; it has {found}, a quantised weight of which {_source(whole)} says nothing"


def _source(whole: WholeModel) -> str:
    """What says how weights are quantised."""
    return whole.quantization.file if whole.quantization is not None else "the model's config"


def _is_said_quantised(name: str, whole: WholeModel) -> bool:
    """Whether the config says so of a weight that this engine has plain: the head weights of an index, a router's."""
    quantization = whole.quantization
    if quantization is None or quantization.is_online or name in whole.quantised:
        return False
    return not quantization.is_ignored(name.removesuffix(".weight"))


def _never_quantised(name: str) -> str:
    return (
        f"{name} is computed unquantised here, whatever the other weights are; the checkpoint must be made with "
        f"{name.removesuffix('.weight')} among the modules that are not quantised"
    )


def _with_purpose(name: str, whole: WholeModel) -> str:
    return f"{name} (the scales of quantised weights)" if name in whole.grids and "scale" in name else name


def _check_types(tensors: Tensors, whole: WholeModel, where: str) -> None:
    quantization = whole.quantization
    weights = [name for name in whole.quantised if name in tensors]
    others = [name for name in weights if tensors[name][1].dtype != whole.dtypes[name]]
    source = _source(whole)
    if is_quantised_here(tensors, whole):
        for name in sorted(set(weights) - set(others)):
            raise ValueError(
                f"{tensors[name][0]}: {name} is {FP8}, but {where} has no quantization_config that says so: weights "
                "that are quantised already can't be quantised while they are read"
            )
    elif others or (whole.quantised and not weights):
        kind = quantization.name if quantization is not None else "quantised"
        if len(others) == len(weights):
            example = _typed(tensors, min(others)) if others else f"there is no {min(whole.quantised)}"
            raise ValueError(f"{source} says that weights are {kind}, but {where} holds none: {example}")
        name = min(others)
        raise ValueError(
            f"{_typed(tensors, name)}, but {source} says that it is {whole.dtypes[name]}: name it among the modules "
            "that are not quantised"
        )
    for name, (path, info) in tensors.items():
        if name in whole.grids:
            _check_grid_type(name, path, info, whole)
        elif name in whole.shapes and name not in whole.quantised:
            _check_type(name, path, info, whole)


def _typed(tensors: Tensors, name: str) -> str:
    path, info = tensors[name]
    return f"{path}: {name} is {info.dtype}"


def _check_grid_type(name: str, path: str, info: TensorInfo, whole: WholeModel) -> None:
    held = whole.dtypes[name]
    allowed = (*PLAIN_FLOATS, *EXPONENTS) if held == "float32" else (held,)
    if info.dtype not in allowed:
        words = ", ".join(allowed[:-1]) + (" or " if allowed[1:] else "") + allowed[-1]
        raise ValueError(f"{path}: {name} is {info.dtype}, but belongs to a quantised matrix as {words}")


def _check_type(name: str, path: str, info: TensorInfo, whole: WholeModel) -> None:
    if info.dtype in CASTABLE_DTYPES:
        return
    if _is_said_quantised(name, whole):
        raise ValueError(f"{path}: {name} is {info.dtype}: {_never_quantised(name)}")
    if info.dtype.startswith("float8"):
        raise ValueError(f"{path}: {name} is {info.dtype}, but {_source(whole)} does not say that it is quantised")
    raise ValueError(f"{path}: {name} is {info.dtype}; a weight must be one of {', '.join(CASTABLE_DTYPES)}")


def _check_shapes(tensors: Tensors, whole: WholeModel) -> None:
    """Each tensor must be exactly as large as the whole model needs it; of other ranks' parts nothing may be known."""
    for name, shape in whole.shapes.items():
        if name not in tensors:
            continue
        path, info = tensors[name]
        if name in whole.grids and is_one_number(info) and (_is_of_rows(name, whole) or set(shape) == {1}):
            continue
        has_room = len(info.shape) == len(shape) and all(a >= b for a, b in zip(info.shape, shape, strict=True))
        if not has_room or (whole.is_complete and info.shape != shape):
            hint = _grid_hint(whole) if name in whole.grids else ""
            raise ValueError(f"{path}: {name} has the shape {info.shape}, the model needs {shape}{hint}")


def _is_of_rows(name: str, whole: WholeModel) -> bool:
    """Whether a scale is one for each row, or may be for all of them, rather than one for each block."""
    if whole.quantization is None:
        return whole.dtypes[name] == "float32" and not name.endswith(SCALE_SUFFIXES[1])
    return any(name.endswith(grid.suffix) and grid.columns == WHOLE for _, grid in whole.quantization.format)


def is_one_number(info: TensorInfo) -> bool:
    """Whether a scale is one for the whole matrix."""
    return all(extent == 1 for extent in info.shape)


def _grid_hint(whole: WholeModel) -> str:
    if whole.quantization is None:
        return ""
    summary = whole.quantization.format.summary
    said = summary if summary != "rows" else "no blocks (weight_block_size): a scale for a row or a matrix"
    return f": {whole.quantization.file} says {said}"


def settle_scales(tensors: Mapping[str, TensorInfo], whole: WholeModel) -> dict[str, TensorInfo]:
    """A file's tensors with scales under the names, and in the shapes, that boxes have.

    Both `<weight>_scale` and `<weight>_scale_inv` are in use for the same: a factor of the stored values. Which of them
    a box names tells scales of rows from those of blocks.
    """
    result = {}
    for name, info in tensors.items():
        if name.endswith(BLOCKS) and len(info.shape) == 4:  # a row's blocks, which follow each other
            info = TensorInfo(info.dtype, (*info.shape[:2], info.shape[2] * info.shape[3]), info.offset, info.nbytes)
        settled = _settled_name(name, tensors, whole)
        shape = whole.shapes[settled] if settled in whole.grids else ()
        if len(info.shape) == 1 and not is_one_number(info) and shape[-1:] == (1,):
            info = TensorInfo(info.dtype, (*info.shape, 1), info.offset, info.nbytes)
        result[settled] = info
    return result


def _settled_name(name: str, tensors: Mapping[str, TensorInfo], whole: WholeModel) -> str:
    suffix, other = SCALE_SUFFIXES if name.endswith(SCALE_SUFFIXES[0]) else reversed(SCALE_SUFFIXES)
    weight = name.removesuffix(suffix)
    if weight == name or weight not in whole.quantised or name in whole.shapes:
        return name
    return name if weight + other in tensors else weight + other
