"""Owns matrix products with half-precision weights on CPUs that have no instructions for them.

There the library's own product widens every weight for every row of the input. Widening a block of weights once, into
a buffer that stays in the processor's cache, and multiplying that in float32 is faster from a dozen rows on: 1.6 times
at 16 rows and 2.7 times at 64 on one core of a Cascade Lake Xeon (benchmark/bench_cpu_matmul.py). It is also the more
exact result: rounded once, at the end. A single row goes to torch's product with a vector, a kernel of its own.
"""

import functools
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ramet.srt.layers.kernels.choices import CPU_LINEAR, OTHER, OURS, row_class

MIN_VECTOR_ELEMENTS = 1 << 21  # of weights: below, a vector is no faster than a matrix of one row
MOST_CPU_ROWS = 8  # that Ramet's kernel multiplies on a CPU which has instructions for them
MIN_ROWS = 12  # of the input, where nothing was measured; below, reading weights costs more than widening in registers
BLOCK_ELEMENTS = 1 << 20  # of widened weights: 4 MB, few enough for a processor's shared cache
MANY_ROWS = 256  # from here on it pays to round block by block rather than to transpose at the end
MANY_ROWS_BLOCK_ELEMENTS = 1 << 21
NATIVE_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}

_buffers = threading.local()


@functools.cache
def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether this machine's processor multiplies `dtype` by widening it; False where its features can't be read."""
    if dtype not in NATIVE_FLAGS:
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            lines = [line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return False
    return bool(lines) and not NATIVE_FLAGS[dtype].intersection(lines[0])


def describe_products(dtype: torch.dtype) -> str:
    """How a CPU's kernels and PyTorch's library share products with plain weights; see matmul.takes_cpu_kernel."""
    if dtype != torch.float32 and lacks_instructions(dtype):
        return "this processor has no instructions for it: the kernels multiply all rows"
    has = "" if dtype == torch.float32 else ", which uses this processor's instructions for it"
    return f"the kernels multiply {MOST_CPU_ROWS} rows at most, more go to PyTorch's library{has}"


def widens_weights(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of the two is for this module."""
    return x.device.type == "cpu" and lacks_instructions(weight.dtype)


def widening_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for half-precision x [num_rows, input_size] and W [output_size, input_size], the fastest way."""
    num_rows = x.shape[0]
    default = OURS if num_rows >= MIN_ROWS else OTHER
    if num_rows > 1 and CPU_LINEAR.pick(default, row_class(num_rows), *weight.shape) == OURS:
        return blocked_linear(x, weight, bias)
    is_large_vector_product = x.shape[0] == 1 and weight.numel() >= MIN_VECTOR_ELEMENTS
    if is_large_vector_product and weight.dtype == torch.bfloat16 and bias is None:
        return torch.mv(weight, x[0]).unsqueeze(0)  # reads weights at 15 to 18 GB/s where linear reads at 10 to 12
    return F.linear(x, weight, bias)


def blocked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for half-precision x [num_rows, input_size] and W [output_size, input_size], summed in float32."""
    if x.shape[0] >= MANY_ROWS:
        return _linear_of_many_rows(x, weight, bias)
    output_size, input_size = weight.shape
    columns = x.t().float()  # [input_size, num_rows]
    result = torch.empty((output_size, x.shape[0]))
    for start, widened in _widened_blocks(weight, BLOCK_ELEMENTS):
        torch.mm(widened, columns, out=result[start : start + len(widened)])
    if bias is not None:
        result += bias.float().unsqueeze(1)
    return result.t().to(x.dtype, memory_format=torch.contiguous_format)


def _linear_of_many_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same with each block's products rounded while they are in the cache, and no transposition at the end."""
    rows = x.float()
    result = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    products = _buffer("products", x.shape[0] * _block_rows(weight, MANY_ROWS_BLOCK_ELEMENTS))
    for start, widened in _widened_blocks(weight, MANY_ROWS_BLOCK_ELEMENTS):
        product = products[: x.shape[0] * len(widened)].view(x.shape[0], len(widened))
        torch.mm(rows, widened.t(), out=product)
        if bias is not None:
            product += bias[start : start + len(widened)].float()
        result[:, start : start + len(widened)] = product
    return result


def _widened_blocks(weight: torch.Tensor, block_elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 rows) of the weight, block after block; a block is valid until the next one is asked for."""
    block_rows = _block_rows(weight, block_elements)
    buffer = _buffer("widened", block_rows * weight.shape[1])
    for start in range(0, weight.shape[0], block_rows):
        block = weight[start : start + block_rows]
        widened = buffer[: block.numel()].view(block.shape)
        widened.copy_(block)
        yield start, widened


def _block_rows(weight: torch.Tensor, block_elements: int) -> int:
    return min(weight.shape[0], max(1, block_elements // weight.shape[1]))


def _buffer(name: str, num_elements: int) -> torch.Tensor:
    """A float32 buffer of this thread, kept from call to call."""
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(False):  # it is written in and out of inference mode
            buffer = torch.empty(num_elements)
        setattr(_buffers, name, buffer)
    return buffer
