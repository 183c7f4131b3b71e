"""Owns the second spelling of experts in checkpoints: all of a layer in one tensor. Knows names and offsets, no data.

Published checkpoints of Qwen3-MoE and Mixtral hold every expert's matrices as tensors of their own, and the boxes
name those. transformers 5 stacks them in memory, under the same module names for all families, and writes that when
it is told not to restore the original format; so do trainers that save its state dict.
"""

import re
from collections.abc import Collection, Mapping

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo

STACKED = re.compile(
    r"(?P<layer>.+)\.mlp\.(?P<part>gate\.weight|e_score_correction_bias|experts\.gate_up_proj|experts\.down_proj)(?P<scale>_scale(_inv)?)?"
)
FP8 = "float8_e4m3fn"
EXPERT_NAMES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}


def split_stacked_experts(
    path: str,
    tensors: Mapping[str, TensorInfo],
    wanted: Collection[str],
    block_rows: int | None = None,
) -> dict[str, TensorInfo]:
    """The tensors of a file under the names of a per-expert checkpoint; what is not stacked stays as it is.

    Args:
        wanted: names of checkpoint tensors that the model has boxes for, which tell the family's spelling.
        block_rows: of fp8 weights with scales of blocks. A gate's last block must not reach into the up matrix below.

    Raises:
        ValueError: if the file holds an expert in both spellings, or such a block.
    """
    result = {name: info for name, info in tensors.items() if name in wanted or not STACKED.fullmatch(name)}
    for name, info in tensors.items():
        if name in result:
            continue
        for new_name, part in _split(path, name, info, wanted, block_rows):
            if new_name in result:
                raise ValueError(f"{path} has {new_name} twice: {name} holds it too")
            result[new_name] = part
    return result


def _split(
    path: str, name: str, info: TensorInfo, wanted: Collection[str], block_rows: int | None
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
    if len(info.shape) != 3 or info.shape[1] % len(matrices):
        return [(name, info)]
    num_experts, rows, columns = info.shape
    is_fused = len(matrices) > 1 and info.dtype == FP8
    if is_fused and block_rows is not None and rows // len(matrices) % block_rows:
        raise ValueError(
            f"{path}: {name} holds each expert's gate, {rows // len(matrices)} rows, above its up matrix, and a block "
            f"of {block_rows} rows has some of both: such scales are not supported"
        )
    shape = (rows // len(matrices), columns)
    nbytes = info.nbytes // max(1, num_experts * len(matrices))
    return [
        (
            f"{layer}.{block}.experts.{expert}.{matrix}.weight{scale}",
            TensorInfo(info.dtype, shape, info.offset + (expert * len(matrices) + place) * nbytes, nbytes),
        )
        for expert in range(num_experts)
        for place, matrix in enumerate(matrices)
    ]
