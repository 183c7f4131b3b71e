"""Owns how a model's weights are declared as quantised: which of them, and what of a checkpoint's grids fills them."""

from collections.abc import Sequence

import torch
from torch import nn

from ramet.srt.configs.quantization_config import WEIGHT_SUFFIX, QuantizationConfig
from ramet.srt.configs.weight_format import BLOCKS, Grid, WeightFormat
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.quantization.weight import GridIndex, WeightLayout, layout_attribute
from ramet.srt.weights.boxes import Region
from ramet.srt.weights.manifest import WeightBox

Range = tuple[int, int]


def declare_quantised(model: nn.Module, config: QuantizationConfig, device: torch.device | str = "cpu") -> None:
    """Turn the weights that `config` says are quantised, on the meta device, into the grids of its format.

    A layer names in `quantisable_weights` which of its weights may be: embedding, head, routers and norms name none.

    Args:
        device: where the weights will be; what tells a number's place in a rank's matrix is made there.

    Raises:
        ValueError: if only some of the checkpoint matrices that one weight is made of are quantised, if the format does
            not know them, or if a rank's part begins or ends within a word of packed numbers.
    """
    for path, module in model.named_modules():
        for name in getattr(module, "quantisable_weights", ()):
            boxes = getattr(module, name).boxes
            if _is_quantised(boxes, config, f"{path}.{name}"):
                if config.format.values.suffix == BLOCKS and boxes[0].checkpoint_name.endswith(WEIGHT_SUFFIX):
                    raise ValueError(
                        f"{config.file}: {config.method} is known for stacked experts alone, and does not leave out "
                        f"{boxes[0].checkpoint_name}, which is none"
                    )
                declare_format(module, name, config.format, device)


def _is_quantised(boxes: tuple[WeightBox, ...], config: QuantizationConfig, name: str) -> bool:
    ignored = {box.checkpoint_name: config.is_ignored(box.checkpoint_name.removesuffix(WEIGHT_SUFFIX)) for box in boxes}
    if len(set(ignored.values())) > 1:
        plain = next(part for part, is_plain in ignored.items() if is_plain)
        other = next(part for part, is_plain in ignored.items() if not is_plain)
        raise ValueError(
            f"{config.file}: it leaves {plain} as it is and quantises {other}; as both are parts of {name} here, "
            "they must be of one kind"
        )
    return not any(ignored.values())


def declare_format(module: nn.Module, name: str, weight_format: WeightFormat, device: torch.device | str) -> None:
    """Make the weight `name`, [..., num_rows, n], the grids of a format: values in its place, others beside it."""
    weight = getattr(module, name)
    indices = {}
    for role, grid in weight_format:
        has_all_columns = weight_format.column_groups is not None and role in ("scales", "zeros")
        columns = (0, vars(weight)["all_columns"]) if has_all_columns else weight.boxes[0].source[-1]
        shape, boxes, indices[role] = _lay_out(tuple(weight.shape), weight.boxes, columns, grid, device)
        setattr(module, name + grid.attribute, declare_weight(shape, getattr(torch, grid.dtype), boxes))
    setattr(module, layout_attribute(name), WeightLayout(weight_format, weight.shape[-2], weight.shape[-1], indices))


def _lay_out(
    shape: tuple[int, ...], boxes: Sequence[WeightBox], part: Range, grid: Grid, device: torch.device | str
) -> tuple[tuple[int, ...], list[WeightBox], GridIndex]:
    """A rank's tensor of a grid, from the shape and boxes of its matrix or stack of them, and the columns that it has.

    A rank whose rows or columns begin or end within what an element covers has all of that element, as its neighbour.
    """
    assert len({box.source[-1] for box in boxes}) == 1, "the parts of a matrix have the same columns"
    columns = _cover(*part, grid.columns, grid.packs_columns, boxes[0].checkpoint_name)
    parts: dict[Region, list[WeightBox]] = {}  # of each matrix of a stack
    for box in boxes:
        parts.setdefault(box.target[:-2], []).append(box)
    cuts = {tuple((box.source[-2], box.target[-2]) for box in matrix) for matrix in parts.values()}
    assert len(cuts) == 1, "the matrices of a stack are cut alike"
    has_index = grid.rows > 1 and not grid.is_packed
    index = torch.empty(shape[-2], dtype=torch.int32) if has_index else None
    result: list[WeightBox] = []
    num_grid_rows = 0
    for place, matrix in parts.items():
        num_grid_rows = 0
        for box in matrix:
            (start, stop), (target_start, target_stop) = box.source[-2], box.target[-2]
            source = _cover(start, stop, grid.rows, grid.packs_rows, box.checkpoint_name)
            target = (num_grid_rows, num_grid_rows + source[1] - source[0])
            if index is not None and len(result) < len(matrix):
                rows = torch.arange(start, stop, dtype=torch.int32) // grid.rows
                index[target_start:target_stop] = rows + (target[0] - source[0])
            width = (0, columns[1] - columns[0])
            result.append(
                WeightBox(
                    _checkpoint_name(box, grid),
                    (*box.source[:-2], *_in_file(source, columns, grid)),
                    (*place, *((width, target) if grid.is_transposed else (target, width))),
                )
            )
            num_grid_rows = target[1]
    extents = (num_grid_rows, columns[1] - columns[0])
    tensor_shape = (*shape[:-2], *(extents[::-1] if grid.is_transposed else extents))
    first_column = part[0] % grid.columns
    if index is None:
        return tensor_shape, result, GridIndex(None, grid.columns, first_column)
    is_regular = torch.equal(index, torch.arange(len(index), dtype=torch.int32) // grid.rows)
    return tensor_shape, result, GridIndex(index.to(device), grid.columns, first_column, is_regular)


def _cover(start: int, stop: int, size: int, is_packed: bool, name: str) -> Range:
    """The elements of `size` rows or columns that have all from `start` to `stop`."""
    if is_packed and (start % size or stop % size):
        raise ValueError(
            f"{name}: a rank's part, from {start} to {stop}, would cut a word of {size} packed numbers; choose another "
            "tp_size"
        )
    return start // size, -(-stop // size)


def _in_file(rows: Range, columns: Range, grid: Grid) -> tuple[Range, ...]:
    if grid.is_of_columns:
        return (columns,)
    return (columns, rows) if grid.is_transposed else (rows, columns)


def _checkpoint_name(box: WeightBox, grid: Grid) -> str:
    return box.checkpoint_name.removesuffix(WEIGHT_SUFFIX) + grid.suffix
