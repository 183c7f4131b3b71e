"""Owns prompt chunks through cuDNN's attention over paged caches, by the package nvidia-cudnn-frontend."""

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ramet.srt.configs.device_config import free_memory_nbytes
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.layers.kernels.runtime import next_power_of_2
from ramet.srt.utils.device import to_device

logger = logging.getLogger(__name__)

BATCH_SIZES = (4, 64)  # sequences of a graph; those that a pass lacks have no tokens
MAX_HEAD_DIM = 256
ALONE = 1
MIN_ALONE_TOKENS = 1024  # new ones of a sequence whose keys are copied: reading them in order saves more than it costs
MAX_ALONE_KEYS = 65536
COPY_SHARE = 8  # of the memory that is free, at most one part in so many is for copies
KEY_TILE = 256  # keys that the operation may read at a time, some of them behind a sequence's end


class CudnnPrompts(PromptAttention):
    """The lengths are on the device, so that one graph serves every pass of its batch size and window.

    The keys of a sequence with many new tokens are copied to one place first, for each layer: cuDNN reads them faster
    there than in their pages, by a sixth on an H200. The others go together and stay in their pages.

    What lies behind the end of a sequence is multiplied, too, if by zero in the end: what is not finite there would
    show. So what can be read there are the sequence's own last keys and values, or zeros.

    Operation: scaled dot product attention, forward, with ragged queries, a padding mask, a causal mask that is aligned
    to the last key, and page tables where there are pages (cuDNN Frontend, "Attention").
    """

    name = "cudnn"

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device) < (9, 0):
            return "a GPU of compute capability 9.0 or more"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return "bfloat16 or float16"
        if spec.has_sinks:
            return "a model without attention sinks"
        if spec.has_fp8_cache:
            return "a KV cache in the model's type"
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
        # Queries are rows of the qkv projection's output.
        self._q_width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self._out_width = spec.num_heads * spec.head_dim
        self._max_alone = self._most_copied(limits)
        sizes = (ALONE, *BATCH_SIZES) if self._max_alone else BATCH_SIZES
        keys = [(size, window) for size in sizes for window in spec.windows]
        self._graphs = {key: self._build(limits, *key) for key in keys}
        nbytes = max(graph.workspace_nbytes for graph in self._graphs.values())
        self._workspace = torch.empty(max(1, nbytes), dtype=torch.uint8, device=spec.device)
        copy_shape = (2, self._max_alone + KEY_TILE, spec.num_kv_heads, spec.head_dim)
        self._copies = torch.zeros(copy_shape, dtype=spec.dtype, device=spec.device)  # keys and values of one sequence
        self._planned: list[_Planned] = []

    def _most_copied(self, limits: PassLimits) -> int:
        """The longest sequence whose keys may be copied, in tokens: 0 where memory is too short for any."""
        spec, wanted = self._spec, min(limits.max_keys, MAX_ALONE_KEYS)
        free_bytes = free_memory_nbytes(spec.device)
        fitting = free_bytes // COPY_SHARE // (2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize)
        if fitting >= wanted:
            return wanted
        most = fitting if fitting >= MIN_ALONE_TOKENS else 0
        logger.info("cudnn: keys of up to %d tokens are copied, with %.2f GB of memory free", most, free_bytes / 1e9)
        return most

    def _build(self, limits: PassLimits, batch_size: int, window: int | None) -> "_Graph":
        keys = _Pages(limits.num_pages, limits.max_keys) if batch_size != ALONE else self._max_alone
        return _Graph(self._cudnn, self._handle, self._spec, limits.max_tokens, keys, batch_size, window)

    def plan(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> None:
        is_alone = (chunks.lens >= MIN_ALONE_TOKENS) & (chunks.ends <= self._max_alone)
        self._planned = [self._plan_alone(part, req_to_page) for part in chunks.select(is_alone).parts(1)]
        others = chunks.select(~is_alone).parts(BATCH_SIZES[-1])
        self._planned += [self._plan_together(part, req_to_page) for part in others]

    def _plan_alone(self, chunk: PromptChunks, req_to_page: torch.Tensor) -> "_Planned":
        page_size, end = self._spec.page_size, int(chunk.ends[0])
        pages = req_to_page[int(chunk.rows[0]), : -(-end // page_size)]
        slots = (pages[:, None] * page_size + torch.arange(page_size, device=pages.device)).flatten()[:end]
        slots = torch.cat([slots, slots[-1:].expand(-end % KEY_TILE)])
        first, lens, ends, _ = self._lengths(chunk, ALONE, pages.device)
        return _Planned(ALONE, first * self._q_width, first * self._out_width, lens, ends, slots, None)

    def _plan_together(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> "_Planned":
        size = next(size for size in BATCH_SIZES if size >= len(chunks.rows))
        first, lens, ends, rows = self._lengths(chunks, size, req_to_page.device)
        page_size, device = self._spec.page_size, req_to_page.device
        last = (ends - 1).clamp_min(0)[:, None] // page_size
        columns = torch.arange(self._width, device=device).minimum(last)
        table = req_to_page[rows[:, None], columns]
        behind = ends[:, None] + torch.arange(page_size - 1, device=device)
        in_page = (behind // page_size == last) & (ends > 0)[:, None]  # the others are slot 0, which is nobody's
        slots = table.gather(1, last.to(torch.int64)) * page_size + behind % page_size
        rest = torch.where(in_page, slots, 0).flatten() if page_size > 1 else None
        places = table.to(torch.int32)
        return _Planned(size, first * self._q_width, first * self._out_width, lens, ends, places, rest)

    @staticmethod
    def _lengths(
        chunks: PromptChunks, size: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """First tokens [size + 1], new tokens, ends and rows [size], with sequences of no tokens behind the chunks."""
        number = len(chunks.rows)
        values = np.zeros((4, size + 1), dtype=np.int64)
        for place, field in enumerate((chunks.first, chunks.lens, chunks.ends, chunks.rows)):
            values[place, :number] = field
        values[0, number:] = chunks.first[-1] + chunks.lens[-1]
        first, lens, ends, rows = to_device(values, torch.int64, device)
        return first, lens[:size].to(torch.int32), ends[:size].to(torch.int32), rows[:size]

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, out: torch.Tensor
    ) -> None:
        if q.is_cuda:
            stream = torch.cuda.current_stream(q.device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
        for planned in self._planned:
            keys, values = k_cache, v_cache
            if planned.batch_size == ALONE:
                keys, values = self._copies
                for cache, copy in ((k_cache, keys), (v_cache, values)):
                    torch.index_select(cache, 0, planned.places, out=copy[: len(planned.places)])
            elif planned.rest is not None:
                for cache in (k_cache, v_cache):
                    cache.index_fill_(0, planned.rest, 0.0)
            graph = self._graphs[planned.batch_size, window]
            graph.execute(q, keys, values, out, planned, self._workspace)


@dataclass(frozen=True)
class _Planned:
    """What a graph reads of a pass, on the device."""

    batch_size: int
    q_first: torch.Tensor  # int64 [batch_size + 1]: where the queries of each sequence start, in elements
    out_first: torch.Tensor  # the same for its results
    lens: torch.Tensor  # int32 [batch_size]
    ends: torch.Tensor  # int32 [batch_size]
    places: torch.Tensor  # of the keys: int64 slots of a sequence alone, int32 pages [batch_size, max_pages] of others
    rest: torch.Tensor | None  # of others, int64: the slots of their last pages that hold nothing yet


@dataclass(frozen=True)
class _Pages:
    """Where the keys lie that are in pages."""

    num_pages: int
    max_keys: int  # of a sequence


class _Graph:
    """The compiled operation for a number of sequences.

    Args:
        max_tokens: new ones of a sequence.
        keys: their pages; or the most of one sequence, whose keys lie one behind the other.
    """

    def __init__(
        self,
        cudnn: Any,
        handle: Any,
        spec: AttentionSpec,
        max_tokens: int,
        keys: _Pages | int,
        batch_size: int,
        window: int | None,
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
        tokens = next_power_of_2(max_tokens)
        self._q_stride, self._out_stride = (heads + 2 * kv_heads) * dim, heads * dim
        self._q = _tensor(graph, number, (batch_size, heads, tokens, dim), _rows_first(tokens, self._q_stride, dim))
        self._q_first = _column(graph, cudnn.data_type.INT64, batch_size + 1)
        self._out_first = _column(graph, cudnn.data_type.INT64, batch_size + 1)
        self._q.set_ragged_offset(self._q_first)
        self._lens = _column(graph, cudnn.data_type.INT32, batch_size)
        self._ends = _column(graph, cudnn.data_type.INT32, batch_size)
        rows, length = (keys, 1) if isinstance(keys, int) else (spec.page_size, keys.num_pages)
        cache = (length, kv_heads, rows, dim)
        self._k, self._v = (_tensor(graph, number, cache, _rows_first(rows, kv_heads * dim, dim)) for _ in range(2))
        # Keys at more than the query's position - window are seen (attn_score_modifiers.h, sliding_window_mask).
        options: dict[str, Any] = {} if window is None else {"diagonal_band_left_bound": window}
        self._tables: list[Any] = []
        if isinstance(keys, _Pages):
            width = keys.max_keys // spec.page_size
            shape, strides = (batch_size, 1, width, 1), (width, width, 1, 1)
            self._tables = [_tensor(graph, cudnn.data_type.INT32, shape, strides) for _ in range(2)]
            names = ("paged_attention_k_table", "paged_attention_v_table")
            options |= dict(zip(names, self._tables, strict=True), paged_attention_max_seq_len_kv=keys.max_keys)
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
            self._q_first: planned.q_first,
            self._out_first: planned.out_first,
            self._lens: planned.lens,
            self._ends: planned.ends,
        }
        values |= dict.fromkeys(self._tables, planned.places)
        self._graph.execute(values, workspace, handle=self._handle)


def _rows_first(rows: int, row_stride: int, dim: int) -> tuple[int, int, int, int]:
    """Strides of [batch, heads, rows, dim] in memory of [batch, rows, heads, dim]."""
    return rows * row_stride, dim, row_stride, 1


def _tensor(graph: Any, data_type: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return graph.tensor(dim=list(shape), stride=list(strides), data_type=data_type)


def _column(graph: Any, data_type: Any, length: int) -> Any:
    return _tensor(graph, data_type, (length, 1, 1, 1), (1, 1, 1, 1))
