"""Owns the CUDA graphs of decode passes: one for each of some batch sizes, captured once, replayed for every pass."""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.decode_batch import make_decode_batch

logger = logging.getLogger(__name__)

MAX_BATCH_SIZE = 512


def graph_batch_sizes(max_running_requests: int) -> list[int]:
    """Batch sizes to capture: close together where padding costs most, up to the largest batch or MAX_BATCH_SIZE."""
    largest = min(max_running_requests, MAX_BATCH_SIZE)
    sizes = [1, 2, 4, 8, 16, 24, *range(32, 128, 16), *range(128, MAX_BATCH_SIZE + 1, 32)]
    return [size for size in sizes if size < largest] + [largest]


class CudaGraphRunner:
    """Replays the model's kernels for a decode pass with one launch.

    The graphs read the weights, the KV cache and the page table at their fixed addresses, so that they can be
    captured before the weights have arrived. A batch is padded to the next captured size with the table's padding
    row, whose reads and writes go to page 0.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        req_pool: ReqToPagePool,
        backend: AttentionBackend,
        max_batch_size: int,
        hidden_size: int,
    ):
        """
        Args:
            forward: runs the whole model: the hidden states [num_tokens, hidden_size] of a pass.
            backend: of the model's attention layers; can be captured.
        """
        self._forward = forward
        self._req_pool = req_pool
        self._backend = backend
        self._sizes = graph_batch_sizes(max_batch_size)
        self.max_batch_size = self._sizes[-1]
        self._device, dtype = backend.spec.device, backend.spec.dtype
        self._inputs = torch.zeros(2 * self.max_batch_size, dtype=torch.int64, device=self._device)  # rows, then starts
        self._hidden_states = torch.empty((self.max_batch_size, hidden_size), dtype=dtype, device=self._device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a graph for every size, the largest first, so that the others fit into its memory."""
        start = time.perf_counter()
        device = self._device
        stream = torch.cuda.Stream(device)
        pool = torch.cuda.graph_pool_handle()
        self._backend.init_cuda_graph_state(self._sizes, self._req_pool.req_to_page)
        stream.wait_stream(torch.cuda.current_stream(device))
        for size in reversed(self._sizes):
            self._inputs[:size] = self._req_pool.padding_row
            self._inputs[size : 2 * size] = 0
            self._backend.init_forward_metadata_replay_cuda_graph(self._inputs[:size], [0] * size)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._run(size)  # kernels are compiled and libraries initialised outside of the capture
            graph = torch.cuda.CUDAGraph()
            # Another thread fills the arena meanwhile: what it does must not count as part of this capture.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._run(size)
            self._graphs[size] = graph
        torch.cuda.current_stream(device).wait_stream(stream)
        logger.info(
            "captured decode graphs for %d batch sizes in %.2f s", len(self._sizes), time.perf_counter() - start
        )

    def _run(self, size: int) -> None:
        """One pass over the first `size` places, in terms of fixed addresses only."""
        rows, starts = self._inputs[: 2 * size].view(2, size)
        page_size = self._backend.spec.page_size
        longest = self._req_pool.req_to_page.shape[1] * page_size - 1
        batch = make_decode_batch(self._req_pool, page_size, rows, starts, [longest] * size)
        batch.is_captured = True
        self._hidden_states[:size].copy_(self._forward(batch))

    @torch.inference_mode()
    def replay(self, rows: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """Hidden states [batch_size, hidden_size] of the newest token of each request, valid until the next replay.

        Args:
            rows: of the page table.
            starts: tokens of each request in the cache before the pass.
        """
        count = len(rows)
        size = next(size for size in self._sizes if size >= count)
        padded_rows = [*rows, *[self._req_pool.padding_row] * (size - count)]
        padded_starts = [*starts, *[0] * (size - count)]
        inputs = torch.tensor([*padded_rows, *padded_starts], dtype=torch.int64, pin_memory=True)
        self._inputs[: 2 * size].copy_(inputs, non_blocking=True)
        self._backend.init_forward_metadata_replay_cuda_graph(self._inputs[:size], padded_starts)
        self._graphs[size].replay()
        return self._hidden_states[:count]
