"""Owns the measuring of which library attends, if any: to long prompts, and to the latent rows of a model's layers."""

import torch
from torch import nn

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.layers.attention.base_attn_backend import PassLimits
from ramet.srt.layers.attention.prompts.choice import PromptChoice, shape_of
from ramet.srt.layers.attention.registry import choose_attn_backend, describe_attention
from ramet.srt.layers.kernels.choices import LATENT_ROWS, PROMPTS
from ramet.srt.layers.tuned_file import make_entry
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.model_executor.tuner import Tuner

PAGE_SIZE = 16
LIMITS = PassLimits(max_tokens=8192, max_keys=16384, num_pages=4096)
TIMEOUT_S = 600.0  # libraries compile
ROWS_PAGE_SIZES = (16, 64)  # the default, and what FlashMLA needs


def tune_prompts(tuner: Tuner, model: nn.Module, config: ModelConfig, dtype: torch.dtype) -> None:
    """Measure it where something else than Ramet's kernels could compute them.

    Raises:
        RuntimeError: if it takes too long.
    """
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    kv_dtype = torch.float8_e4m3fn if config.has_fp8_cache else dtype
    spec = describe_attention(model, tuner.device, dtype, kv_dtype, PAGE_SIZE)
    shape = shape_of(spec)
    if choose_attn_backend("auto", spec) is not TritonAttnBackend or spec.soft_cap is not None or not shape[-1]:
        return
    pool = TokenToKVPool(num_pages=1, page_size=PAGE_SIZE, layers=[spec.kv], dtype=kv_dtype, device=tuner.device)
    choice = PromptChoice(spec, LIMITS, TritonAttnBackend(spec, pool).plan_prompts)
    if not choice.wait(TIMEOUT_S):
        raise RuntimeError(f"the attention of prompts was not measured within {TIMEOUT_S:g} s")
    tuner.tuned.append((PROMPTS.name, shape))
    if choice.own_s:  # else nothing ran
        chosen_s = choice.chosen_s or choice.own_s
        tuner.entries.append(make_entry(PROMPTS.name, shape, choice.value, chosen_s * 1e6, choice.own_s * 1e6))


def tune_latent_rows(tuner: Tuner, model: nn.Module, dtype: torch.dtype) -> None:
    """Measure it for requests that decode, where something else than Ramet's kernels could compute them."""
    from ramet.srt.layers.attention.latent_library_backend import LatentLibraryBackend
    from ramet.srt.layers.attention.rows import choice

    for page_size in ROWS_PAGE_SIZES:
        spec = describe_attention(model, tuner.device, dtype, dtype, page_size)
        shape = choice.shape_of(spec)
        if choose_attn_backend("auto", spec) is not LatentLibraryBackend or not shape[-1]:
            continue
        measured = choice.Measured(spec, [one for one in choice.CANDIDATES if one.obstacle(spec) is None])
        tuner.tuned.append((LATENT_ROWS.name, shape))
        if measured.own_s:  # else nothing ran
            best_s = measured.best_s or measured.own_s
            tuner.entries.append(
                make_entry(LATENT_ROWS.name, shape, measured.value, best_s * 1e6, measured.own_s * 1e6)
            )
