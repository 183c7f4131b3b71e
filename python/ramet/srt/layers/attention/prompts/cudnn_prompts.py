"""Owns prompt chunks through cuDNN's attention over paged caches, by the package nvidia-cudnn-frontend."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.layers.kernels.runtime import next_power_of_2
from ramet.srt.utils.device import to_device

BATCH_SIZES = (4, 64)  # sequences of a graph; those that a pass lacks have no tokens
MAX_HEAD_DIM = 256


class CudnnPrompts(PromptAttention):
    """One graph for each batch size and window; the lengths are on the device, so that it serves every pass.

    Operation: scaled dot product attention, forward, with a padding mask, ragged queries, page tables and a causal
    mask that is aligned to the last key (cuDNN Frontend, "Attention").
    """

    name = "cudnn"

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device) < (9, 0):
            return "a GPU of compute capability 9.0 or more"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return "bfloat16 or float16"
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
            return f"heads of a multiple of 8 and at most {MAX_HEAD_DIM}"
        if importlib.util.find_spec("cudnn") is None:
            return "the package nvidia-cudnn-frontend, which is not installed"
        return None

    def __init__(self, spec: AttentionSpec, limits: PassLimits):
        cudnn: Any = importlib.import_module("cudnn")
        self._cudnn = cudnn
        self._spec = spec
        self._handle = cudnn.create_handle()
        self._width = limits.max_keys // spec.page_size
        sizes = [(size, window) for size in BATCH_SIZES for window in spec.windows]
        self._graphs = {key: _Graph(cudnn, self._handle, spec, limits, *key) for key in sizes}
        nbytes = max(graph.workspace_nbytes for graph in self._graphs.values())
        self._workspace = torch.empty(max(1, nbytes), dtype=torch.uint8, device=spec.device)
        self._planned: list[_Planned] = []

    def plan(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> None:
        self._planned = [self._plan_part(part, req_to_page) for part in chunks.parts(BATCH_SIZES[-1])]

    def _plan_part(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> "_Planned":
        number = len(chunks.rows)
        size = next(size for size in BATCH_SIZES if size >= number)
        device = req_to_page.device
        values = np.zeros((4, size + 1), dtype=np.int64)
        for place, field in enumerate((chunks.first, chunks.lens, chunks.ends, chunks.rows)):
            values[place, :number] = field
        values[0, number:] = chunks.first[-1] + chunks.lens[-1]
        first, lens, ends, rows = to_device(values, torch.int64, device)
        width = min(self._width, req_to_page.shape[1])
        table = torch.zeros((size, self._width), dtype=torch.int32, device=device)
        table[:, :width] = req_to_page[:, :width].index_select(0, rows[:size])
        return _Planned(size, first, lens[:size].to(torch.int32), ends[:size].to(torch.int32), table)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, out: torch.Tensor
    ) -> None:
        if q.is_cuda:
            stream = torch.cuda.current_stream(q.device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
        for planned in self._planned:
            graph = self._graphs[planned.batch_size, window]
            graph.execute(q, k_cache, v_cache, out, planned, self._workspace)


@dataclass(frozen=True)
class _Planned:
    """What a graph reads of a pass, on the device."""

    batch_size: int
    first: torch.Tensor  # int64 [batch_size + 1]: where the tokens of each sequence start
    lens: torch.Tensor  # int32 [batch_size]
    ends: torch.Tensor  # int32 [batch_size]
    table: torch.Tensor  # int32 [batch_size, pages of the longest sequence]


class _Graph:
    """The compiled operation for a number of sequences."""

    def __init__(
        self, cudnn: Any, handle: Any, spec: AttentionSpec, limits: PassLimits, batch_size: int, window: int | None
    ):
        self._handle = handle
        number = cudnn.data_type.BFLOAT16 if spec.dtype is torch.bfloat16 else cudnn.data_type.HALF
        graph = cudnn.pygraph(
            io_data_type=number,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        tokens = next_power_of_2(limits.max_tokens)
        width = limits.max_keys // spec.page_size
        # Queries are rows of the qkv projection's output; where each sequence starts is said in elements.
        self._q_stride, self._out_stride = (heads + 2 * kv_heads) * dim, heads * dim
        self._q = _tensor(graph, number, (batch_size, heads, tokens, dim), _rows_first(tokens, self._q_stride, dim))
        self._q_first = _column(graph, cudnn.data_type.INT64, batch_size + 1)
        self._out_first = _column(graph, cudnn.data_type.INT64, batch_size + 1)
        self._q.set_ragged_offset(self._q_first)
        self._lens = _column(graph, cudnn.data_type.INT32, batch_size)
        self._ends = _column(graph, cudnn.data_type.INT32, batch_size)
        pages = (limits.num_pages, kv_heads, spec.page_size, dim)
        page_strides = _rows_first(spec.page_size, kv_heads * dim, dim)
        self._k, self._v = (_tensor(graph, number, pages, page_strides) for _ in range(2))
        shape, strides = (batch_size, 1, width, 1), (width, width, 1, 1)
        self._tables = [_tensor(graph, cudnn.data_type.INT32, shape, strides) for _ in range(2)]
        options: dict[str, Any] = {} if window is None else {"diagonal_band_left_bound": window}
        self._out, _ = graph.sdpa(
            q=self._q,
            k=self._k,
            v=self._v,
            generate_stats=False,
            attn_scale=spec.scale,
            use_padding_mask=True,
            seq_len_q=self._lens,
            seq_len_kv=self._ends,
            diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
            diagonal_band_right_bound=0,
            paged_attention_k_table=self._tables[0],
            paged_attention_v_table=self._tables[1],
            paged_attention_max_seq_len_kv=limits.max_keys,
            **options,
        )
        self._out.set_output(True).set_dim((batch_size, heads, tokens, dim))
        self._out.set_stride(_rows_first(tokens, self._out_stride, dim)).set_ragged_offset(self._out_first)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self._graph = graph
        self.workspace_nbytes: int = graph.get_workspace_size()

    def execute(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        planned: _Planned,
        workspace: torch.Tensor,
    ) -> None:
        assert q.stride(0) == self._q_stride and out.stride(0) == self._out_stride
        values = {
            self._q: q,
            self._k: k_cache,
            self._v: v_cache,
            self._out: out,
            self._q_first: planned.first * self._q_stride,
            self._out_first: planned.first * self._out_stride,
            self._lens: planned.lens,
            self._ends: planned.ends,
            self._tables[0]: planned.table,
            self._tables[1]: planned.table,
        }
        self._graph.execute(values, workspace, handle=self._handle)


def _rows_first(rows: int, row_stride: int, dim: int) -> tuple[int, int, int, int]:
    """Strides of [batch, heads, rows, dim] in memory of [batch, rows, heads, dim]."""
    return rows * row_stride, dim, row_stride, 1


def _tensor(graph: Any, data_type: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return graph.tensor(dim=list(shape), stride=list(strides), data_type=data_type)


def _column(graph: Any, data_type: Any, length: int) -> Any:
    return _tensor(graph, data_type, (length, 1, 1, 1), (1, 1, 1, 1))
