"""Owns which library attends to latent rows, if any: those that are installed are measured beside Ramet's kernels.

What `ramet tune` has measured for such layers, with the same of them installed, is not measured again. A library that
compiles for a minute is measured there alone, not whenever an instance starts.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.errors import one_line
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer, AttentionSpec
from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
from ramet.srt.layers.attention.rows.base import RowsAttention
from ramet.srt.layers.attention.rows.flash_mla_rows import FlashMlaRows
from ramet.srt.layers.attention.rows.flashinfer_rows import FlashInferRows
from ramet.srt.layers.kernels.choices import LATENT_ROWS, Key, Value
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.graph_timing import seconds_in_graph

logger = logging.getLogger(__name__)

CANDIDATES: tuple[type[RowsAttention], ...] = (FlashMlaRows, FlashInferRows)
TRIAL_LENGTHS = (8192, *[4096] * 15, *[1024] * 16)  # tokens before each of the requests that decode
NUM_TRIALS = 7
NUM_RUNS = 8  # of each trial, in one graph
LEAST_GAIN = 1.03  # a candidate must be so many times as fast
MAX_ERROR = 2e-2  # relative, from Ramet's own kernels in the same 16-bit type
UNKNOWN, OWN = (-1,), (0,)  # beside the places in CANDIDATES, from one on


class Measured:
    """The fastest of some candidates, and what a layer takes.

    Attributes:
        library: None if Ramet's kernels are as fast.
        own_s: 0 if nothing ran that these could be compared with.
    """

    def __init__(self, spec: AttentionSpec, candidates: Sequence[type[RowsAttention]]):
        self.library: RowsAttention | None = None
        self.own_s = self.best_s = 0.0
        for candidate in candidates:
            start = time.perf_counter()
            try:
                made = candidate(spec)
                self.own_s, seconds = Trial(spec).compare(made)
            except Exception as error:  # noqa: BLE001  whatever the library raises: it is not needed
                logger.warning("latent attention: %s is not used: %s", candidate.name, one_line(error))
                continue
            logger.info(
                "latent attention: %s takes %.3f ms for %d requests, Triton %.3f; measured in %.1f s",
                made.name, seconds * 1e3, len(TRIAL_LENGTHS), self.own_s * 1e3, time.perf_counter() - start,
            )  # fmt: skip
            if seconds * LEAST_GAIN < self.own_s and (self.library is None or seconds < self.best_s):
                self.library, self.best_s = made, seconds

    @property
    def value(self) -> Value:
        """What LATENT_ROWS calls it."""
        return OWN if self.library is None else (CANDIDATES.index(type(self.library)) + 1,)


def choose_library(spec: AttentionSpec) -> RowsAttention | None:
    """What attends to rows from now on; None: Ramet's kernels. Takes seconds where a library is installed."""
    fitting = []
    for candidate in CANDIDATES:
        obstacle = candidate.obstacle(spec)
        if obstacle is None:
            fitting.append(candidate)
        else:
            logger.debug("latent attention: %s needs %s", candidate.name, obstacle)
    known = LATENT_ROWS.pick(UNKNOWN, *shape_of(spec)) if fitting else OWN
    if known == OWN:
        return None
    if known == UNKNOWN:
        for candidate in fitting:
            if candidate.compiles:
                logger.info("latent attention: whether %s is faster, `ramet tune` can measure", candidate.name)
        fitting = [candidate for candidate in fitting if not candidate.compiles]
    else:
        fitting = [candidate for candidate in fitting if CANDIDATES.index(candidate) == known[0] - 1]
    library = Measured(spec, fitting).library
    if library is not None:
        logger.info("latent attention of decoding requests is computed by %s", library.name)
    return library


def shape_of(spec: AttentionSpec) -> Key:
    """What LATENT_ROWS calls layers, and the candidates that could compute them here."""
    installed = sum(1 << place for place, one in enumerate(CANDIDATES) if one.obstacle(spec) is None)
    return spec.num_heads, spec.page_size, spec.dtype.itemsize, installed


class Trial:
    """Requests that decode, of random rows in a cache of their own."""

    def __init__(self, spec: AttentionSpec):
        device, size, lengths = spec.device, spec.page_size, TRIAL_LENGTHS
        counts = [length // size + 1 for length in lengths]
        pool = TokenToKVPool(num_pages=sum(counts), page_size=size, layers=[spec.kv], dtype=spec.dtype, device=device)
        pool.buffer.normal_()
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
        pages = torch.randperm(sum(counts)) + 1
        for row, part in enumerate(pages.split(counts)):
            table[row, : len(part)] = part
        starts = np.array(lengths, dtype=np.int64)
        ones = np.ones_like(starts)
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            input_ids=torch.zeros(len(lengths), dtype=torch.int64, device=device),
            positions=torch.from_numpy(starts).to(device),
            out_cache_loc=torch.zeros(len(lengths), dtype=torch.int64, device=device),
            req_to_page=table.to(device),
            rows=torch.arange(len(lengths), device=device),
            seq_lens=torch.from_numpy(starts + 1).to(device, torch.int32),
            tokens=PassTokens(np.arange(len(lengths)), starts, ones, np.zeros_like(starts)),
        )
        self.q = torch.randn((len(lengths), spec.num_heads, spec.head_dim), dtype=spec.dtype, device=device)
        self.cache, _ = pool.get_kv_buffer(0)
        self._own = LatentTritonAttnBackend(spec, pool)

    def own(self) -> torch.Tensor:
        """What Ramet's kernels give."""
        return self._own.forward(self.q, AttentionLayer(0, None), self.batch)

    @torch.inference_mode()
    def compare(self, library: RowsAttention) -> tuple[float, float]:
        """Seconds of Ramet's kernels and of a library for one layer.

        Raises:
            ValueError: if they differ in more than rounding.
        """
        self._own.init_forward_metadata(self.batch)
        library.plan(self.batch.tokens, self.batch.rows, self.batch.req_to_page)
        expected = self.own()
        out = torch.full_like(expected, float("nan"))
        library.run(self.q, self.cache, out)
        error = float((out.float() - expected.float()).norm() / expected.float().norm())
        if not error <= MAX_ERROR:
            raise ValueError(f"its results differ from Triton's by {error:.1e}")
        own_s = _seconds(self.own)
        return own_s, _seconds(lambda: library.run(self.q, self.cache, out))


def _seconds(run: Callable[[], object]) -> float:
    """What the device takes for one run; launches don't count, as they don't in captured passes."""
    return seconds_in_graph(lambda _turn: run(), NUM_RUNS, NUM_TRIALS)
