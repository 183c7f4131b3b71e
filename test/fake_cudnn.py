"""Stands in for the part of nvidia-cudnn-frontend that the engine calls: attention from addresses, with plain torch.

Like the real thing it sees no shapes when it runs, but only where each tensor begins: where its elements are follows
from the dimensions, strides and ragged offsets with which the graph was made.
"""

from enum import Enum, auto
from typing import Any

import torch
from plain_attention import attend

WORKSPACE_NBYTES = 16
GRAPHS: list["pygraph"] = []


class data_type(Enum):  # noqa: N801  the library's name
    FLOAT = auto()
    HALF = torch.float16
    BFLOAT16 = torch.bfloat16
    INT32 = torch.int32
    INT64 = torch.int64


class diagonal_alignment(Enum):  # noqa: N801  the library's name
    TOP_LEFT = auto()
    BOTTOM_RIGHT = auto()


class heur_mode(Enum):  # noqa: N801  the library's name
    A = auto()


def create_handle() -> object:
    return object()


def set_stream(handle, stream):
    assert handle is not None


class Tensor:
    """Of a graph."""

    def __init__(self, dim=None, stride=None, data_type=None):
        self.dim, self.stride, self.data_type = dim, stride, data_type
        self.ragged_offset: Tensor | None = None
        self.is_output = False

    def set_output(self, is_output):
        self.is_output = is_output
        return self

    def set_dim(self, dim):
        self.dim = list(dim)
        return self

    def set_stride(self, stride):
        self.stride = list(stride)
        return self

    def set_ragged_offset(self, ragged_offset):
        self.ragged_offset = ragged_offset
        return self

    def view(self, memory, offset, shape):
        """Elements [rows, heads, dim] from one place of the memory on."""
        _, heads, rows, dim = self.stride
        return memory.as_strided(shape, (rows, heads, dim), memory.storage_offset() + offset)


class pygraph:  # noqa: N801  the library's name
    STEPS = ("sdpa", "validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")

    def __init__(self, *, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type is compute_data_type is data_type.FLOAT
        self.io_data_type, self.handle = io_data_type, handle
        self.tensors: list[Tensor] = []
        self.done: list[str] = []
        self.num_runs = 0
        GRAPHS.append(self)

    def _next(self, step):
        assert self.STEPS[len(self.done)] == step
        self.done.append(step)

    def tensor(self, *, dim, stride, data_type):
        assert len(dim) == len(stride) == 4
        self.tensors.append(Tensor(dim, stride, data_type))
        return self.tensors[-1]

    def sdpa(
        self, *, q, k, v, generate_stats, attn_scale, use_padding_mask, seq_len_q, seq_len_kv, diagonal_alignment,
        diagonal_band_right_bound, diagonal_band_left_bound=None, paged_attention_k_table=None,
        paged_attention_v_table=None, paged_attention_max_seq_len_kv=None,
    ):  # fmt: skip
        assert use_padding_mask and not generate_stats and diagonal_band_right_bound == 0
        assert diagonal_alignment.name == "BOTTOM_RIGHT"
        self._next("sdpa")
        self.q, self.k, self.v, self.out = q, k, v, Tensor(data_type=self.io_data_type)
        self.scale, self.left_bound = attn_scale, diagonal_band_left_bound
        self.lens, self.ends = seq_len_q, seq_len_kv
        self.tables = paged_attention_k_table, paged_attention_v_table
        self.max_keys = paged_attention_max_seq_len_kv
        return self.out, None

    def validate(self):
        self._next("validate")
        assert self.out.is_output and self.out.dim == self.q.dim and self.out.stride is not None
        for ragged in (self.q.ragged_offset, self.out.ragged_offset):
            assert ragged.dim == [self.q.dim[0] + 1, 1, 1, 1]
        if self.max_keys is None:
            assert self.k.dim[0] == self.q.dim[0]
        else:
            assert self.tables[0] is not self.tables[1]
            assert all(table.dim[2] * self.k.dim[2] >= self.max_keys for table in self.tables)

    def build_operation_graph(self):
        self._next("build_operation_graph")

    def create_execution_plans(self, modes):
        assert modes == [heur_mode.A]
        self._next("create_execution_plans")

    def check_support(self):
        self._next("check_support")

    def build_plans(self):
        self._next("build_plans")

    def get_workspace_size(self):
        assert len(self.done) == len(self.STEPS)
        return WORKSPACE_NBYTES

    def execute(self, values: dict[Tensor, Any], workspace, *, handle):
        assert handle is self.handle and len(self.done) == len(self.STEPS)
        assert workspace.dtype == torch.uint8 and workspace.numel() >= WORKSPACE_NBYTES
        assert set(values) == {*self.tensors, self.out}
        assert all(memory.dtype == tensor.data_type.value for tensor, memory in values.items())
        self.num_runs += 1
        _, heads, max_tokens, dim = self.q.dim
        ends = _numbers(values, self.ends)
        q_first, out_first = (_numbers(values, tensor.ragged_offset) for tensor in (self.q, self.out))
        for index, length in enumerate(_numbers(values, self.lens)):
            if length == 0:
                continue
            assert length <= max_tokens and length <= ends[index]
            q = self.q.view(values[self.q], q_first[index], (length, heads, dim))
            k, v = (self._keys(values, place, index, ends[index]) for place in (0, 1))
            out = self.out.view(values[self.out], out_first[index], (length, heads, dim))
            out.copy_(attend(q, k, v, self.scale, self.left_bound))

    def _keys(self, values, place, index, length):
        tensor, table = (self.k, self.v)[place], self.tables[place]
        blocks, heads, rows, dim = tensor.dim
        memory = values[tensor]
        if table is None:
            assert length <= rows
            return tensor.view(memory, index * tensor.stride[0], (length, heads, dim))
        assert length <= self.max_keys
        width, pages = table.dim[2], _numbers(values, table)
        assert table.stride == [width, width, 1, 1]
        pages = pages[index * width : index * width + -(-length // rows)]
        assert max(pages) < blocks
        parts = [tensor.view(memory, page * tensor.stride[0], (rows, heads, dim)) for page in pages]
        return torch.cat(parts)[:length]


def _numbers(values, tensor):
    """What a tensor holds that has no gaps."""
    memory, length = values[tensor], tensor.dim[0] * tensor.dim[2]
    return memory.as_strided((length,), (1,), memory.storage_offset()).tolist()
