"""Owns how a model's weights are declared as quantised: which of them, and where their scales come from."""

import torch
from torch import nn

from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.quantization.fp8 import FP8
from ramet.srt.layers.quantization.scales import BlockIndex
from ramet.srt.weights.boxes import Region
from ramet.srt.weights.manifest import WeightBox

WEIGHT_SUFFIX = ".weight"


def declare_fp8(model: nn.Module) -> None:
    """Turn the weights that a model's layers name in `quantisable_weights`, on the meta device, into fp8 by row.

    Embedding, output head, routers and norms name none and keep their type.
    """
    declare_quantised(model, QuantizationConfig(method="online", file="", strategy="channel"))


def declare_quantised(model: nn.Module, config: QuantizationConfig, device: torch.device | str = "cpu") -> None:
    """Turn the weights that `config` says are quantised, on the meta device, into fp8 with scales.

    Args:
        device: where the weights will be; what tells a block's place in a rank's matrix is made there.

    Raises:
        ValueError: if only some of the checkpoint matrices that one weight is made of are quantised.
    """
    for path, module in model.named_modules():
        for name in getattr(module, "quantisable_weights", ()):
            if not _is_quantised(getattr(module, name).boxes, config, f"{path}.{name}"):
                continue
            if config.block_size is None:
                _declare_rows(module, name)
            else:
                _declare_blocks(module, name, config.block_size, device)


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


def _declare_rows(module: nn.Module, name: str) -> None:
    """Make the weight `name`, [..., num_rows, n], fp8, with one scale for each row in `<name>_scale`."""
    weight = getattr(module, name)
    setattr(module, name, declare_weight(weight.shape, FP8, weight.boxes))
    one = ((0, 1),)
    boxes = [
        WeightBox(f"{box.checkpoint_name}_scale", box.source[:-1] + one, box.target[:-1] + one) for box in weight.boxes
    ]
    setattr(module, f"{name}_scale", declare_weight((*weight.shape[:-1], 1), torch.float32, boxes))


def _declare_blocks(module: nn.Module, name: str, block_size: tuple[int, int], device: torch.device | str) -> None:
    """Make the weight `name`, [..., num_rows, n], fp8, with the checkpoint's grids of scales in `<name>_scale_inv`.

    A rank whose rows or columns begin or end within a block has the whole scale of that block, as has its neighbour.
    """
    weight = getattr(module, name)
    block_rows, block_columns = block_size
    (first, last), *others = {box.source[1] for box in weight.boxes}
    assert not others, "the parts of a matrix have the same columns"
    columns = (first // block_columns, -(-last // block_columns))
    parts: dict[Region, list[WeightBox]] = {}  # of each matrix of a stack
    for box in weight.boxes:
        parts.setdefault(box.target[:-2], []).append(box)
    cuts = {tuple((box.source[0], box.target[-2]) for box in matrix) for matrix in parts.values()}
    assert len(cuts) == 1, "the matrices of a stack are cut alike"
    index = torch.empty(weight.shape[-2], dtype=torch.int32)
    boxes: list[WeightBox] = []
    num_grid_rows = 0
    for place, matrix in parts.items():
        num_grid_rows = 0
        for box in matrix:
            (start, stop), (target_start, target_stop) = box.source[0], box.target[-2]
            grid = (start // block_rows, -(-stop // block_rows))
            target = (num_grid_rows, num_grid_rows + grid[1] - grid[0])
            if len(boxes) < len(matrix):
                rows = torch.arange(start, stop, dtype=torch.int32) // block_rows
                index[target_start:target_stop] = rows + (target[0] - grid[0])
            width = (0, columns[1] - columns[0])
            boxes.append(WeightBox(f"{box.checkpoint_name}_scale_inv", (grid, columns), (*place, target, width)))
            num_grid_rows = target[1]
    setattr(module, name, declare_weight(weight.shape, FP8, weight.boxes))
    shape = (*weight.shape[:-2], num_grid_rows, columns[1] - columns[0])
    setattr(module, f"{name}_scale_inv", declare_weight(shape, torch.float32, boxes))
    setattr(module, f"{name}_blocks", BlockIndex(index.to(device), block_columns, first % block_columns))
