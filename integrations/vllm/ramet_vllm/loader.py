"""Owns vLLM's load format `ramet`: a model's weights from a running Ramet instance, straight into its parameters."""

import dataclasses
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.seeds_by_address import SeedsByAddress
from ramet.srt.model_loader.remote_instance_loader import RemoteInstanceModelLoader
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest, dtype_name
from ramet.srt.weights.report import LoadReport, summarize
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig as VllmLoadConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_world_group,
)
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ramet_vllm.listed_seeds import find_listed
from ramet_vllm.model_layout import ModelFacts, lay_out, shared_dimensions
from ramet_vllm.model_memory import ModelMemory
from ramet_vllm.options import Options
from ramet_vllm.same_weights import Outcome, exchange, find_failure
from ramet_vllm.seed_tensors import SeedTensors, ask_for_tensors
from ramet_vllm.watched_load import CannotMap, watch_load

logger = init_logger("vllm.ramet")  # below vLLM's own, so that it is shown as vLLM's is


class RametModelLoader(BaseModelLoader):
    """Takes each rank's part of a model from a seed; from files, as vLLM does, when that fails, unless told not to."""

    def __init__(self, load_config: VllmLoadConfig) -> None:
        """Raises ValueError if the extra config is not sound."""
        super().__init__(load_config)
        self._options = Options.parse(load_config.model_loader_extra_config)
        self._parallel = ParallelConfig()
        self._has_all_experts = True
        _show_logs()

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the weights are not in files."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """A model with its weights.

        Raises:
            ValueError: for a model, or a setting, with which that can't be done.
        """
        _check_can_load(vllm_config, model_config)
        self._parallel = _own_place(vllm_config)
        self._has_all_experts = not vllm_config.parallel_config.enable_expert_parallel
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill the parameters of a model that has just been made.

        Raises:
            ValueError: if its weights can't be taken from an instance, or neither a seed nor files have them.
            WeightTransferError: if no seed could give them, and files are not wanted.
        """
        rank, memory = self._parallel.world_rank, ModelMemory(model)
        taken: tuple[WeightArena, LoadReport] | None = None
        failure = ""
        try:
            config = self._find_seeds(model_config)
            manifest = self._match(model, model_config, memory, ask_for_tensors(config, rank))
            taken = _fill(memory, manifest, config, model_config.model)
        except WeightTransferError as error:
            if self._options.fallback == "error":
                raise
            failure = str(error)
        # A rank with weights from a seed beside one with those of its files would be wrong without a word.
        version = taken[1].weight_version if taken is not None else ""
        world = get_world_group()
        failure = find_failure(exchange(Outcome(version, failure), world.cpu_group, world.world_size))
        if taken is not None and not failure:
            memory.show(taken[0])
            logger.info("rank %d: took the weights %s", rank, summarize(taken[1]))
            return
        if taken is not None:
            taken = None
            memory.take_again()
        logger.warning("rank %d: no weights from instances, loading from files instead: %s", rank, failure)
        self._read_files(model, model_config, failure)

    def _find_seeds(self, model_config: ModelConfig) -> LoadConfig:
        """Raises WeightTransferError if a metadata server, where one is asked, knows none."""
        options, config = self._options, self._options.load_config()
        if options.modelexpress is None:
            return config
        seeds = find_listed(
            options.modelexpress,
            model_name=options.model_name or _served_name(model_config),
            dtype=dtype_name(model_config.dtype),
            revision=_revision(model_config),
            timeout_s=options.modelexpress_wait_s,
            rank=self._parallel.world_rank,
        )
        return dataclasses.replace(config, seeds=tuple(seeds))

    def _match(
        self, model: torch.nn.Module, model_config: ModelConfig, memory: ModelMemory, seed: SeedTensors
    ) -> WeightManifest:
        """Which slices of the seed's tensors the rank needs, and where. Raises ValueError if that can't be said."""
        if seed.manifest.quantization:
            raise CannotMap(
                f"the seed {seed.seed} serves weights in the format {seed.manifest.quantization}, which vLLM lays out "
                "in ways of its own: only weights that are not quantised can be taken"
            )
        try:
            load: Any = model.load_weights
            placed = watch_load(load, memory.tensors, seed.tensors.values(), readable=memory.buffers)
            facts = _describe(model_config, self._options.weight_version, self._has_all_experts, seed)
            return lay_out(memory.describe(placed.boxes), placed, seed.tensors, facts, self._parallel)
        except CannotMap as error:
            raise CannotMap(f"the weights of the seed {seed.seed} don't fit vLLM's {type(model).__name__}: {error}") \
                from error  # fmt: skip

    def _read_files(self, model: torch.nn.Module, model_config: ModelConfig, reason: str) -> None:
        """Load as vLLM does without this plugin. Raises ValueError, with both reasons, if there are no files either."""
        config = dataclasses.replace(self.load_config, load_format="auto", model_loader_extra_config={})
        try:
            DefaultModelLoader(config).load_weights(model, model_config)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"no weights from the seed ({reason}), and none from files ({error})") from error


def _fill(
    memory: ModelMemory, manifest: WeightManifest, config: LoadConfig, model_path: str
) -> tuple[WeightArena, LoadReport]:
    """An arena that holds what the seeds have, compared with what they say. The parameters have no memory meanwhile.

    Raises:
        WeightTransferError: if that has failed; then they have theirs again.
    """
    device = memory.device
    memory.give_back()
    try:
        # A thread of its own has neither the default device nor the default dtype that vLLM has set in this one.
        with ThreadPoolExecutor(1, thread_name_prefix="take-weights") as thread:
            return thread.submit(_take, manifest, config, device, model_path).result()
    except BaseException:
        memory.take_again()
        raise


def _take(
    manifest: WeightManifest, config: LoadConfig, device: torch.device, model_path: str
) -> tuple[WeightArena, LoadReport]:
    arena = allocate_arena(manifest, device)
    arena.make_current()
    loader = RemoteInstanceModelLoader(config, functools.partial(SeedsByAddress, config))
    return arena, loader.load_weights(manifest, arena, model_path).report


def _check_can_load(vllm_config: VllmConfig, model_config: ModelConfig) -> None:
    """Raises ValueError for settings with which weights can't be taken from an instance."""
    if model_config.quantization is not None:
        raise CannotMap(
            f"--load-format ramet takes weights that are not quantised, and vLLM would lay these out as "
            f"{model_config.quantization}: leave --quantization out, or take another load format"
        )
    if vllm_config.load_config.device is not None:
        raise ValueError("--load-format ramet loads to the device that computes, and knows no other load device")
    if model_config.enable_sleep_mode:
        raise ValueError("--load-format ramet does not go together with --enable-sleep-mode: the weights lie in memory "
                         "that vLLM does not put to sleep")  # fmt: skip
    if model_config is not vllm_config.model_config:
        raise ValueError("--load-format ramet loads the target model alone: give the draft model a load format of its "
                         'own in --speculative-config ("draft_load_config": {"load_format": "auto"})')  # fmt: skip


def _own_place(vllm_config: VllmConfig) -> ParallelConfig:
    stages, parallel = get_pp_group(), vllm_config.parallel_config
    return ParallelConfig(
        tp_size=get_tensor_model_parallel_world_size(),
        tp_rank=get_tensor_model_parallel_rank(),
        pp_size=stages.world_size,
        pp_rank=stages.rank_in_group,
        dp_size=parallel.data_parallel_size,
        dp_rank=parallel.data_parallel_rank,
    )


def _describe(model_config: ModelConfig, version: str, has_all_experts: bool, seed: SeedTensors) -> ModelFacts:
    config = model_config.hf_text_config
    return ModelFacts(
        model_name=_served_name(model_config),
        revision=_revision(model_config),
        dtype=dtype_name(model_config.dtype),
        weight_version=version,
        dimensions=shared_dimensions(seed.manifest.dimensions, config),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        has_all_experts=has_all_experts,
    )


def _served_name(model_config: ModelConfig) -> str:
    names = model_config.served_model_name
    return names[0] if isinstance(names, list) else names or model_config.model


def _revision(model_config: ModelConfig) -> str:
    """The commit of the hub's files that the config is from; "" for a folder."""
    return getattr(model_config.hf_config, "_commit_hash", None) or ""


def _show_logs() -> None:
    """Show what Ramet logs as what vLLM logs."""
    ours, theirs = logging.getLogger("ramet"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)
