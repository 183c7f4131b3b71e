"""Owns the calls of the kernels for CPUs: which tensors they take, and what they give.

All compute in float32 and round once. Tensors that they read as a whole are made contiguous where they are not.
"""

import ctypes

import torch

from ramet.srt.layers.cpu_kernels.library import RotationCall, call, library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
WITH_MEMORY = (torch.Tensor, torch.nn.Parameter)  # not the kinds that stand for a tensor


def use_cpu_kernels(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a layer takes its kernel for this input.

    Args:
        others: that have to be contiguous, and of the type of x, for that.
    """
    if library() is None or type(x) not in WITH_MEMORY or x.device.type != "cpu" or x.dtype not in COMPUTED:
        return False
    return all(other is None or (other.dtype == x.dtype and other.is_contiguous()) for other in others)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for x [num_rows, input_size] and contiguous W [output_size, input_size] and b of its type."""
    x = x.contiguous()
    (num_rows, input_size), output_size = x.shape, weight.shape[0]
    y = torch.empty((num_rows, output_size), dtype=x.dtype)
    addresses = x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr()
    call("linear", DTYPES[x.dtype], *addresses, num_rows, output_size, input_size)
    return y


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, *, offset: float = 0.0
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over rows of [num_rows, size].

    Args:
        weight: contiguous, of the type of x.
        residual: the same, in the shape of x: the norm is of their sum, which takes its place.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    addresses = x.data_ptr(), address(residual), weight.data_ptr(), y.data_ptr()
    call("rms_norm", DTYPES[x.dtype], *addresses, *x.shape, eps, offset)
    return y


def act_and_mul(x: torch.Tensor, activation: str) -> torch.Tensor:
    """[num_rows, 2 * n] -> [num_rows, n]: activation of the first half times the second half."""
    x = x.contiguous()
    num_rows, num = x.shape[0], x.shape[1] // 2
    y = torch.empty((num_rows, num), dtype=x.dtype)
    kind = ACTIVATIONS[activation]
    call("act_and_mul", DTYPES[x.dtype], kind, x.data_ptr(), y.data_ptr(), num_rows, num)
    return y


def rotate_and_store(
    qkv: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    norm_offset: float,
    has_gates: bool,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    """Norm and rotate q and k, and write k and v to the cache; see RadixAttention.rotate_and_store.

    Args:
        qkv: [num_tokens, columns].
        cos_sin: each [num_tokens, 1, rotary_dim / 2], contiguous, of the type of qkv.
        slots: int64 [num_tokens].
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim].

    Returns:
        [num_tokens, num_q_heads, head_dim].
    """
    qkv = qkv.contiguous()
    num_kv_heads, head_dim = k_cache.shape[1:]
    q = torch.empty((len(qkv), num_q_heads, head_dim), dtype=qkv.dtype)
    cos, sin = cos_sin if cos_sin is not None else (None, None)
    rotation = RotationCall(
        num_tokens=len(qkv), num_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        half=0 if cos is None else cos.shape[-1], qkv=qkv.data_ptr(), cos=address(cos), sin=address(sin),
        q_norm=address(q_norm), k_norm=address(k_norm), slots=slots.data_ptr(), q=q.data_ptr(),
        k_cache=k_cache.data_ptr(), v_cache=v_cache.data_ptr(), kv_scales=address(kv_scales), eps=eps,
        offset=norm_offset, has_gates=has_gates, dtype=DTYPES[qkv.dtype], cache_dtype=DTYPES[k_cache.dtype],
    )  # fmt: skip
    call("rotate_and_store", ctypes.byref(rotation))
    return q


def best_tokens(logits: torch.Tensor, invalid: int) -> torch.Tensor:
    """int64 [num_rows]: the first of the largest of each row of float32 [num_rows, vocab_size].

    `invalid` for a row with NaN, or without a largest number that is finite.
    """
    logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    call("best_tokens", logits.data_ptr(), tokens.data_ptr(), *logits.shape, invalid)
    return tokens


def sample(
    logits: torch.Tensor,
    is_greedy: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    invalid: int,
) -> torch.Tensor:
    """int64 [num_rows]: a token for each row of float32 [num_rows, vocab_size]; see layers/sampler.py.

    Args:
        is_greedy: bool [num_rows]; the others are one number for each row, too, top_ks of int64, the rest of float32.
        invalid: for a row with NaN, or without a largest number that is finite.
    """
    logits = logits.contiguous()
    rules = [tensor.contiguous() for tensor in (is_greedy, uniforms, temperatures, top_ks, top_ps, min_ps)]
    tokens = torch.empty(len(logits), dtype=torch.int64)
    addresses = logits.data_ptr(), tokens.data_ptr()
    call("sample", *addresses, *logits.shape, *(tensor.data_ptr() for tensor in rules), invalid)
    return tokens
