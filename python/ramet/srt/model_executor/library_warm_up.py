"""Owns the numbers of rows with which libraries are called, and having them load the kernels for these.

CUDA loads a kernel when it is first launched, and the device seems to stand still for it. A library of products has
dozens for one matrix and picks one by the number of rows, so that passes would stall until all of them have come by:
those that no graph holds, and the output head's, whose rows are the sequences that get a token. So rows are padded to
some numbers.
"""

from collections.abc import Callable

import torch
from torch import nn

from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.matmul import project
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.layers.sampler import warm_up_sampling
from ramet.srt.model_executor.cuda_graph_runner import CHUNK_SIZES

STEPS = {512: 8, 2048: 64}  # up to so many rows, their number is a multiple of it
LARGE_STEP = 128


def padded_count(num_rows: int) -> int:
    """The number of rows to which so many are padded: a single one stays one."""
    if num_rows <= 1:
        return num_rows
    step = next((step for most, step in STEPS.items() if num_rows <= most), LARGE_STEP)
    return -(-num_rows // step) * step


def padded_counts(least: int, most: int) -> list[int]:
    """What numbers of rows from `least` to `most` are padded to, falling, so that the first takes all the memory."""
    return sorted({padded_count(number) for number in range(least, most + 1)}, reverse=True)


@torch.inference_mode()
def warm_up_head(
    compute_logits: Callable[[torch.Tensor], torch.Tensor], hidden_state: torch.Tensor, max_batch_size: int
) -> None:
    """Compute the logits of as many sequences as may get a token, and choose the tokens of the most.

    Args:
        hidden_state: [1, hidden_size].
    """
    for count in padded_counts(1, max_batch_size):
        logits = compute_logits(hidden_state.repeat(count, 1))
        if count >= max_batch_size:
            warm_up_sampling(logits)


@torch.inference_mode()
def warm_up_products(model: nn.Module, dtype: torch.dtype, max_tokens: int, is_captured: bool) -> None:
    """Multiply with one of the model's matrices of every shape.

    Args:
        is_captured: whether graphs hold the passes of up to CHUNK_SIZES[-1] tokens, whose kernels are loaded then.
    """
    seen = set()
    counts = padded_counts(CHUNK_SIZES[-1] + 1 if is_captured else 1, max_tokens)
    for layer in model.modules():
        if not isinstance(layer, MergedColumnParallelLinear | RowParallelLinear):
            continue
        weight = weight_of(layer, "weight")
        kind = weight.shape, layer.weight.dtype, layer.bias is None
        if kind in seen:
            continue
        seen.add(kind)
        x = torch.zeros((padded_count(max_tokens), weight.shape[1]), dtype=dtype, device=weight.device)
        for count in counts:
            project(x[:count], weight, layer.bias)
