"""Owns matrix products with half-precision weights on CPUs that have no instructions for them.

There the library's own product widens every weight for every row of the input. Widening a block of weights once, into
a buffer that stays in the processor's cache, and multiplying that in float32 is faster from a dozen rows on: 1.6 times
at 16 rows and 2.7 times at 64 on one core of a Cascade Lake Xeon (benchmark/bench_cpu_matmul.py). It is also the more
exact result: rounded once, at the end.
"""

import functools
import threading

import torch

MIN_ROWS = 12  # of the input; below, reading the weights once costs more than widening them in registers
BLOCK_ELEMENTS = 1 << 20  # of widened weights: 4 MB, few enough for a processor's shared cache
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


def is_faster_blocked(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `blocked_linear` is the faster way to multiply the two."""
    return x.device.type == "cpu" and x.shape[0] >= MIN_ROWS and lacks_instructions(weight.dtype)


def blocked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for half-precision x [num_rows, input_size] and W [output_size, input_size], summed in float32."""
    output_size, input_size = weight.shape
    columns = x.t().float()  # [input_size, num_rows]
    result = torch.empty((output_size, x.shape[0]))
    block_rows = max(1, BLOCK_ELEMENTS // input_size)
    buffer = _buffer(block_rows * input_size)
    for start in range(0, output_size, block_rows):
        block = weight[start : start + block_rows]
        widened = buffer[: block.numel()].view(block.shape)
        widened.copy_(block)
        torch.mm(widened, columns, out=result[start : start + block_rows])
    if bias is not None:
        result += bias.float().unsqueeze(1)
    return result.t().to(x.dtype, memory_format=torch.contiguous_format)


def _buffer(num_elements: int) -> torch.Tensor:
    """A float32 buffer of this thread, kept from call to call."""
    buffer = getattr(_buffers, "tensor", None)
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(False):  # it is written in and out of inference mode
            buffer = _buffers.tensor = torch.empty(num_elements)
    return buffer
