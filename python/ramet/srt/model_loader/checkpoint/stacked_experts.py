"""Owns the second spelling of experts in checkpoints: all of a layer in one tensor. Knows names and offsets, no data.

Published checkpoints of Qwen3-MoE and Mixtral hold every expert's matrices as tensors of their own, and the boxes
name those. transformers 5 stacks them in memory, under the same module names for all families, and writes that when
it is told not to restore the original format; so do trainers that save its state dict. Those of Qwen3-VL-MoE are
published as stacks, of transposed matrices.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo

STACKED = re.compile(
    r"(?P<layer>.+)\.mlp\.(?P<part>gate\.weight|e_score_correction_bias|experts\.gate_up_proj|experts\.down_proj)(?P<scale>_scale(_inv)?)?"
)
PLAIN_STACK = re.compile(r".+\.mlp\.experts\.(gate_up_proj|down_proj)")
FP8 = "float8_e4m3fn"
EXPERT_NAMES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}


def has_transposed_experts(shapes: Iterable[tuple[str, tuple[int, ...]]], hidden_size: int | None) -> bool:
    """Whether the matrices in a checkpoint's stacks are transposed: columns before rows. All of them are, or none.

    Args:
        shapes: of all of the checkpoint's tensors, with their names.
        hidden_size: None where it isn't known: then none are.

    Raises:
        ValueError: if some are and others not.
    """
    found: dict[bool, str] = {}
    for name, shape in shapes:
        match = STACKED.fullmatch(name)
        if match is None or match["scale"] or len(shape) != 3 or shape[1] == shape[2] or hidden_size not in shape[1:]:
            continue
        inner = shape[2] if match["part"] == "experts.gate_up_proj" else shape[1]
        found.setdefault(inner != hidden_size, name)
    if len(found) > 1:
        raise ValueError(f"the matrices in {found[True]} are transposed, those in {found[False]} are not")
    return True in found


def is_turned_stack(name: str) -> bool:
    """Whether a tensor that boxes name, as checkpoints do, has rows where those have columns.

    Boxes name stacks of one family alone, gpt-oss, and its files have plain matrices so; its shapes may not tell it.
    """
    return PLAIN_STACK.fullmatch(name) is not None


def split_stacked_experts(
    path: str,
    tensors: Mapping[str, TensorInfo],
    wanted: Collection[str],
    block_size: tuple[int, int] | None = None,
    are_transposed: bool = False,
) -> dict[str, TensorInfo]:
    """The tensors of a file under the names of a per-expert checkpoint; what is not stacked stays as it is.

    Args:
        wanted: names of checkpoint tensors that the model has boxes for, which tell the family's spelling.
        block_size: of fp8 weights with scales of blocks. A gate's last block must not reach into the up matrix behind.
        are_transposed: see `has_transposed_experts`.

    Raises:
        ValueError: if the file holds an expert in both spellings, or such a block.
    """
    result = {
        name: info.transposed() if name in wanted and is_turned_stack(name) and len(info.shape) == 3 else info
        for name, info in tensors.items()
        if name in wanted or not STACKED.fullmatch(name)
    }
    for name, info in tensors.items():
        if name in result:
            continue
        for new_name, part in _split(path, name, info, wanted, block_size, are_transposed):
            if new_name in result:
                raise ValueError(f"{path} has {new_name} twice: {name} holds it too")
            result[new_name] = part
    return result


def _split(
    path: str,
    name: str,
    info: TensorInfo,
    wanted: Collection[str],
    block_size: tuple[int, int] | None,
    are_transposed: bool,
) -> list[tuple[str, TensorInfo]]:
    match = STACKED.fullmatch(name)
    assert match is not None
    layer, part, scale = match["layer"], match["part"], match["scale"] or ""
    block = "block_sparse_moe" if f"{layer}.block_sparse_moe.gate.weight" in wanted else "mlp"
    if not part.startswith("experts"):
        if scale:
            return [(name, info)]
        return [(f"{layer}.{block}.{part}", info)]
    gate, up, down = EXPERT_NAMES[block]
    matrices = (gate, up) if part == "experts.gate_up_proj" else (down,)
    if len(info.shape) != 3 or info.shape[2 if are_transposed else 1] % len(matrices):
        return [(name, info)]
    stack = [info.matrix(expert) for expert in range(info.shape[0])]
    if are_transposed:
        stack = [matrix.transposed() for matrix in stack]
    rows = info.shape[2 if are_transposed else 1] // len(matrices)
    if info.dtype == FP8 and block_size is not None:
        _check_blocks(path, name, rows if len(matrices) > 1 else 0, block_size, are_transposed)
    return [
        (f"{layer}.{block}.experts.{expert}.{kind}.weight{scale}", matrix.part(0, place * rows, (place + 1) * rows))
        for expert, matrix in enumerate(stack)
        for place, kind in enumerate(matrices)
    ]


def _check_blocks(path: str, name: str, gate_rows: int, block_size: tuple[int, int], are_transposed: bool) -> None:
    if are_transposed and block_size[0] != block_size[1]:
        raise ValueError(
            f"{path}: {name} holds transposed matrices, of which blocks of {block_size[0]} x {block_size[1]} may be "
            "rows or columns: such scales are not supported"
        )
    if gate_rows % block_size[0]:
        raise ValueError(
            f"{path}: {name} holds each expert's gate, {gate_rows} rows, above its up matrix, and a block "
            f"of {block_size[0]} rows has some of both: such scales are not supported"
        )
