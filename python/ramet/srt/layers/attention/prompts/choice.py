"""Owns which kernels compute the prompt chunks of long passes: those that are installed are tried beside Ramet's.

What `ramet tune` has measured for such layers, with the same of them installed, is not measured again.
"""

import contextlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ramet.srt.errors import one_line
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.layers.attention.prompts.cudnn_prompts import CudnnPrompts
from ramet.srt.layers.attention.prompts.flash_prompts import FlashPrompts
from ramet.srt.layers.attention.prompts.flashinfer_prompts import FlashInferPrompts
from ramet.srt.layers.kernels.choices import PROMPTS, Key, Value

logger = logging.getLogger(__name__)

CANDIDATES: tuple[type[PromptAttention], ...] = (CudnnPrompts, FlashPrompts, FlashInferPrompts)
TRIAL_TOKENS = 2048  # behind as many others
MIN_TRIAL_TOKENS = 16
NUM_TRIALS = 7
NUM_RUNS = 4  # of each trial: while one is computed the next is launched, as in a pass of many layers
LEAST_GAIN = 1.03  # a candidate must be so many times as fast
MAX_ERROR = 2e-2  # relative, from Ramet's own kernels in the same 16-bit type

UNKNOWN, OWN = (-1,), (0,)  # beside the places in CANDIDATES, from one on

RunPrompts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int | None], torch.Tensor]
"""(q, k_cache, v_cache, window) -> like q"""
PlanPrompts = Callable[[PromptChunks, torch.Tensor], RunPrompts]
"""(chunks that stand one behind the other, page table): what computes them, until the next is planned"""


class PromptChoice:
    """Tries the candidates in a thread of its own, while Ramet's kernels do the work.

    Args:
        plan_own: Ramet's kernels.
    """

    def __init__(self, spec: AttentionSpec, limits: PassLimits, plan_own: PlanPrompts):
        self._spec = spec
        self._limits = limits
        self._plan_own = plan_own
        self.chosen: PromptAttention | None = None  # None: Ramet's own
        self.own_s = self.chosen_s = 0.0  # what a layer takes, where it was measured
        self._thread = threading.Thread(target=self._run, name="choose-prompt-attention", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Until the choice is made; whether it is."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if self._spec.device.type == "cuda":
            torch.cuda.set_device(self._spec.device)  # a thread starts with the first GPU
        known = PROMPTS.pick(UNKNOWN, *shape_of(self._spec))
        if known == OWN:
            return
        best: PromptAttention | None = None
        best_s = 0.0
        for candidate in CANDIDATES if known == UNKNOWN else CANDIDATES[known[0] - 1 : known[0]]:
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
            self.own_s = own_s
        if best is not None:
            logger.info("prompt chunks of long passes are computed by %s", best.name)
        self.chosen, self.chosen_s = best, best_s

    @property
    def value(self) -> Value:
        """What PROMPTS calls the choice."""
        return OWN if self.chosen is None else (CANDIDATES.index(type(self.chosen)) + 1,)

    @torch.inference_mode()
    def _compare(self, candidate: PromptAttention) -> tuple[float, float]:
        """Seconds of Ramet's kernels and of the candidate for one layer and one long chunk.

        Raises:
            ValueError: if they differ in more than rounding, there or in several short chunks.
        """
        spec = self._spec
        with _beside_passes(spec.device):
            trial = _Trial(spec, self._limits)
            for chunks in (trial.short_chunks, trial.long_chunk):
                num_tokens = int(chunks.lens.sum())
                inputs = trial.q[:num_tokens], trial.k_cache, trial.v_cache
                run_own = self._plan_own(chunks, trial.table)
                candidate.plan(chunks, trial.table)
                out = torch.empty(inputs[0].shape, dtype=spec.dtype, device=spec.device)
                for window in spec.windows:
                    candidate.run(*inputs, window, out.fill_(float("nan")))
                    _check(out.float(), run_own(*inputs, window).float())
            window, own_s, theirs_s = spec.windows[0], [], []
            for _ in range(NUM_TRIALS):
                own_s.append(_seconds(lambda: run_own(*inputs, window)))
                theirs_s.append(_seconds(lambda: candidate.run(*inputs, window, out)))
        return statistics.median(own_s), statistics.median(theirs_s)


def shape_of(spec: AttentionSpec) -> Key:
    """What PROMPTS calls layers, and the candidates that could compute them here."""
    installed = sum(1 << place for place, one in enumerate(CANDIDATES) if one.obstacle(spec) is None)
    return spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.kv_dtype.itemsize, installed


class _Trial:
    """A random sequence in a paged cache, and chunks of it."""

    def __init__(self, spec: AttentionSpec, limits: PassLimits):
        """
        Raises:
            ValueError: if there are no sequences of useful length.
        """
        device, dtype, page_size = spec.device, spec.dtype, spec.page_size
        tokens = min(TRIAL_TOKENS, limits.max_tokens, limits.max_keys // 2)
        num_pages = 2 * tokens // page_size
        keys = num_pages * page_size
        tokens = min(tokens, keys)
        if tokens < MIN_TRIAL_TOKENS:
            raise ValueError("sequences are too short to measure it")
        width = (spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        self.q = torch.randn((tokens, *width), dtype=dtype, device=device)[:, : spec.num_heads]
        cache_shape = ((num_pages + 1) * page_size, spec.num_kv_heads, spec.head_dim)
        self.k_cache, self.v_cache = (torch.randn(cache_shape, dtype=dtype, device=device) for _ in range(2))
        self.table = (torch.randperm(num_pages, device=device) + 1)[None]
        self.long_chunk = PromptChunks(*(np.array([value], dtype=np.int64) for value in (0, 0, tokens, keys)))
        length = tokens // 4
        first = np.arange(3, dtype=np.int64) * length
        ends = np.array([length, keys - 1, keys], dtype=np.int64)
        self.short_chunks = PromptChunks(np.zeros_like(first), first, np.full_like(first, length), ends)


@contextlib.contextmanager
def _beside_passes(device: torch.device) -> Iterator[None]:
    """What is computed goes to a stream of its own, behind what is queued already."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ValueError if they differ in more than rounding."""
    error = float((actual - expected).norm() / expected.norm())
    if not error <= MAX_ERROR:
        raise ValueError(f"its results differ from Triton's by {error:.1e}")


def _seconds(run: Callable[[], object]) -> float:
    """What the device takes, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(NUM_RUNS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / NUM_RUNS
