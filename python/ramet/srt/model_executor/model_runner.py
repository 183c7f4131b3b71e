"""Owns one rank's model: its weights, its KV cache and the forward pass. What runs when is the scheduler's matter."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from ramet.srt.batch.batch_plan import LogprobRows
from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens, TokenGroups
from ramet.srt.configs.device_config import free_memory_nbytes
from ramet.srt.configs.load_config import LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.runner_config import RunnerConfig
from ramet.srt.distributed.parallel_state import receive_from_previous_stage, send_to_next_stage
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, PassLimits
from ramet.srt.layers.attention.registry import (
    bind_attention,
    choose_attn_backend,
    describe_attention,
    describe_kv_cache,
)
from ramet.srt.layers.cpu_kernels import library as cpu_library
from ramet.srt.layers.cpu_matmul import describe_products
from ramet.srt.layers.moe import FusedMoE
from ramet.srt.layers.quantization.declare import declare_quantised
from ramet.srt.layers.sampler import compute_logprobs, compute_ranks
from ramet.srt.lora.lora_manager import LoraManager
from ramet.srt.mem_cache.memory_pool import ReqToPagePool, TokenToKVPool
from ramet.srt.mem_cache.state_pool import StatePool
from ramet.srt.mem_cache.window_pages import WindowCapacity
from ramet.srt.model_executor.cuda_graph_runner import CHUNK_SIZES, MAX_BATCH_SIZE, CudaGraphRunner
from ramet.srt.model_executor.kernel_choices import choose_kernels
from ramet.srt.model_executor.kv_cache_plan import KVCachePlan, KVLayers, plan_kv_cache
from ramet.srt.model_executor.library_warm_up import padded_count, warm_up_head, warm_up_products
from ramet.srt.model_executor.linear_states import LinearStates, state_bytes
from ramet.srt.model_executor.pass_batch import make_forward_batch
from ramet.srt.model_executor.rank_memory import RankMemory
from ramet.srt.model_executor.rank_weights import OfferedWeights, RankWeights, find_own_head
from ramet.srt.model_executor.weight_inspection import WeightInspector
from ramet.srt.model_executor.weight_update import RankVersions
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.models.decoder import DecoderForCausalLM
from ramet.srt.utils.device import to_device
from ramet.srt.weights.manifest import build_weight_manifest
from ramet.srt.weights.report import LoadReport, PublisherStats

logger = logging.getLogger(__name__)

WARM_UP_LENGTHS = (1, 32, 128, 512)  # tokens: kernels have other tiles for few; how few those are, the experts decide
MOST_WARM_UP_TOKENS = 16384  # where a pass has no limit of its own
PROMPT_LOGPROB_ROWS = 256  # logits of so many prompt positions are held at once


class ModelRunner:
    """The model of one rank on one device."""

    attn_backend: AttentionBackend
    kv_pool: TokenToKVPool
    req_pool: ReqToPagePool
    windows: WindowCapacity | None  # what layers keep that have a window; None: everything, as the others
    states: LinearStates  # of linear layers, if the model has some
    num_state_slots = 0  # of them; 0: it has none

    def __init__(
        self,
        config: RunnerConfig,
        model_config: ModelConfig,
        parallel: ParallelConfig,
        device: torch.device,
        on_phase: Callable[[str], None],
        context: LoadContext,
    ):
        """
        Args:
            device: see pick_device.
            on_phase: called with the name of each phase of the start when it has ended.
            context: the instance that the rank belongs to.

        Raises:
            ValueError, MemoryError: if the model can't run there; the message says why.
        """
        self.config = config
        self.model_config = model_config
        self.parallel = parallel
        self.device = device
        self.dtype = getattr(torch, model_config.dtype)
        self.page_size = config.page_size
        self.graph_runner: CudaGraphRunner | None = None
        self._sending: tuple[torch.distributed.Work, torch.Tensor] | None = None  # to the next pipeline stage
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.num_local_ranks))
        if device.type == "cpu":
            cpu_library.prepare(torch.get_num_threads())
            if cpu_library.is_expected():
                logger.info("products in %s: %s", model_config.dtype, describe_products(self.dtype))
        choose_kernels(config.tuning_dir, device)
        free_bytes = free_memory_nbytes(device)
        if device.type == "cpu":
            free_bytes //= config.num_local_ranks  # the ranks of a node share its memory
        self._build_model()
        if self._has_own_head():
            self.model_config = dataclasses.replace(model_config, tie_word_embeddings=False)
            self._build_model()
        if (quantization := model_config.quantization_config) is not None:
            logger.info("%s weights %s", quantization.name, quantization.summary)
        open_checkpoint = CheckpointOpener(functools.partial(describe_whole_model, self.model_config, self.manifest))
        if config.weights.load.reads_files:
            open_checkpoint(model_config.path)  # what is wrong with the files is said before they take memory
        self.lora: LoraManager | None = None
        if config.lora is not None:
            self.lora = LoraManager(
                config.lora, self.model, self.model_config, parallel, device, config.weights, context.started_at
            )
        kv_dtype = torch.float8_e4m3fn if model_config.has_fp8_cache else self.dtype
        attention = describe_attention(
            self.model, device, self.dtype, kv_dtype, self.page_size, self.model.attention_stand_in()
        )
        backend_class = choose_attn_backend(config.attention_backend, attention)
        kv_layers = describe_kv_cache(self.model, kv_dtype, may_differ=backend_class.maps_windows(attention))
        weights_nbytes = self.manifest.arena_nbytes + (0 if self.lora is None else self.lora.nbytes)
        num_bytes = state_bytes(self.model, self.dtype)
        kv_plan = plan_kv_cache(config, self.model_config, kv_layers, device, free_bytes, weights_nbytes, num_bytes)
        self.arena = allocate_arena(self.manifest, device, can_be_put_away=config.can_sleep)
        self.arena.bind(self.model)
        if self.lora is not None:
            self.lora.allocate(max(CHUNK_SIZES[-1], MAX_BATCH_SIZE) if device.type == "cuda" else 0)
        on_phase("model")
        weights = RankWeights(config.weights, context, self.manifest, self.arena, device, open_checkpoint)
        # Everything that needs only the addresses of the weights is made while they come.
        with ThreadPoolExecutor(1, thread_name_prefix="load-weights") as pool:
            loading = pool.submit(weights.load, model_config.path)
            self._make_kv_cache(kv_plan, kv_layers)
            self.attn_backend = backend_class(attention, self.kv_pool)
            bind_attention(self.model, self.attn_backend)
            on_phase("kv_cache")
            weights.prepare_offer()
            if device.type == "cuda":
                self._prepare_kernels()
                on_phase("graphs")
            keeps_room = config.keeps_copy_room
            pools: list[TokenToKVPool | StatePool] = [self.kv_pool]
            pools += [self.states.pool] if self.num_state_slots else []
            memory = RankMemory(weights, model_config.path, pools, open_checkpoint, keeps_room=keeps_room)
            self.versions = RankVersions(loading.result(), open_checkpoint, memory)
        self.inspector = WeightInspector(self.versions)
        on_phase("weights")

    def _build_model(self) -> None:
        """Make the model without memory, and lay its weights out."""
        config = self.model_config
        self.model = DecoderForCausalLM(config, self.dtype, self.parallel)
        if config.quantization_config is not None:
            declare_quantised(self.model, config.quantization_config, self.device)
        self.model.prepare(self.device)
        self.manifest = build_weight_manifest(
            self.model.named_parameters(remove_duplicate=False),
            model_name=self.config.weights.name,
            revision=config.revision,
            dtype=config.dtype,
            quantization=config.quantization,
            role="target",
            parallel=self.parallel,
            dimensions=config.dimensions,
            is_tied=None if config.embedding is not None else config.tie_word_embeddings,
            weight_version=self.config.weights.version,
        )

    def _has_own_head(self) -> bool:
        """Whether the output head is not the embedding's table, though the config says so: then files have both."""
        config = self.model_config
        if config.embedding is not None:
            return False
        return config.tie_word_embeddings and find_own_head(self.config.weights.load, self.manifest, config.path)

    def _make_kv_cache(self, plan: KVCachePlan, layers: KVLayers) -> None:
        self.windows = plan.windows
        self.max_total_num_tokens = plan.num_pages * self.page_size
        self.max_req_len = min(self.model_config.context_len, self.max_total_num_tokens)
        self.kv_pool = TokenToKVPool(
            num_pages=plan.num_pages,
            page_size=self.page_size,
            layers=layers.specs,
            dtype=layers.dtype,
            device=self.device,
            can_be_put_away=self.config.can_sleep,
            window_layers=plan.window_layers,
            num_window_pages=0 if plan.windows is None else plan.windows.num_pages,
        )
        max_pages = -(-self.max_req_len // self.page_size)
        has_two_ropes = self.model_config.rope.switch_len is not None
        self.req_pool = ReqToPagePool(
            self.config.max_running_requests,
            max_pages,
            self.device,
            has_two_ropes=has_two_ropes,
            num_mapped_pages=None if plan.windows is None else plan.num_pages,
            has_states=plan.num_state_slots > 0,
        )
        if plan.num_state_slots:
            self.num_state_slots = num_states = plan.num_state_slots
            can_be_put_away = self.config.can_sleep
            self.states = LinearStates(
                self.model, num_states, self.dtype, self.req_pool, can_be_put_away=can_be_put_away
            )
        if plan.windows is not None:
            num_tokens, window = plan.windows.num_pages * self.page_size, plan.windows.window
            logger.info("KV cache: layers with a window of %d keep %d tokens", window, num_tokens)
        logger.info(
            "KV cache: %d tokens in pages of %d, %.2f GB of %s",
            self.max_total_num_tokens,
            self.page_size,
            self.kv_pool.buffer.nbytes / 1e9,
            self.model_config.kv_cache_dtype if self.kv_pool.is_fp8 else self.model_config.dtype,
        )

    def _prepare_kernels(self) -> None:
        """Capture and compile what passes need, and take its memory. The values don't matter: page 0 takes them."""
        if self.config.attention_backend == "auto":
            self.attn_backend.choose_at_start()
        max_batch_size = self.config.max_running_requests
        is_wanted = self.config.use_cuda_graph and self.parallel.pp_size == 1
        # Adapters of a graph are told to all layers at once, and those of attention have other tokens then; whether
        # linear layers have room in a graph each group would find by itself.
        is_alike = self.lora is None and not self.num_state_slots
        is_wanted = is_wanted and (self.parallel.attn_dp_size == 1 or is_alike)
        if is_wanted and self.can_be_captured:
            graphs = CudaGraphRunner(
                self._compute,
                self.req_pool,
                self.attn_backend,
                max_batch_size,
                min(self.config.max_prefill_tokens + max_batch_size, self.max_total_num_tokens),
                self.model_config.hidden_size,
                may_launch=self.parallel.tp_size == 1,
                linear=self.states.passes if self.num_state_slots else None,
                num_groups=self.parallel.attn_dp_size,
                own_group=self.parallel.attn_dp_rank,
            )
            graphs.capture()
            self.graph_runner = graphs
        else:
            for num_tokens in WARM_UP_LENGTHS:
                if num_tokens <= self.max_req_len:
                    self._run_padding([num_tokens])
            largest = min(max_batch_size, MAX_BATCH_SIZE)
            num_before = self.attn_backend.num_before_long
            for size in sorted({1, largest}):  # few and many requests take other kernels
                self._run_padding([1] * size)
                if num_before is not None and num_before < self.max_req_len:
                    self._run_padding([1] * size, num_before)
        self._warm_up_libraries()

    def _warm_up_libraries(self) -> None:
        """Run the largest pass, choose the tokens of the largest batch, and multiply as passes between will.

        What has not enough memory for that is seen at once, and what is loaded on first use is loaded then.
        """
        config, is_captured = self.config, self.graph_runner is not None
        num_tokens = min(config.max_prefill_tokens, self.max_req_len, MOST_WARM_UP_TOKENS)
        try:
            hidden_states = self._run_padding([num_tokens])
            if hidden_states is not None and self.model_config.embedding is None:
                warm_up_head(self.compute_logits, hidden_states[:1], config.max_running_requests)
            if self.lora is not None:
                self.lora.end_pass()  # these rows are no pass
            warm_up_products(self.model, self.dtype, num_tokens, is_captured)
        except torch.OutOfMemoryError:
            logger.warning(
                "beside the KV cache there is no memory for a pass of %d prompt tokens, or to choose the tokens of %d "
                "requests: lower --mem-fraction-static, --chunked-prefill-size or --max-running-requests",
                num_tokens,
                config.max_running_requests,
            )

    @property
    def pass_sizes(self) -> list[int]:
        """Tokens of passes with prompt chunks that run as they are, without padding: rising, none without graphs."""
        return self.graph_runner.chunk_sizes if self.graph_runner is not None else []

    def use_quiet_moment(self) -> None:
        """Nothing has been to do for a moment: begin what makes later passes faster, beside them."""
        if self.config.attention_backend != "auto" or self.kv_pool.is_put_away:
            return
        page_size = self.page_size
        limits = PassLimits(
            max_tokens=min(self.config.max_prefill_tokens, self.max_req_len),
            max_keys=self.req_pool.req_to_page.shape[1] * page_size,
            num_pages=self.max_total_num_tokens // page_size + 1,
        )
        self.attn_backend.use_quiet_moment(limits)

    def _run_padding(self, lens: Sequence[int], start: int = 0) -> torch.Tensor | None:
        """A pass over sequences of so many tokens that belong to nobody, behind others; see run_pass."""
        number, num_groups = len(lens), self.parallel.attn_dp_size
        tokens = PassTokens.padding(self.req_pool.padding_row, list(lens) * num_groups, start)
        if self.lora is not None:  # in which nothing is: the kernels are compiled
            tokens.lora_slots = np.zeros(number * num_groups, dtype=np.int32)
        return self.run_pass(tokens, [slice(group * number, (group + 1) * number) for group in range(num_groups)])

    @property
    def can_be_captured(self) -> bool:
        """Whether nothing in a decode pass needs the host, once the weights are placed."""
        experts = (module for module in self.model.modules() if isinstance(module, FusedMoE))
        return self.attn_backend.can_be_captured and not any(layer.needs_host(self.dtype) for layer in experts)

    @property
    def load_report(self) -> LoadReport:
        """How the weights came."""
        return self.versions.weights.report

    @property
    def weight_version(self) -> str:
        """The name of what the weights are."""
        return self.versions.weights.version

    def publish(self, bootstrap_url: str, load_probe: Callable[[], float | None]) -> None:
        """Offer the weights, which are final from now on, and let other instances find them.

        Args:
            load_probe: how busy the rank is, from 0 to 1; called in threads.

        Raises:
            WeightTransferError: if the offer can't be made or the bootstrap server doesn't take the registration.
            RuntimeError: if they are offered already.
        """
        weights = self.versions.weights
        if isinstance(weights, OfferedWeights):
            raise RuntimeError("the weights are offered already")
        self.versions.offer_again = functools.partial(self.publish, bootstrap_url, load_probe)
        if self.versions.arena.is_made_up:
            return  # the first update offers what it has brought
        self.versions.weights = weights.offer(load_probe)
        if self.lora is not None:
            self.lora.offer_at(bootstrap_url)
        self._register_to_engine_info_bootstrap(bootstrap_url)
        if self.config.weights.is_published:
            self._publish_modelexpress_metadata()

    def _register_to_engine_info_bootstrap(self, bootstrap_url: str) -> None:
        """Tell the instance's bootstrap server where this rank's weights are; see OfferedWeights."""
        self._offered_weights().register(bootstrap_url)

    def _publish_modelexpress_metadata(self) -> None:
        """Tell the metadata server of this rank's weights; see OfferedWeights."""
        self._offered_weights().publish_modelexpress()

    def _offered_weights(self) -> OfferedWeights:
        weights = self.versions.weights
        if not isinstance(weights, OfferedWeights):
            raise RuntimeError("weights are offered before others are told of them")
        return weights

    def publisher_stats(self) -> PublisherStats | None:
        """What the metadata server has been told; None for a rank that publishes nothing."""
        return self.versions.weights.publisher_stats()

    @property
    def num_given_bytes(self) -> int:
        """Of the weights, that others have taken piece by piece since the start."""
        return self.versions.weights.num_given_bytes

    def close(self) -> None:
        """Withdraw the offer of the weights."""
        if self.lora is not None:
            self.lora.close()
        self.versions.close()

    @torch.inference_mode()
    def run_pass(self, tokens: PassTokens, groups: Sequence[slice]) -> torch.Tensor | None:
        """Run this rank's layers over the tokens; their keys and values are in the cache after.

        Args:
            groups: the sequences of each attention group, one behind the other.

        Returns:
            Hidden states [num_tokens, hidden_size] in the last pipeline stage, valid until the next call; None in the
            others, which send theirs to the next.
        """
        if self.parallel.attn_dp_size > 1:
            return self._run_groups(TokenGroups(tokens, groups, self.parallel.attn_dp_rank))
        if self.graph_runner is not None:
            if self.lora is not None:
                self.lora.tokens.stage(tokens.lora_slot_of_token)
            hidden_states = self.graph_runner.replay(tokens)
            if hidden_states is not None:
                return hidden_states
        padded = tokens.padded(self._padded_count(tokens.num_tokens), self.req_pool.padding_row)
        hidden_states = self._forward(make_forward_batch(self.req_pool, self.page_size, padded))
        return None if hidden_states is None else hidden_states[: tokens.num_tokens]

    def _run_groups(self, groups: TokenGroups) -> torch.Tensor | None:
        """The same with data-parallel attention. Every group has a token at least: all ranks launch the same."""
        done = None if self.graph_runner is None else self.graph_runner.replay_groups(groups)
        if done is None:
            sizes = [self._padded_count(max(1, count)) for count in groups.counts]
            grouped = groups.padded(sizes, self.req_pool.padding_row)
            output = self._forward(make_forward_batch(self.req_pool, self.page_size, grouped.own, grouped))
            if output is None:
                return None
            done = output, grouped
        hidden_states, grouped = done
        return hidden_states.index_select(0, to_device(grouped.places, torch.int64, self.device))

    def _forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Launch the kernels of a pass; see run_pass."""
        output = self._compute(batch)
        if self.parallel.is_last_stage:
            return output
        self.finish_sending()
        self._sending = (send_to_next_stage(output), output)
        return None

    def _compute(self, batch: ForwardBatch) -> torch.Tensor:
        """This stage's output [num_tokens, hidden_size]: of the token ids, or of what the stage before has sent."""
        self.attn_backend.init_forward_metadata(batch)
        if self.num_state_slots:
            self.states.passes.begin(batch)
        if self.lora is not None:
            self.lora.begin_pass(batch)
        inputs = batch.input_ids
        if not self.parallel.is_first_stage:
            shape = (len(batch.positions), self.model.model.input_columns(batch))
            inputs = torch.empty(shape, dtype=self.dtype, device=self.device)
            receive_from_previous_stage(inputs)
        return self.model(inputs, batch.positions, batch)

    def finish_sending(self) -> None:
        """Wait, on a GPU only its stream, until the next pipeline stage has what this one has sent."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None

    @torch.inference_mode()
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> float32 [num_rows, vocab_size]."""
        num_rows = len(hidden_states)
        padding = self._padded_count(num_rows) - num_rows
        padded = F.pad(hidden_states, (0, 0, 0, padding)) if padding else hidden_states
        return self.model.compute_logits(padded)[:num_rows]

    def _padded_count(self, num_rows: int) -> int:
        """See library_warm_up; on a CPU nothing is loaded, and rows take time."""
        return padded_count(num_rows) if self.device.type == "cuda" else num_rows

    @torch.inference_mode()
    def prompt_logprobs(self, hidden_states: torch.Tensor, token_ids: Sequence[int], top_num: int) -> LogprobRows:
        """Log-probabilities and ranks of `token_ids`, given the hidden state in its row; a few hundred at a time."""
        rows = LogprobRows(logprobs=[], top_logprobs=[], top_token_ids=[])
        for start in range(0, len(token_ids), PROMPT_LOGPROB_ROWS):
            targets = torch.tensor(token_ids[start : start + PROMPT_LOGPROB_ROWS], device=hidden_states.device)
            logits = self.compute_logits(hidden_states[start : start + PROMPT_LOGPROB_ROWS])
            rows.extend(compute_logprobs(logits, targets, top_num).to_rows([top_num] * len(targets)))
            rows.ranks += compute_ranks(logits, targets).tolist()
        return rows
