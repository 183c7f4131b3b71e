"""Owns which kernels compute the prompt chunks of long passes: those that are installed are tried beside Ramet's."""

import logging
import statistics
import threading
from collections.abc import Callable

import numpy as np
import torch

from ramet.srt.errors import one_line
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.layers.attention.prompts.cudnn_prompts import CudnnPrompts
from ramet.srt.layers.attention.prompts.flash_prompts import FlashPrompts

logger = logging.getLogger(__name__)

CANDIDATES: tuple[type[PromptAttention], ...] = (CudnnPrompts, FlashPrompts)
TRIAL_TOKENS = 2048  # behind as many others
NUM_TRIALS = 7
LEAST_GAIN = 1.03  # a candidate must be so many times as fast
MAX_ERROR = 2e-2  # relative, from Ramet's own kernels in the same 16-bit type

# Attention of one sequence: (q, k_cache, v_cache, its row of the table, tokens before the chunk, window) -> like q
OwnAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int | None], torch.Tensor]


class PromptChoice:
    """Tries the candidates in a thread of its own, while Ramet's kernels do the work.

    Args:
        own: Ramet's kernels.
    """

    def __init__(self, spec: AttentionSpec, limits: PassLimits, own: OwnAttention):
        self._spec = spec
        self._limits = limits
        self._own = own
        self.chosen: PromptAttention | None = None  # None: Ramet's own
        self._thread = threading.Thread(target=self._run, name="choose-prompt-attention", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Until the choice is made."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        best: PromptAttention | None = None
        best_s = 0.0
        for candidate in CANDIDATES:
            if (obstacle := candidate.obstacle(self._spec)) is not None:
                logger.debug("prompt attention: %s needs %s", candidate.name, obstacle)
                continue
            try:
                made = candidate(self._spec, self._limits)
                own_s, seconds = self._compare(made)
            except Exception as error:  # noqa: BLE001  whatever the library raises: it is not needed
                logger.warning("prompt attention: %s is not used: %s", candidate.name, one_line(error))
                continue
            logger.info("prompt attention: %s takes %.3f ms, Triton %.3f", made.name, seconds * 1e3, own_s * 1e3)
            if seconds * LEAST_GAIN < own_s and (best is None or seconds < best_s):
                best, best_s = made, seconds
        if best is not None:
            logger.info("prompt chunks of long passes are computed by %s", best.name)
        self.chosen = best

    @torch.inference_mode()
    def _compare(self, candidate: PromptAttention) -> tuple[float, float]:
        """Seconds of Ramet's kernels and of the candidate for one layer.

        Raises:
            ValueError: if they differ in more than rounding.
        """
        spec, device = self._spec, self._spec.device
        tokens = min(TRIAL_TOKENS, self._limits.max_tokens, self._limits.max_keys // 2)
        num_pages = 2 * tokens // spec.page_size
        if num_pages == 0:
            raise ValueError("sequences are too short to measure it")
        keys = num_pages * spec.page_size
        tokens = min(tokens, keys)
        chunks = PromptChunks(*(np.array([value], dtype=np.int64) for value in (0, 0, tokens, keys)))
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            width = (spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
            q = torch.randn((tokens, *width), dtype=spec.dtype, device=device)[:, : spec.num_heads]
            cache_shape = ((num_pages + 1) * spec.page_size, spec.num_kv_heads, spec.head_dim)
            k_cache, v_cache = (torch.randn(cache_shape, dtype=spec.dtype, device=device) for _ in range(2))
            table = (torch.randperm(num_pages, device=device) + 1)[None]
            candidate.plan(chunks, table)
            for window in spec.windows:
                expected = self._own(q, k_cache, v_cache, table, keys - tokens, window)
                out = torch.full(expected.shape, float("nan"), dtype=spec.dtype, device=device)
                candidate.run(q, k_cache, v_cache, window, out)
                error = float((out.float() - expected.float()).norm() / expected.float().norm())
                if not error <= MAX_ERROR:
                    raise ValueError(f"its results differ from Triton's by {error:.1e}")
            window = spec.windows[0]
            own_s, theirs_s = [], []
            for _ in range(NUM_TRIALS):
                own_s.append(_seconds(lambda: self._own(q, k_cache, v_cache, table, keys - tokens, window)))
                theirs_s.append(_seconds(lambda: candidate.run(q, k_cache, v_cache, window, out)))
        return statistics.median(own_s), statistics.median(theirs_s)


def _seconds(run: Callable[[], object]) -> float:
    """What the device takes, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
