"""Owns attention with FlashInfer: its wrappers for each kind of pass, and planning them on the host ahead of a pass."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer, AttentionSpec, CapturedShape
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.device import to_device

WORKSPACE_NBYTES = 512 << 20  # for the partial results of split sequences; all wrappers share it
HEAD_DIMS = (64, 128, 256)
MIN_TENSOR_CORE_GROUP = 3  # query heads of a KV head; with fewer, decoding is bound by memory without tensor cores too


class FlashInferAttnBackend(AttentionBackend):
    """Reads keys and values where they lie. A decode pass can be captured: it reads the plan at fixed addresses."""

    can_be_captured = True

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        import flashinfer

        self._decode_wrapper: Callable[..., Any] = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self._workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=spec.device)
        self._prefill = self._for_windows(
            lambda: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, kv_layout="NHD")
        )
        self._decode = self._for_windows(self._make_decode)
        self._captured: dict[int, dict[int | None, Planned]] = {}  # by batch size
        self._req_to_page: torch.Tensor  # of captured passes
        self._current: dict[int | None, Planned] = {}  # by window: what the layers of this pass run

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda":
            return "a GPU"
        if spec.has_sinks:
            return "a model without attention sinks"
        if spec.kv.is_latent:
            return "a model without latent attention"
        if spec.soft_cap is not None:
            return "a model without a soft cap on attention"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"bfloat16 or float16; the model has {str(spec.dtype).removeprefix('torch.')}"
        if spec.head_dim not in HEAD_DIMS:
            return f"heads of {', '.join(map(str, HEAD_DIMS))}; the model's have {spec.head_dim}"
        try:
            importlib.import_module("flashinfer")
        except ImportError as error:
            return f"the package flashinfer, which can't be imported ({error})"
        return None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.is_captured:
            return  # planned already: that can't be captured
        pages = list_pages(self.spec, forward_batch.req_to_page, forward_batch.rows, forward_batch.seq_lens_cpu)
        if forward_batch.forward_mode is ForwardMode.DECODE:
            self._current = self._decode
            plan_wrappers(self.spec, self._current, pages)
        else:
            self._current = self._prefill
            query_starts = list(accumulate(forward_batch.extend_lens_cpu, initial=0))
            plan_wrappers(self.spec, self._current, pages, on_host(self.spec, query_starts), causal=True)

    def init_cuda_graph_state(self, shapes: Sequence[CapturedShape], req_to_page: torch.Tensor) -> None:
        largest, device = max(shape.num_tokens for shape in shapes), self.spec.device
        self._req_to_page = req_to_page
        # The graphs run one at a time, so they share the places that a plan is copied to.
        starts = torch.zeros(largest + 1, dtype=torch.int32, device=device)
        indices = torch.zeros(largest * req_to_page.shape[1], dtype=torch.int32, device=device)
        last_page_lens = torch.zeros(largest, dtype=torch.int32, device=device)
        for size, _ in shapes:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": starts[: size + 1],
                "paged_kv_indices_buffer": indices,
                "paged_kv_last_page_len_buffer": last_page_lens[:size],
            }
            self._captured[size] = self._for_windows(functools.partial(self._make_decode, **buffers))

    def init_forward_metadata_replay_cuda_graph(
        self, shape: CapturedShape, tokens: PassTokens, rows: torch.Tensor
    ) -> None:
        self._current = self._captured[shape.num_tokens]
        plan_wrappers(self.spec, self._current, list_pages(self.spec, self._req_to_page, rows, tokens.ends.tolist()))

    def forward(self, q: torch.Tensor, layer: AttentionLayer, _forward_batch: ForwardBatch) -> torch.Tensor:
        k_cache, v_cache = (
            cache.unflatten(0, (-1, self.spec.page_size)) for cache in self.kv_pool.get_kv_buffer(layer.layer_id)
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._current[layer.sliding_window].wrapper.run(q, (k_cache, v_cache), out=out)
        return out

    def _make_decode(self, **buffers: Any) -> Any:
        group = self.spec.num_heads // self.spec.num_kv_heads
        return self._decode_wrapper(
            self._workspace, kv_layout="NHD", use_tensor_cores=group >= MIN_TENSOR_CORE_GROUP, **buffers
        )

    def _for_windows(self, make_wrapper: Callable[[], Any]) -> "dict[int | None, Planned]":
        return {window: Planned(make_wrapper(), self.spec.device) for window in self.spec.windows}


@dataclass
class Pages:
    """The KV pages of a batch, one sequence's behind the other's."""

    starts: torch.Tensor  # int32 [batch_size + 1] on the host: where each sequence's pages start
    indices: torch.Tensor  # int32 [num_pages] on the device
    last_page_lens: torch.Tensor  # int32 [batch_size] on the host: tokens in each sequence's last page


class Planned:
    """A wrapper and when it may be planned again: a plan goes to the GPU from one pinned buffer that it owns."""

    def __init__(self, wrapper: Any, device: torch.device):
        self.wrapper = wrapper
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # returns at once before the first plan; later, the copy is a whole pass old
        self.wrapper.plan(*args, **kwargs)
        if self._copied is not None:
            self._copied.record()


def plan_wrappers(
    spec: AttentionSpec, wrappers: dict[int | None, Planned], pages: Pages, *query_starts: torch.Tensor, **options: Any
) -> None:
    """Plan the wrapper of each window for a pass."""
    for window, planned in wrappers.items():
        planned.plan(
            *query_starts,
            pages.starts,
            pages.indices,
            pages.last_page_lens,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.page_size,
            window_left=-1 if window is None else window - 1,
            q_data_type=spec.dtype,
            kv_data_type=spec.kv_dtype,
            sm_scale=spec.scale,
            **options,
        )


def list_pages(spec: AttentionSpec, table: torch.Tensor, rows: torch.Tensor, lengths: Sequence[int]) -> Pages:
    """The pages of sequences of `lengths` > 0 tokens, in `rows` of `table` [num_rows, max_pages]."""
    page_size = spec.page_size
    counts = [(length - 1) // page_size + 1 for length in lengths]
    starts = list(accumulate(counts, initial=0))
    # The lengths are known on the host, the pages only on the device: nothing waits for them.
    on_device = to_device([counts, starts[:-1]], torch.int64, table.device)
    places = (rows * table.shape[1] - on_device[1]).repeat_interleave(on_device[0], output_size=starts[-1])
    places += torch.arange(starts[-1], device=table.device)
    return Pages(
        on_host(spec, starts),
        table.view(-1).index_select(0, places).to(torch.int32),
        on_host(spec, [(length - 1) % page_size + 1 for length in lengths]),
    )


def on_host(spec: AttentionSpec, values: Sequence[int]) -> torch.Tensor:
    """int32 on the host, where planning reads it and from where the GPU takes it by itself."""
    tensor = torch.tensor(values, dtype=torch.int32)
    return tensor.pin_memory() if spec.device.type == "cuda" else tensor
