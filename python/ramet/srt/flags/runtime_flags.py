"""Owns the flags about how passes are computed."""

from dataclasses import dataclass
from typing import NamedTuple

from ramet.srt.flags.flag import CHUNK, COUNT, NOT_NEGATIVE, PART, SECONDS, SHARE, flag

DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "cpu", "triton", "flashinfer", "flash_mla", "torch_varlen", "torch_native")
SCHEDULE_POLICIES = ("deadline", "lpm", "fcfs", "priority")
GRAMMAR_BACKENDS = ("llguidance", "none")


class DeviceDefaults(NamedTuple):
    """What depends on the kind of device where it was not given."""

    max_running_requests: int
    mem_fraction_static: float
    chunked_prefill_size: int
    target_itl_ms: float


DEVICE_DEFAULTS = {"cpu": DeviceDefaults(64, 0.5, 2048, 500.0), "cuda": DeviceDefaults(256, 0.85, 8192, 40.0)}


@dataclass(frozen=True, kw_only=True)
class RuntimeFlags:
    """Device, memory, scheduling."""

    device: str = flag("auto", "Where the model runs.", choices=DEVICES)
    base_gpu_id: int = flag(
        0, "Number of the GPU that the node's first rank takes; the others take those behind it.", limit=NOT_NEGATIVE
    )
    attention_backend: str = flag(
        "auto",
        "Kernels for attention; auto takes, on a GPU, the first of triton, flashinfer, torch_varlen and torch_native "
        "that is installed and runs the model, on a CPU Ramet's own (cpu). torch_varlen has not run on a GPU yet. With "
        "auto, cuDNN, FlashAttention 3 or FlashInfer compute long prompts where installed and faster than triton, and "
        "FlashMLA or FlashInfer latent attention of requests that decode. flash_mla is for latent attention alone.",
        choices=ATTENTION_BACKENDS,
    )
    tuning_dir: str | None = flag(
        None,
        "Folder of files of `ramet tune`: which kernels and tiles are the fastest on a GPU. What is there goes before "
        "what the user's cache has ($RAMET_TUNING_DIR); files of other GPUs and versions are not taken.",
    )
    disable_cuda_graph: bool = flag(False, "Launch every kernel of a decode pass by itself.")
    disable_overlap_schedule: bool = flag(
        False, "Plan a pass only when the tokens of the one before it are known, on a GPU too."
    )
    max_running_requests: int | None = flag(
        None, "Most requests that are decoded together; 64 on a CPU and 256 on a GPU when not given.", limit=COUNT
    )
    max_queued_requests: int = flag(4096, "Most requests that may wait; further ones get a 503.", limit=COUNT)
    max_total_tokens: int | None = flag(
        None, "KV cache capacity in tokens; computed from free memory when not given.", limit=COUNT
    )
    max_mamba_cache_size: int | None = flag(
        None,
        "Most states of linear layers that are kept, of models that have some: one for each request that runs, the "
        "others for cached prefixes; by default two for each of --max-running-requests and 16 more, within half of the "
        "KV cache's memory.",
        limit=COUNT,
    )
    mem_fraction_static: float | None = flag(
        None,
        "Share of the free memory for weights and KV cache together; 0.5 on a CPU and 0.85 on a GPU by default.",
        limit=SHARE,
    )
    page_size: int = flag(16, "Tokens per KV cache page; also the granularity of prefix sharing.", limit=COUNT)
    chunked_prefill_size: int | None = flag(
        None,
        "Most prompt tokens in one forward pass, 2048 on a CPU and 8192 on a GPU when not given; -1 never splits a "
        "prompt.",
        limit=CHUNK,
    )
    target_itl_ms: float | None = flag(
        None,
        "Milliseconds that requests which decode should wait for a token at most: a pass beside them computes as many "
        "prompt tokens as that leaves time for. When not given it is 500 on a CPU and 40 on a GPU, and up to two and a "
        "half times as long while prompts of many passes wait. 0 is no target, and there is none where prompts are "
        "never split.",
        limit=NOT_NEGATIVE,
    )
    schedule_policy: str = flag(
        "deadline",
        "Order of prompts: by a deadline, which is the later the more of the prompt is to be computed; longest cached "
        "prefix first, unless others have waited too long; first come first served; or by the priority of requests, "
        "the highest first, where each level counts as much as ten seconds of waiting.",
        choices=SCHEDULE_POLICIES,
    )
    schedule_low_priority_values_first: bool = flag(
        False, "With --schedule-policy priority: a low value is a high priority, as in vLLM."
    )
    clone_prefix_cache: float = flag(
        0.0,
        "Share of the KV cache that an instance may take from the one it has its weights from: the pages of the "
        "prefixes that most requests have found there, within 2 s before it is ready. That one needs this flag too. "
        "0: nothing is taken or given.",
        limit=PART,
    )
    disable_radix_cache: bool = flag(False, "Do not keep the KV cache of ended requests for later ones.")
    stream_interval: int = flag(1, "Output tokens between two streamed events of a request.", limit=COUNT)
    grammar_backend: str = flag("llguidance", "Library for constrained output.", choices=GRAMMAR_BACKENDS)
    watchdog_timeout: float = flag(
        300.0,
        "Seconds within which the instance ends if one of its processes stands still, and that one forward pass may "
        "take.",
        limit=SECONDS,
    )
