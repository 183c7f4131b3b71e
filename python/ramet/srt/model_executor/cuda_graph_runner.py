"""Owns the CUDA graphs of short passes: one for each of some numbers of tokens, captured once, replayed for many."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import GroupedTokens, PassTokens, TokenGroups
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, CapturedShape
from ramet.srt.layers.attention.delta_passes import DeltaPasses
from ramet.srt.layers.kernels.split_sums import counts_of
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import group_inputs, make_captured_batch, token_inputs
from ramet.srt.observability.progress_bar import progress_bar

logger = logging.getLogger(__name__)

MAX_BATCH_SIZE = 512
# Tokens of captured passes with prompt chunks. Longer ones keep the device busy for longer than their launches take.
CHUNK_SIZES = (*range(64, 769, 64), 896, 1024, *range(1280, 2049, 256))
SHORT_TOKENS = 64  # a pass of so few may have kernels of its own: AWQ's products have some for each 16 rows


def graph_batch_sizes(max_running_requests: int) -> list[int]:
    """Batch sizes to capture: close together where padding costs most, up to the largest batch or MAX_BATCH_SIZE."""
    largest = min(max_running_requests, MAX_BATCH_SIZE)
    sizes = [1, 2, 4, 8, 16, 24, *range(32, 128, 16), *range(128, MAX_BATCH_SIZE + 1, 32)]
    return [size for size in sizes if size < largest] + [largest]


def captured_shapes(max_running_requests: int, max_tokens: int) -> list[CapturedShape]:
    """The passes to capture: those that only decode, and those with prompt chunks, each from the shortest on.

    Args:
        max_tokens: of passes with prompt chunks, whose sizes go up to what holds so many; 0: none of them.
    """
    shapes = [CapturedShape(size, False) for size in graph_batch_sizes(max_running_requests)]
    enough = next((size for size in CHUNK_SIZES if size >= max_tokens), CHUNK_SIZES[-1])
    return shapes + [CapturedShape(size, True) for size in CHUNK_SIZES if max_tokens > 0 and size <= enough]


class CudaGraphRunner:
    """Replays the model's kernels for a pass with one launch.

    The graphs read the weights, the KV cache and the page table at their fixed addresses, so that they can be
    captured before the weights have arrived. A pass is padded to the next captured size with the table's padding row,
    whose reads and writes go to page 0.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        req_pool: ReqToPagePool,
        backend: AttentionBackend,
        max_batch_size: int,
        max_tokens: int,
        hidden_size: int,
        may_launch: bool,
        linear: DeltaPasses | None = None,
        num_groups: int = 1,
        own_group: int = 0,
    ):
        """
        Args:
            forward: runs the whole model: the hidden states [num_tokens, hidden_size] of a pass.
            backend: of the model's attention layers; can be captured.
            max_tokens: of passes with prompt chunks.
            may_launch: whether the backend may prefer launches. Not where ranks compute a pass together and may not
                prefer alike: each finds its kernels by itself, and one that launches sums fewer tokens with the others
                than those that pad.
            linear: of the model's linear layers; None if it has none.
            num_groups: of data-parallel attention, whose tokens are padded to the same number; `own_group` is this
                rank's.
        """
        self._forward = forward
        self._req_pool = req_pool
        self._backend = backend
        self._linear = linear
        self._may_launch = may_launch or (backend.prefers_alike and num_groups == 1)
        self._num_groups, self._own_group = num_groups, own_group
        self._shapes = captured_shapes(max_batch_size, max_tokens if backend.can_capture_chunks else 0)
        largest = max(shape.num_tokens for shape in self._shapes)
        self._device, dtype = backend.spec.device, backend.spec.dtype
        self._inputs = torch.zeros(3 * largest, dtype=torch.int64, device=self._device)
        self._group_inputs = torch.zeros(2 * largest * num_groups, dtype=torch.int64, device=self._device)
        self._hidden_states = torch.empty((largest * num_groups, hidden_size), dtype=dtype, device=self._device)
        self._graphs: dict[CapturedShape, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a graph for every shape, the largest first, so that the others fit into its memory.

        Kernels have other tiles for few rows and for many: the shortest passes and the longest of a kind use them all.
        """
        start = time.perf_counter()
        device = self._device
        stream = torch.cuda.Stream(device)
        pool = torch.cuda.graph_pool_handle()
        counts_of(device)  # which no graph may own
        self._backend.init_cuda_graph_state(self._shapes, self._req_pool.req_to_page)
        if self._linear is not None:
            self._linear.init_captured(self._shapes, device)
        stream.wait_stream(torch.cuda.current_stream(device))
        by_size = sorted(self._shapes, reverse=True)
        kinds = [[shape for shape in by_size if shape.has_chunks == has_chunks] for has_chunks in (False, True)]
        first = {shape for kind in kinds for shape in (*kind[:1], *kind[-1:])}
        first |= {shape for shape in by_size if shape.num_tokens <= SHORT_TOKENS}
        for shape in self._shown(by_size):
            self._prepare(shape, *self._nobodys(shape.num_tokens))
            stream.wait_stream(torch.cuda.current_stream(device))
            if shape in first:
                with torch.cuda.stream(stream):
                    self._run(shape)  # kernels are compiled and libraries initialised outside of the capture
            graph = torch.cuda.CUDAGraph()
            # Another thread fills the arena meanwhile: what it does must not count as part of this capture.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._run(shape)
            self._graphs[shape] = graph
        torch.cuda.current_stream(device).wait_stream(stream)
        logger.info("captured graphs of %d passes in %.2f s", len(self._shapes), time.perf_counter() - start)

    @staticmethod
    def _shown(shapes: Sequence[CapturedShape]) -> Iterator[CapturedShape]:
        """The shapes, one after the other, with how many are done to be seen."""
        with progress_bar(len(shapes), "capturing graphs") as advance:
            for shape in shapes:
                yield shape
                advance(1)

    def _fixed_inputs(self, shape: CapturedShape) -> torch.Tensor:
        """int64 [3, num_tokens], where a pass of this shape reads its tokens."""
        return self._inputs[: 3 * shape.num_tokens].view(3, -1)

    def _fixed_group_inputs(self, shape: CapturedShape) -> torch.Tensor:
        """int64 [2, num_groups * num_tokens], where it reads those of all groups."""
        return self._group_inputs[: 2 * self._num_groups * shape.num_tokens].view(2, -1)

    def _nobodys(self, num_tokens: int) -> tuple[PassTokens, GroupedTokens | None]:
        """Tokens that belong to nobody, so many for each group."""
        row = self._req_pool.padding_row
        tokens = PassTokens.padding(row, [1] * num_tokens * self._num_groups)
        if self._num_groups == 1:
            return tokens, None
        parts = [slice(group * num_tokens, (group + 1) * num_tokens) for group in range(self._num_groups)]
        grouped = TokenGroups(tokens, parts, self._own_group).padded([num_tokens] * self._num_groups, row)
        return grouped.own, grouped

    def _run(self, shape: CapturedShape) -> None:
        """One pass, in terms of fixed addresses only."""
        mode = ForwardMode.EXTEND if shape.has_chunks else ForwardMode.DECODE
        page_size = self._backend.spec.page_size
        groups = (self._fixed_group_inputs(shape), self._own_group) if self._num_groups > 1 else None
        batch = make_captured_batch(self._req_pool, page_size, self._fixed_inputs(shape), mode, groups)
        self._hidden_states[: self._num_groups * shape.num_tokens].copy_(self._forward(batch))

    def _prepare(self, shape: CapturedShape, tokens: PassTokens, grouped: GroupedTokens | None = None) -> bool:
        """Put the tokens, as many as the shape has, where the graph reads them; False if they have no place there."""
        if self._linear is not None and not self._linear.prepare(shape, tokens):
            return False
        inputs = torch.from_numpy(token_inputs(tokens)).pin_memory()
        if grouped is not None:
            of_groups = torch.from_numpy(group_inputs(grouped)).pin_memory()
            self._fixed_group_inputs(shape).copy_(of_groups, non_blocking=True)
        fixed = self._fixed_inputs(shape)
        fixed.copy_(inputs, non_blocking=True)
        self._backend.init_forward_metadata_replay_cuda_graph(shape, tokens, fixed[0])
        return True

    @property
    def chunk_sizes(self) -> list[int]:
        """Tokens of the captured passes with prompt chunks, rising."""
        return [shape.num_tokens for shape in self._shapes if shape.has_chunks]

    @torch.inference_mode()
    def replay(self, tokens: PassTokens) -> torch.Tensor | None:
        """Hidden states [num_tokens, hidden_size], valid until the next replay; None if no graph holds such a pass."""
        shape = self._fitting(not tokens.is_decode, tokens.num_tokens)
        if shape is None or (self._may_launch and self._backend.prefers_launches(tokens)):
            return None
        if not self._prepare(shape, tokens.padded(shape.num_tokens, self._req_pool.padding_row)):
            return None
        self._graphs[shape].replay()
        return self._hidden_states[: tokens.num_tokens]

    @torch.inference_mode()
    def replay_groups(self, groups: TokenGroups) -> tuple[torch.Tensor, GroupedTokens] | None:
        """The same with data-parallel attention: hidden states of all groups' tokens, and where each token stands.

        Every rank takes the same graph: it depends on what all of them know. A group that only decodes may be in a pass
        with chunks of another's.
        """
        shape = self._fitting(not groups.tokens.is_decode, max(groups.counts))
        if shape is None:
            return None
        grouped = groups.padded([shape.num_tokens] * self._num_groups, self._req_pool.padding_row)
        self._prepare(shape, grouped.own, grouped)
        self._graphs[shape].replay()
        return self._hidden_states[: self._num_groups * shape.num_tokens], grouped

    def _fitting(self, has_chunks: bool, num_tokens: int) -> CapturedShape | None:
        """The smallest shape of a kind that holds so many tokens."""
        fitting = (one for one in self._shapes if one.has_chunks == has_chunks and one.num_tokens >= num_tokens)
        return next(fitting, None)
