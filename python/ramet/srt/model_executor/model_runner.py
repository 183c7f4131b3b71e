"""Owns one rank's model: its weights, its KV cache and the forward pass. What runs when is the scheduler's matter."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from ramet.srt.batch.batch_plan import LogprobRows
from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.configs.device_config import free_memory_nbytes
from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.parallel_state import min_over_replica, receive_from_previous_stage, send_to_next_stage
from ramet.srt.layers.attention.registry import describe_attention, make_attn_backend
from ramet.srt.layers.moe import FusedMoE
from ramet.srt.layers.quantization.fp8 import declare_fp8
from ramet.srt.layers.sampler import compute_logprobs
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToPagePool
from ramet.srt.model_executor.cuda_graph_runner import MAX_BATCH_SIZE, CudaGraphRunner
from ramet.srt.model_executor.decode_batch import make_decode_batch
from ramet.srt.model_executor.seed_finders import make_seed_finder
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.models.registry import get_model_class
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.device import to_device
from ramet.srt.utils.net import is_loopback, local_address
from ramet.srt.weights.manifest import build_weight_manifest
from ramet.srt.weights.report import LoadResult, PublisherStats

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.publication import Publication

logger = logging.getLogger(__name__)

REGISTRATION_TIMEOUT_S = 30.0
WARM_UP_LENGTHS = (1, 32, 128, 512)  # tokens; each takes another tile of the prefill or the experts' kernel
PROMPT_LOGPROB_ROWS = 256  # logits of so many prompt positions are held at once


class ModelRunner:
    """The model of one rank on one device."""

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        parallel: ParallelConfig,
        device: torch.device,
        on_phase: Callable[[str], None],
        context: LoadContext | None = None,
    ):
        """
        Args:
            server_args: with the device's defaults.
            device: see pick_device.
            context: the instance that the rank belongs to; needed where it is found through ModelExpress.

        Raises:
            ValueError, MemoryError: if the model can't run there; the message says why.
        """
        self.server_args = server_args
        self.model_config = model_config
        self.parallel = parallel
        self.device = device
        self.dtype = getattr(torch, model_config.dtype)
        self.page_size = server_args.page_size
        self.graph_runner: CudaGraphRunner | None = None
        self.load_probe: Callable[[], float | None] = lambda: None  # how busy the rank is, from 0 to 1
        self._context = context or LoadContext()
        self._seed: WeightSeed | None = None
        self._publication: Publication | None = None  # at the ModelExpress server
        self._sending: tuple[torch.distributed.Work, torch.Tensor] | None = None  # to the next pipeline stage
        num_local_ranks = len(server_args.local_ranks)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_ranks))
        free_bytes = free_memory_nbytes(device)
        if device.type == "cpu":
            free_bytes //= num_local_ranks  # the ranks of a node share its memory
        self._build_model()
        num_pages = self._num_kv_pages(free_bytes)
        attention = describe_attention(self.model, device, self.dtype, self.page_size)
        self.attn_backend = make_attn_backend(server_args.attention_backend, attention)
        self.arena = allocate_arena(self.manifest, device)
        self.arena.bind(self.model)
        on_phase("model")
        # Everything that needs only the addresses of the weights is made while they come.
        with ThreadPoolExecutor(1, thread_name_prefix="load-weights") as pool:
            loading = pool.submit(self._load_weights)
            self._make_kv_cache(num_pages)
            on_phase("kv_cache")
            if server_args.is_seed:
                WeightSeed.prepare(self._weights_host, parallel.world_rank)
            if device.type == "cuda":
                self._prepare_kernels()
                on_phase("graphs")
            self.load_report, self._claim = loading.result()
        on_phase("weights")

    def _build_model(self) -> None:
        """Make the model without memory, and lay its weights out."""
        config = self.model_config
        self.model = get_model_class(config.architecture)(config, self.dtype, self.parallel)
        if config.quantization == "fp8":
            declare_fp8(self.model)
        self.model.prepare(self.device)
        self.manifest = build_weight_manifest(
            self.model.named_parameters(remove_duplicate=False),
            model_name=self.server_args.weights_name,
            revision=config.revision,
            dtype=config.dtype,
            quantization=config.quantization,
            role="target",
            parallel=self.parallel,
            dimensions=config.dimensions,
        )

    def _load_weights(self) -> LoadResult:
        """Runs in a thread of its own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        config = self._load_config()
        loader = get_model_loader(config, functools.partial(make_seed_finder, config, self._context))
        return loader.load_weights(self.manifest, self.arena, self.model_config.path)

    def _load_config(self) -> LoadConfig:
        manifest = self.manifest
        return self.server_args.load_config(dtype=manifest.dtype, quantization=manifest.quantization)

    def _kv_layout(self) -> tuple[int, int, int, torch.dtype]:
        return len(self.model.layer_ids), self.model.num_kv_heads, self.model_config.head_dim, self.dtype

    def _num_kv_pages(self, free_bytes: int) -> int:
        """Pages of KV cache that fit beside the weights.

        Args:
            free_bytes: memory that is free before the weights come.

        Raises:
            ValueError: if the memory does not suffice, or for one request of useful length.
        """
        args = self.server_args
        token_bytes = MHATokenToKVPool.bytes_per_token(*self._kv_layout())
        budget = int(free_bytes * args.mem_fraction_static) - self.manifest.arena_nbytes
        wanted = args.max_total_tokens or args.max_running_requests * self.model_config.context_len
        if args.max_total_tokens is None:
            wanted = min(wanted, budget // token_bytes)
        elif wanted * token_bytes > free_bytes - self.manifest.arena_nbytes:
            raise ValueError(
                f"--max-total-tokens {wanted} needs {wanted * token_bytes / 1e9:.2f} GB of KV cache beside "
                f"{self.manifest.arena_nbytes / 1e9:.2f} GB of weights; {free_bytes / 1e9:.2f} GB are free on "
                f"{self.device}"
            )
        num_pages = min_over_replica(wanted // self.page_size)
        if num_pages < 1:
            raise ValueError(
                f"no memory is left for the KV cache: {free_bytes / 1e9:.2f} GB were free on {self.device}, the "
                f"weights take {self.manifest.arena_nbytes / 1e9:.2f} GB of the {args.mem_fraction_static} that "
                "--mem-fraction-static allows (or --max-total-tokens is below --page-size)"
            )
        return num_pages

    def _make_kv_cache(self, num_pages: int) -> None:
        num_layers, num_kv_heads, head_dim, dtype = self._kv_layout()
        self.max_total_num_tokens = num_pages * self.page_size
        self.max_req_len = min(self.model_config.context_len, self.max_total_num_tokens)
        self.kv_pool = MHATokenToKVPool(
            num_pages=num_pages,
            page_size=self.page_size,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=self.device,
        )
        max_pages = -(-self.max_req_len // self.page_size)
        self.req_pool = ReqToPagePool(self.server_args.max_running_requests, max_pages, self.device)
        logger.info(
            "KV cache: %d tokens in pages of %d, %.2f GB",
            self.max_total_num_tokens,
            self.page_size,
            self.kv_pool.buffer.nbytes / 1e9,
        )

    def _prepare_kernels(self) -> None:
        """Compile what prompts need and capture what decoding needs. The values don't matter: page 0 takes them."""
        for num_tokens in WARM_UP_LENGTHS:
            if num_tokens <= self.max_req_len:
                self.forward(_padding_prompt(num_tokens, self.page_size, self.device))
        is_wanted = not self.server_args.disable_cuda_graph and self.parallel.pp_size == 1
        is_wanted = is_wanted and self.parallel.attn_dp_size == 1  # each group's share of a batch is another
        if is_wanted and self.can_be_captured:
            self.graph_runner = CudaGraphRunner(self, self.server_args.max_running_requests)
            self.graph_runner.capture()
            return
        largest = min(self.server_args.max_running_requests, MAX_BATCH_SIZE)
        for size in sorted({1, largest}):  # few and many requests take other kernels
            self.decode([self.req_pool.padding_row] * size, [0] * size, slice(0, size))

    @property
    def can_be_captured(self) -> bool:
        """Whether nothing in a decode pass needs the host, once the weights are placed."""
        experts = (module for module in self.model.modules() if isinstance(module, FusedMoE))
        return self.attn_backend.can_be_captured and not any(layer.needs_host(self.dtype) for layer in experts)

    @property
    def _weights_host(self) -> str:
        """The address at which this rank's weights are offered: a loopback one is of no use to other nodes."""
        args = self.server_args
        return local_address(args.dist_init_addr) if args.nnodes > 1 and is_loopback(args.host) else args.host

    def publish(self, bootstrap_url: str) -> None:
        """Offer the weights, which are final from now on, and let other instances find them.

        Raises:
            WeightTransferError: if the offer can't be made or the bootstrap server doesn't take the registration.
        """
        args = self.server_args
        control_host = None if args.nnodes == 1 else local_address(args.dist_init_addr)
        self._seed = WeightSeed.start(
            self.manifest,
            self.arena,
            host=self._weights_host,
            started_at=self._context.started_at,
            control_host=control_host,
            on_state=self._on_instance_state,
        )
        self._register_to_engine_info_bootstrap(bootstrap_url)
        if args.modelexpress is not None:
            self._publish_modelexpress_metadata()

    def _register_to_engine_info_bootstrap(self, bootstrap_url: str) -> None:
        """Tell the instance's bootstrap server where this rank's weights are; a rank that nobody finds doesn't run."""
        assert self._seed is not None, "the weights are registered after they are offered"
        self._seed.register(
            bootstrap_url,
            admin_api_key=self.server_args.admin_api_key,
            timeout_s=REGISTRATION_TIMEOUT_S,
            ca_certs=self.server_args.ssl_ca_certs,
        )

    def _publish_modelexpress_metadata(self) -> None:
        """Tell the metadata server of this rank's weights, which nobody may take before the instance is healthy."""
        check_installed()
        from ramet.srt.modelexpress.client.publication import Publication
        from ramet.srt.modelexpress.records import make_instance_facts

        assert self._seed is not None, "the weights are published after they are offered"
        context = self._context
        self._publication = Publication(
            self._load_config(),
            self._seed.registration,
            make_instance_facts(context.instance_url, context.started_at, self.manifest, self.load_report),
            accelerator=self.device.type,
            device_id=self.device.index or 0,
            load_probe=lambda: self.load_probe(),
            claim=self._claim,
        )

    def _on_instance_state(self, is_ready: bool) -> None:
        """The main process says that the instance has become healthy, or is about to end."""
        if self._publication is not None:
            if is_ready:
                self._publication.set_ready()
            else:
                self._publication.withdraw()

    def publisher_stats(self) -> PublisherStats | None:
        """What the metadata server has been told; None for a rank that publishes nothing."""
        return None if self._publication is None else self._publication.stats()

    def close(self) -> None:
        """Withdraw the offer of the weights: first where others look for it."""
        if self._publication is not None:
            self._publication.close()
            self._publication = None
        if self._seed is not None:
            self._seed.close()
            self._seed = None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Run this rank's layers over the batch; its keys and values are in the cache after.

        Returns:
            Hidden states [num_tokens, hidden_size] in the last pipeline stage; None in the others, which send
            theirs to the next.
        """
        batch.kv_pool, batch.attn_backend = self.kv_pool, self.attn_backend
        if batch.batch_size > 0:
            self.attn_backend.init_forward_metadata(batch)
        inputs = batch.input_ids
        if not self.parallel.is_first_stage:
            shape = (len(batch.input_ids), self.model_config.hidden_size)
            inputs = torch.empty(shape, dtype=self.dtype, device=self.device)
            receive_from_previous_stage(inputs)
        output = self.model(inputs, batch.positions, batch)
        if self.parallel.is_last_stage:
            return output
        self.finish_sending()
        self._sending = (send_to_next_stage(output), output)
        return None

    def finish_sending(self) -> None:
        """Wait, on a GPU only its stream, until the next pipeline stage has what this one has sent."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], starts: Sequence[int], own: slice) -> torch.Tensor | None:
        """Like `forward`, for the newest token of each request. The result is valid until the next call.

        Args:
            rows: of the page table, where the tokens stand too.
            starts: tokens of each request in the cache before the pass.
            own: the requests whose attention this rank computes.
        """
        if self.graph_runner is not None and len(rows) <= self.graph_runner.max_batch_size:
            return self.graph_runner.replay(rows, starts)
        table_rows, positions = to_device([rows, starts], torch.int64, self.device)
        batch = make_decode_batch(self.req_pool, self.page_size, table_rows[own], positions[own], list(starts[own]))
        if self.parallel.attn_dp_size > 1:
            batch.input_ids = self.req_pool.last_tokens.index_select(0, table_rows)
            batch.logits_rows = torch.arange(len(rows), device=self.device)
            batch.attn_tokens = own
        return self.forward(batch)

    @torch.inference_mode()
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> float32 [num_rows, vocab_size]."""
        return self.model.compute_logits(hidden_states)

    @torch.inference_mode()
    def prompt_logprobs(self, hidden_states: torch.Tensor, token_ids: Sequence[int], top_num: int) -> LogprobRows:
        """Log-probabilities of `token_ids`, each given the hidden state in its row, a few hundred rows at a time."""
        rows = LogprobRows(logprobs=[], top_logprobs=[], top_token_ids=[])
        for start in range(0, len(token_ids), PROMPT_LOGPROB_ROWS):
            targets = torch.tensor(token_ids[start : start + PROMPT_LOGPROB_ROWS], device=hidden_states.device)
            logits = self.compute_logits(hidden_states[start : start + PROMPT_LOGPROB_ROWS])
            part = compute_logprobs(logits, targets, top_num).to_rows([top_num] * len(targets))
            rows.logprobs += part.logprobs
            rows.top_logprobs += part.top_logprobs
            rows.top_token_ids += part.top_token_ids
        return rows


def _padding_prompt(num_tokens: int, page_size: int, device: torch.device) -> ForwardBatch:
    """A prompt that belongs to nobody: it reads and writes page 0 alone."""
    positions = torch.arange(num_tokens, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        input_ids=torch.zeros_like(positions),
        positions=positions,
        out_cache_loc=positions % page_size,
        block_tables=torch.zeros((1, -(-num_tokens // page_size)), dtype=torch.int64, device=device),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        seq_lens_cpu=[num_tokens],
        extend_lens_cpu=[num_tokens],
        logits_rows=positions[-1:],
    )
