"""The kernels of norm, activation and rotation against the layers' own torch code."""

import pytest
import torch
from pairs import pairs
from ramet.srt.configs.model_config import RopeConfig
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.rotary_embedding import RotaryEmbedding, apply_rotary

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[actual.dtype], rtol=TOLERANCE[actual.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows, size", [(1, 64), (5, 80), (3, 1000), (0, 64)])
def test_rms_norm(device, dtype, num_rows, size):
    from ramet.srt.layers.kernels.norm import rms_norm

    x, residual = torch.randn(2, num_rows, size, device=device, dtype=dtype)
    weight = torch.randn(size, device=device, dtype=dtype)
    close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (size,), weight, 1e-5))
    total = x + residual
    close(rms_norm(x, weight, 1e-5, residual), torch.nn.functional.rms_norm(total, (size,), weight, 1e-5))
    close(residual, total)
    offset_norm = torch.nn.functional.rms_norm(x.float(), (size,), weight.float() + 1, 1e-5).to(dtype)
    close(rms_norm(x, weight, 1e-5, offset=1.0), offset_norm)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activation(device, name):
    from ramet.srt.layers.kernels.activation import act_and_mul

    x = 3 * torch.randn(3, 2 * 1100, device=device)
    gate, up = x.chunk(2, dim=-1)
    close(act_and_mul(x, name), get_activation(name)(gate) * up)


@pytest.mark.parametrize(
    ("dtype", "heads", "norm_offset", "rotary_factor"),
    pairs([torch.float32, torch.bfloat16], [(4, 2, 16), (6, 3, 24)], [None, 0.0, 1.0], [0, 0.25, 0.75, 1.0]),
    ids=str,
)
def test_rotation_norm_and_cache_write(device, dtype, heads, norm_offset, rotary_factor):
    """All heads of each layer against torch; a factor of 0 stands for a layer without positions."""
    from ramet.srt.layers.kernels.rotary import rotate_and_store

    num_heads, num_kv_heads, head_dim = heads
    num_tokens, num_slots = 5, 12
    rotary = None
    if rotary_factor:
        rope = RopeConfig(theta=10000.0, rotary_factor=rotary_factor)
        positions = torch.tensor([0, 3, 17, 511, 40000], device=device)
        rotary = RotaryEmbedding(rope, head_dim, dtype, device).cos_sin(positions)[:2]
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    qkv = torch.randn(num_tokens, sum(sizes), device=device, dtype=dtype)
    norms = torch.randn(2, head_dim, device=device, dtype=dtype) if norm_offset is not None else (None, None)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.clone().split(sizes, dim=-1))
    if norm_offset is not None:
        weights = (w.float() + norm_offset for w in norms)
        norm = torch.nn.functional.rms_norm
        q, k = (norm(x.float(), (head_dim,), w, 1e-6).to(dtype) for x, w in zip((q, k), weights, strict=True))
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)

    cache = torch.full((2, num_slots, num_kv_heads, head_dim), 7.0, device=device, dtype=dtype)
    slots = torch.tensor([3, 1, 11, 0, 6], device=device)
    rotate_and_store(
        qkv, rotary, slots, cache[0], cache[1],
        num_q_heads=num_heads, q_norm=norms[0], k_norm=norms[1], eps=1e-6, norm_offset=norm_offset or 0.0,
    )  # fmt: skip
    new_q, new_k, new_v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split(sizes, dim=-1))
    close(new_q, q)
    close(new_k, k)
    assert torch.equal(new_v, v)
    assert torch.equal(cache[0][slots], new_k) and torch.equal(cache[1][slots], v)
    others = [slot for slot in range(num_slots) if slot not in slots.tolist()]
    assert (cache[:, others] == 7.0).all()


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_rotation_of_a_row_in_parts(device, num_parts):
    """The sum of the parts is rotated, normed and stored as a row is."""
    from ramet.srt.layers.kernels.rotary import rotate_and_store

    num_heads, num_kv_heads, head_dim, slots = 6, 2, 24, torch.tensor([5], device=device)
    rope = RopeConfig(theta=10000.0, rotary_factor=0.75)
    rotary = RotaryEmbedding(rope, head_dim, torch.float32, device).cos_sin(torch.tensor([17], device=device))[:2]
    parts = torch.randn(num_parts, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    norms = torch.randn(2, head_dim, device=device)
    caches = torch.zeros(2, 2, 9, num_kv_heads, head_dim, device=device)
    options = {"num_q_heads": num_heads, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6}
    before = parts.clone()
    expected = rotate_and_store(parts.sum(0, keepdim=True), rotary, slots, *caches[0], **options)
    got = rotate_and_store(parts, rotary, slots, *caches[1], **options, sum_dtype=torch.float32)
    close(got, expected)
    close(caches[1], caches[0])
    assert torch.equal(parts, before) and got.shape == (1, num_heads, head_dim) and got.stride() == expected.stride()


@pytest.mark.parametrize("num_parts, size", [(1, 64), (5, 300), (70, 128)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_begin_of_a_norm_of_sums(device, num_parts, size, offset):
    """It lacks a factor that depends on all columns, and has what that is made of."""
    from ramet.srt.layers.kernels.add_sums import add_sums

    parts, residual = torch.randn(num_parts, size, device=device), torch.randn(1, size, device=device)
    weight, total = torch.randn(size, device=device), residual + parts.sum(0, keepdim=True)
    values, squares = add_sums(parts, residual, weight, offset)
    torch.testing.assert_close(residual, total, atol=1e-4, rtol=1e-5)
    factor = torch.rsqrt(squares.sum() / size + 1e-5)
    expected = torch.nn.functional.rms_norm(total, (size,), weight + offset, 1e-5)
    torch.testing.assert_close(values * factor, expected, atol=1e-4, rtol=1e-4)


def test_rotation_beside_gates_and_what_they_scale(device):
    """Behind each query stands a gate: the kernels do with the others what they do without."""
    from ramet.srt.layers.kernels.output_gate import gate_output
    from ramet.srt.layers.kernels.rotary import rotate_and_store

    num_heads, num_kv_heads, head_dim, num_tokens = 3, 2, 24, 4
    rope = RopeConfig(theta=10000.0, rotary_factor=0.5)
    rotary = RotaryEmbedding(rope, head_dim, torch.float32, device).cos_sin(torch.arange(3, 7, device=device))[:2]
    plain = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device)
    gates = torch.randn(num_tokens, num_heads, head_dim, device=device)
    pairs = torch.stack((plain[:, :num_heads], gates), dim=2).flatten(1, 2)
    gated = torch.cat((pairs, plain[:, num_heads:]), dim=1).flatten(1)
    norms = torch.randn(2, head_dim, device=device)
    caches = torch.zeros(2, 2, 9, num_kv_heads, head_dim, device=device)
    slots = torch.tensor([3, 1, 8, 0], device=device)
    options = {"num_q_heads": num_heads, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6, "norm_offset": 1.0}
    before = gated.clone()
    expected = rotate_and_store(plain.clone().flatten(1), rotary, slots, *caches[0], **options)
    got = rotate_and_store(gated, rotary, slots, *caches[1], **options, has_gates=True)
    assert torch.equal(got, expected) and torch.equal(caches[0], caches[1]) and torch.equal(gated, before)
    assert got.stride() == expected.stride()  # attention relies on where the rows are
    out = torch.randn(num_tokens, num_heads, head_dim, device=device)
    close(gate_output(out, gated), out * gates.sigmoid())


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cache_writes_in_fp8(device, dtype, has_scales):
    """Numbers of e4m3 alone, which no rounding changes, and one that is too large; a part of each head rotates."""
    from ramet.srt.layers.kernels.rotary import rotate_and_store

    num_heads, num_kv_heads, head_dim, num_tokens = 3, 2, 24, 4
    fp8 = torch.float8_e4m3fn
    qkv = torch.randint(-15, 16, (num_tokens, 7, head_dim), device=device).to(dtype)
    qkv[0, 3:, :2] = 20000.0
    qkv[0, 3:, 2:4] = -20000.0
    scales = torch.tensor([0.5, 4.0], device=device) if has_scales else None
    cos = torch.ones(num_tokens, 1, 8, device=device, dtype=dtype)
    cache = torch.zeros(2, 9, num_kv_heads, head_dim, device=device).to(fp8)
    slots = torch.tensor([3, 1, 8, 0], device=device)
    rotate_and_store(
        qkv.clone().flatten(1), (cos, torch.zeros_like(cos)), slots, cache[0], cache[1],
        num_q_heads=num_heads, q_norm=None, k_norm=None, eps=0.0, kv_scales=scales,
    )  # fmt: skip
    for place, new in enumerate((qkv[:, 3:5], qkv[:, 5:])):
        expected = new.float() / (1.0 if scales is None else scales[place])
        assert torch.equal(cache[place].float()[slots], expected.clamp(-448, 448))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("num_rows, num_columns", [(6, 64), (10, 200)])
def test_gemv(device, num_rows, num_columns, activation, has_bias):
    from ramet.srt.layers.kernels.gemv import gemv

    x = torch.randn(1, num_columns, device=device)
    weight = torch.randn(num_rows, num_columns, device=device) / num_columns**0.5
    bias = torch.randn(num_rows, device=device) if has_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    if activation:
        gate, up = expected.chunk(2, dim=-1)
        expected = get_activation(activation)(gate) * up
    close(gemv(x, weight, bias, None, activation), expected)


def test_fp8_rows(device):
    from ramet.srt.layers.kernels.fp8 import quantize_rows
    from ramet.srt.layers.quantization import fp8

    torch.manual_seed(0)
    x = torch.randn(5, 200, device=device) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0], device=device)[:, None]
    values, scales = quantize_rows(x)
    expected, expected_scales = fp8.quantize_rows(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # The interpreter rounds to fp8 in its own way: by one place now and then, which is an eighth at the most.
    difference = (values.float() * scales - expected.float() * expected_scales).norm(dim=1)
    assert (difference <= x.norm(dim=1) / 8).all()


def test_gemv_of_fp8_weights(device):
    from ramet.srt.layers.kernels.gemv import gemv
    from ramet.srt.layers.quantization.fp8 import quantize_rows

    x, weight = torch.randn(1, 96, device=device), torch.randn(12, 96, device=device)
    values, scales = quantize_rows(weight)
    close(gemv(x, values, None, scales), torch.nn.functional.linear(x, values.float() * scales))
