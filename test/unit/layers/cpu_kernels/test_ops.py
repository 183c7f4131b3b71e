"""Products, norms, activations, rotations and best tokens by the kernels for CPUs, against float64 or PyTorch."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import cpu_kernels  # noqa: F401
from ramet.srt.layers.activation import act_and_mul, get_activation
from ramet.srt.layers.cpu_kernels import library, ops
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.matmul import takes_cpu_kernel
from ramet.srt.layers.rotary_embedding import Rotation, apply_rotary
from ramet.srt.layers.sampler import INVALID_TOKEN, SamplingInfo, sample
from ramet.srt.sampling.sampling_params import SamplingParams
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one number

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, exact, terms=1.0):
    """Whether numbers are rounded once from sums in float32 of so many terms."""
    dtype = actual.dtype
    tolerance = ROUNDING[dtype] + 2e-7 * terms
    assert torch.all((actual.double() - exact).abs() <= tolerance * exact.abs() + 3e-6 * terms**0.5 + tolerance * 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 11, 12, 13, 40, 300, 1030])
@pytest.mark.parametrize("sizes", [(64, 96), (33, 7), (1, 1), (129, 130), (2100, 50)])  # input and output
def test_linear(dtype, num_rows, sizes):
    x, weight, bias = (
        random(num_rows, sizes[0], dtype=dtype),
        random(*sizes[::-1], dtype=dtype, seed=1),
        random(sizes[1], dtype=dtype),
    )
    for b in (None, bias):
        close(
            ops.linear(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double()), sizes[0]
        )


def test_products_read_nothing_beside_their_rows():
    """Behind a weight's last row, and behind each row of x, stands what would show."""
    for num_rows in (1, 4, 30):
        around = torch.full((num_rows + 2, 40), float("nan")).bfloat16()
        around[1:-1] = random(num_rows, 40, dtype=torch.bfloat16)
        weights = torch.full((9, 40), float("nan")).bfloat16()
        weights[1:-1] = random(7, 40, dtype=torch.bfloat16)
        assert ops.linear(around[1:-1], weights[1:-1]).isfinite().all()
        assert ops.linear(around[1:-1, :33], weights[1:-1, :33].contiguous()).isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 3, 50])
def test_numbers_that_are_none_stay_none(num_rows):
    x, weight = random(num_rows, 48).bfloat16(), random(20, 48).bfloat16()
    x[0, 5], weight[3, 7] = float("nan"), float("inf")
    y, expected = ops.linear(x, weight), F.linear(x.float(), weight.float())
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 67, 896])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(dtype, size, offset, monkeypatch):
    norm = RMSNorm(size, "norm", eps=1e-6, offset=offset, dtype=dtype)
    norm.weight = torch.nn.Parameter(random(size, dtype=dtype))
    x, residual = random(37, size, dtype=dtype), random(37, size, dtype=dtype, seed=1)
    plain, (both, total) = norm(x), norm.add_and_norm(x, residual.clone())
    for result, exact in ((plain, x.double()), (both, total.double())):
        scale = (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        close(result, exact * scale * (norm.weight.double() + offset))
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("shape", [(1, 30000), (40, 77)])
def test_activations(dtype, name, shape):
    x = 4 * random(shape[0], 2 * shape[1], dtype=dtype)
    x[0, :4] = torch.tensor([0.0, -200.0, 200.0, -20.0]).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(act_and_mul(x, get_activation(name)), get_activation(name)(gate) * up, 4)
    x[0, 5] = float("nan")
    assert act_and_mul(x, get_activation(name))[0, 5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_gates", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 16, 24])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_rotations(dtype, has_gates, has_norms, rotary_dim, is_fp8):
    num_tokens, num_heads, num_kv_heads, dim = 9, 6, 2, 24
    heads = random(num_tokens, (1 + has_gates) * num_heads + 2 * num_kv_heads, dim, dtype=dtype)
    norms = [random(dim, dtype=dtype, seed=seed) for seed in (2, 3)] if has_norms else [None, None]
    angles = random(num_tokens, 1, rotary_dim // 2)
    rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype)) if rotary_dim else None
    slots = torch.randperm(20)[:num_tokens]
    caches = [torch.zeros(20, num_kv_heads, dim).to(torch.float8_e4m3fn if is_fp8 else dtype) for _ in "kv"]
    scales = torch.tensor([0.5, 4.0]) if is_fp8 else None
    q = ops.rotate_and_store(
        heads.flatten(1), rotation[:2] if rotation else None, slots, *caches, num_q_heads=num_heads, q_norm=norms[0],
        k_norm=norms[1], eps=1e-6, norm_offset=1.0, has_gates=has_gates, kv_scales=scales,
    )  # fmt: skip

    def rotated(part, norm):
        part = part.double()
        if norm is not None:
            part = part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (norm.double() + 1)
        return part if rotation is None else apply_rotary(part, rotation.cos.double(), rotation.sin.double())

    num_queries = (1 + has_gates) * num_heads
    close(q, rotated(heads[:, : num_queries : 1 + has_gates], norms[0]), 4)
    exact = (
        rotated(heads[:, num_queries : num_queries + num_kv_heads], norms[1]),
        heads[:, num_queries + num_kv_heads :].double(),
    )
    for place, (cache, part) in enumerate(zip(caches, exact, strict=True)):
        kept = cache[slots]
        if is_fp8:
            wanted = (part / scales[place]).float().clamp(-448, 448).to(torch.float8_e4m3fn)
            # A number between two others may be rounded to the other one where it was computed in float32.
            assert ((kept.float() - wanted.float()).abs() <= 0.13 * wanted.float().abs() + 2**-9).all()
            assert (kept.view(torch.uint8) != wanted.view(torch.uint8)).float().mean() < 0.01
        else:
            close(kept, part, 4)
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, slots, False)
    assert not any(cache[others].float().any() for cache in caches)


def test_fp8_numbers_are_rounded_as_pytorch_rounds_them():
    """All of float16's numbers, which are more than e4m3 has between any two of its own."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()].float().clamp(-448, 448)
    numbers = numbers[: len(numbers) // 8 * 8]
    caches = [torch.zeros(len(numbers) // 8, 1, 8).to(torch.float8_e4m3fn) for _ in "kv"]
    qkv = torch.stack([numbers.view(-1, 8)] * 3, dim=1)
    slots = torch.arange(len(qkv))
    q = ops.rotate_and_store(
        qkv.flatten(1), None, slots, *caches, num_q_heads=1, q_norm=None, k_norm=None, eps=0.0, norm_offset=0.0,
        has_gates=False, kv_scales=None,
    )  # fmt: skip
    expected = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(q.flatten(), numbers)
    assert all(torch.equal(cache.view(torch.uint8).flatten(), expected) for cache in caches)


def test_half_precision_numbers_are_read_and_written_as_pytorch_does_it():
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        one = ops.linear(numbers.view(-1, 1), torch.ones(1, 1, dtype=dtype)).flatten()
        is_number = ~numbers.isnan()
        assert torch.equal(one[is_number], numbers[is_number]) and one[~is_number].isnan().all()
        wide = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 6, 4096)
        x = wide.to(dtype)
        twice = ops.linear(x.view(-1, 1), torch.full((1, 1), 3.0, dtype=dtype)).flatten()
        assert torch.equal(twice, (x.float() * 3).to(dtype))


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_best_tokens(num_rows):
    logits = random(num_rows, 50003)
    for row, place in enumerate(range(0, 7000 * num_rows, 7000)):
        logits[row, [place, place + 1, 50002]] = 30.0  # the first of equal ones
    assert ops.best_tokens(logits, INVALID_TOKEN).tolist() == [7000 * row for row in range(num_rows)]
    logits[:, 9000:] = float("-inf")
    assert torch.equal(ops.best_tokens(logits, INVALID_TOKEN), logits.max(-1).indices)
    for value in (float("nan"), float("inf")):
        spoilt = logits.clone()
        spoilt[-1, 77] = value
        assert ops.best_tokens(spoilt, INVALID_TOKEN)[-1] == INVALID_TOKEN
    logits[:] = float("-inf")
    assert (ops.best_tokens(logits, INVALID_TOKEN) == INVALID_TOKEN).all()


def kept(probs, top_k, top_p, min_p):
    """float64 [vocab_size]: those that the rules keep, which are clear of their bounds."""
    falling, order = probs.double().sort(descending=True)
    before = falling.cumsum(0) - falling
    total = falling[:top_k].sum() if top_k else 1.0
    dropped = (before > top_p * total) | (falling < min_p * falling[0])
    if top_k:
        dropped[top_k:] = True
    dropped[0] = False
    return torch.zeros_like(falling).index_copy_(0, order, falling.masked_fill(dropped, 0.0))


@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("rules", [{}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_p": 0.0}])
def test_tokens_that_are_drawn(rules, spread):
    rules = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.7} | rules
    num = 5003
    logits = (random(1, num) * spread).expand(200, num)
    uniforms = torch.linspace(0, 1, 201)[:200]
    params = [SamplingParams(**rules)] * 200
    tokens = sample(logits, SamplingInfo.from_params(params, [0] * 200, num, logits.device), uniforms)
    probs = kept(torch.softmax(logits[0].double() / 0.7, 0), rules["top_k"], rules["top_p"], rules["min_p"])
    after = (probs / probs.sum()).cumsum(0)
    before = after - probs / probs.sum()
    assert (probs[tokens] > 0).all()
    assert ((before[tokens] < uniforms + 1e-5) & (uniforms < after[tokens] + 1e-5)).all()


def test_rows_are_drawn_as_they_are_alone():
    logits = random(6, 1000) * 3
    logits[4, 7], logits[5, 8] = float("nan"), float("inf")
    params = [
        SamplingParams(temperature=t, top_k=k) for t, k in ((0.0, -1), (1.0, -1), (1.5, 5), (0.3, -1), (1, -1), (1, 3))
    ]
    uniforms = torch.tensor([0.5, 0.1, 0.9, 0.999999, 0.3, 0.3])
    info = [
        SamplingInfo.from_params(some, [0] * len(some), 1000, logits.device)
        for some in (params, *([one] for one in params))
    ]
    tokens = sample(logits, info[0], uniforms)
    assert tokens.tolist() == [sample(logits[i : i + 1], info[i + 1], uniforms[i : i + 1]).item() for i in range(6)]
    assert tokens[0] == logits[0].argmax() and tokens[4:].tolist() == [INVALID_TOKEN] * 2
    assert tokens[2] in logits[2].topk(5).indices


def test_equal_numbers_stay_together():
    """As PyTorch's way has it; and what is impossible is never drawn."""
    logits = torch.full((50, 300), float("-inf"))
    logits[:, 100:110] = 1.0
    uniforms = torch.linspace(0, 1 - 2**-24, 50)
    for rules in ({"top_k": 2}, {"top_p": 0.1}, {}):
        info = SamplingInfo.from_params([SamplingParams(temperature=1.0, **rules)] * 50, [0] * 50, 300, logits.device)
        assert set(sample(logits, info, uniforms).tolist()) == set(range(100, 110))


def test_without_the_library_pytorch_computes(monkeypatch):
    monkeypatch.setattr(library, "_library", None)
    assert not ops.use_cpu_kernels(torch.zeros(2, 2))
    assert act_and_mul(torch.ones(2, 4), get_activation("relu")).tolist() == [[1, 1], [1, 1]]


def same_products(num: int) -> bool:
    """Whether products come out the same, `num` times."""
    x, weight = random(3, 256), random(2000, 256, seed=1)
    expected = x @ weight.T
    return all(torch.allclose(ops.linear(x, weight), expected, atol=1e-3) for _ in range(num))


def test_several_threads_compute_at_once():
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same_products, [200] * 8))


def test_a_forked_child_computes():
    """It has none of the threads."""
    assert same_products(1)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(same_products, 1000)
        for _ in range(5):
            child = multiprocessing.get_context("fork").Process(target=check_products)
            child.start()
            child.join(60)
            code = child.exitcode
            child.kill()
            assert code == 0
        assert busy.result()


def check_products() -> None:
    torch.set_num_threads(1)
    x, weight = torch.ones(3, 256), torch.ones(2000, 256)
    assert torch.all(ops.linear(x, weight) == 256)


def test_a_tensor_without_memory_is_not_computed():
    with FakeTensorMode():
        x = torch.empty(2, 8)
        assert not ops.use_cpu_kernels(x)
        assert act_and_mul(x, get_activation("silu")).shape == (2, 4)


def test_weights_of_another_type_go_another_way():
    x = random(3, 64, dtype=torch.bfloat16)
    norm = RMSNorm(64, "norm", eps=1e-6, dtype=torch.float32)
    norm.weight = torch.nn.Parameter(random(64), requires_grad=False)
    exact = F.rms_norm(x.float(), (64,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x).float(), exact, rtol=2e-2, atol=2e-2)
    assert not takes_cpu_kernel(x, random(8, 64, dtype=torch.bfloat16), random(8))
    assert not takes_cpu_kernel(x, random(8, 64), None)
    assert takes_cpu_kernel(x, random(8, 64, dtype=torch.bfloat16), random(8, dtype=torch.bfloat16))
