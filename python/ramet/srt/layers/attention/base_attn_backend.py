"""Owns the interface of attention backends, and what a backend is told of the model and the layers it computes for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.mem_cache.memory_pool import KVSpec, TokenToKVPool

if TYPE_CHECKING:
    from ramet.srt.layers.attention.expanded_chunks import ExpandedChunks


@dataclass(frozen=True)
class AttentionSpec:
    """What the layers of a rank ask of their backend."""

    device: torch.device
    dtype: torch.dtype  # of queries
    kv_dtype: torch.dtype  # of the KV cache: like `dtype`, or e4m3
    page_size: int
    num_heads: int
    kv: KVSpec  # of each layer
    scale: float
    windows: tuple[int | None, ...]  # the sliding windows that occur, each once; see AttentionLayer
    # Bound of the scores s, which become soft_cap * tanh(s / soft_cap) before the softmax.
    soft_cap: float | None = None
    has_sinks: bool = False  # see AttentionLayer
    latent: LatentTraits | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.kv.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Columns of queries and keys."""
        return self.kv.key_dim

    @property
    def has_fp8_cache(self) -> bool:
        return self.kv_dtype == torch.float8_e4m3fn


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer asks of its backend, beside what all layers of the rank have in common."""

    layer_id: int  # its place in the rank's KV pool
    sliding_window: int | None  # a query sees this many tokens, itself included; None: all before it
    # float32 [2]: what the keys and the values in an fp8 cache are multiplied by; None: nothing
    kv_scales: torch.Tensor | None = None
    sinks: torch.Tensor | None = None  # [num_heads]: a score more for each softmax, whose weight goes to no value


@dataclass(frozen=True)
class PassLimits:
    """The largest passes that there can be, and where their keys lie."""

    max_tokens: int  # new ones of a sequence
    max_keys: int  # of a sequence, whole pages
    num_pages: int  # of the KV cache


class CapturedShape(NamedTuple):
    """The passes that one CUDA graph runs."""

    num_tokens: int
    has_chunks: bool  # sequences may have several new tokens; otherwise each has one


class AttentionBackend(ABC):
    """Computes attention over the paged KV cache for every layer of a forward pass.

    For a pass that is captured in a CUDA graph, the runner calls `init_cuda_graph_state` once. Then, for every pass of
    a captured shape, it calls `init_forward_metadata_replay_cuda_graph` and the graph: whatever needs the host or
    values on the host belongs into the first of these two.
    """

    can_be_captured = False  # whether a decode pass may be captured in a CUDA graph
    can_capture_chunks = False  # whether a pass of any sequences may be
    prefers_alike = (
        False  # whether `prefers_launches` asks the tokens alone: all ranks that compute a pass say the same
    )
    # With latent attention: the long prompt chunks of the pass, whose queries are not among those that `forward` gets.
    expanded: "ExpandedChunks | None" = None

    @property
    def num_before_long(self) -> int | None:
        """Tokens before a new one from which on a launched pass takes other kernels; None: none does."""
        return None

    @staticmethod
    def maps_windows(_spec: AttentionSpec) -> bool:
        """Whether layers with a sliding window may have pages of their own; see ForwardBatch."""
        return False

    applies_kv_scales = False  # by itself; of others, queries and results are multiplied

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        """
        Args:
            kv_pool: the keys and values of all layers, at addresses that stay.
        """
        self.spec = spec
        self.kv_pool = kv_pool

    @staticmethod
    def obstacle(_spec: AttentionSpec) -> str | None:
        """What is missing to run such a model, as the end of "it needs ..."; None if nothing is."""
        return None

    @abstractmethod
    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare what all layers of the pass share; called once before the model runs.

        With `forward_batch.is_captured` the call is captured with the pass: what it puts on the device is computed
        anew by every replay, what it does on the host happens once.
        """

    def init_cuda_graph_state(  # noqa: B027  optional
        self, shapes: Sequence[CapturedShape], req_to_page: torch.Tensor
    ) -> None:
        """Make what captured passes of these shapes keep at fixed addresses.

        Args:
            req_to_page: int64 [num_rows, max_pages], the page table that all of them read, at its place.
        """

    def init_forward_metadata_replay_cuda_graph(  # noqa: B027  optional
        self, shape: CapturedShape, tokens: PassTokens, rows: torch.Tensor
    ) -> None:
        """Prepare the next captured pass; called before its capture and before each replay, on the same stream.

        Args:
            tokens: of the pass, `shape.num_tokens` with the padding.
            rows: int64 [num_tokens], on the device: of the page table, for each token.
        """

    def prefers_launches(self, _tokens: PassTokens) -> bool:
        """Whether a pass that could be replayed is faster if its kernels are launched."""
        return False

    def choose_at_start(self) -> None:  # noqa: B027  optional
        """Measure which kernels are the fastest, where that is worth a start's time; called before anything runs."""

    def use_quiet_moment(self, limits: PassLimits) -> None:  # noqa: B027  optional
        """Begin to look for faster ways, beside the passes; called when nothing has been to do for a moment."""

    @abstractmethod
    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        """q [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads, columns of the values].

        The cache holds the keys and values of this pass already.
        """
