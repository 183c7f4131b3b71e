"""Owns a rank's adapters: those that are loaded, in host memory, and the slots of its layers that some of them are in.

Which adapter is in which slot, and when one is loaded or dropped, the scheduler decides for all ranks of its replica.
"""

import dataclasses
import logging
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from ramet.srt.batch.batch_plan import LoraPlacement
from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.lora_config import LoraConfig
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.runner_config import UNUSED, WeightsConfig
from ramet.srt.distributed.parallel_state import min_over_replica
from ramet.srt.errors import one_line
from ramet.srt.layers.kernels.runtime import has_triton
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.lora import LoraPart, LoraSlots, LoraTokens, parts_of, slots_nbytes
from ramet.srt.lora.adapter import LoraAdapter, LoraFile, LoraSource
from ramet.srt.lora.adapter_weights import (
    LoraProduct,
    adapter_manifest,
    check_adapter,
    describe_adapter,
    products_of,
    without_surplus,
)
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.utils.net import SeedAddress
from ramet.srt.utils.threads import run_beside
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import summarize

logger = logging.getLogger(__name__)

REGISTRATION_TIMEOUT_S = 30.0
ATTENTION = "self_attn"  # what a decoder layer calls its attention
ELSEWHERE = "another rank can't load it; that rank's log says why"

LoraLinear = MergedColumnParallelLinear | RowParallelLinear


@dataclass
class RankAdapter:
    """An adapter that a rank has loaded, or is loading."""

    products: list[LoraProduct]
    arena: WeightArena
    seed: WeightSeed | None  # of an instance that gives its weights away

    def close(self) -> None:
        """Withdraw the offer."""
        if self.seed is not None:
            self.seed.close()


class LoraManager:
    """A rank's adapters. The slots have no memory before `allocate`."""

    def __init__(
        self,
        config: LoraConfig,
        model: nn.Module,
        model_config: ModelConfig,
        parallel: ParallelConfig,
        device: torch.device,
        weights: WeightsConfig,
        started_at: float,
    ):
        """
        Args:
            model: this rank's, on the meta device.
            weights: where adapters come from, if it is an instance, and to whom they are offered.
            started_at: when the instance was launched, in unix seconds.

        Raises:
            ValueError: if adapters can't be computed on the device.
        """
        if device.type == "cuda" and not has_triton():
            raise ValueError("--enable-lora on a GPU needs the package triton")
        self._config = config
        self._model_config = model_config
        self._parallel = parallel
        self._device = device
        self._weights = weights
        self._started_at = started_at
        self._dtype: torch.dtype = getattr(torch, model_config.dtype)
        linears = _linear_layers(model)
        self._layers = {layer: parts_of(layer.matrices) for layer in linears.values()}
        self._of_attention = {layer for name, layer in linears.items() if f".{ATTENTION}." in name}
        self._parts = {part.name: part for parts in self._layers.values() for part in parts}
        self._whole_parts = self._parts_of_all_ranks(model)
        self._shapes = {
            name: (max(stop for _, stop in part.rows), part.columns[1]) for name, part in self._whole_parts.items()
        }
        self._bootstrap_url: str | None = None
        self._loading: dict[int, Future[RankAdapter]] = {}
        self._loaded: dict[int, RankAdapter] = {}
        self.tokens: LoraTokens  # of a pass
        self._attention_tokens: LoraTokens  # those whose attention this rank computes: mostly all

    def _parts_of_all_ranks(self, model: nn.Module) -> dict[str, LoraPart]:
        """As one rank would hold them, by their names."""
        if self._parallel.tp_size * self._parallel.pp_size > 1:
            model = type(model)(self._model_config, self._dtype, ParallelConfig())
        return {part.name: part for layer in _linear_layers(model).values() for part in parts_of(layer.matrices)}

    @property
    def nbytes(self) -> int:
        """Of the slots of all layers."""
        config, itemsize = self._config, self._dtype.itemsize
        sizes = (config.max_loras_per_batch, config.max_lora_rank, itemsize)
        return sum(slots_nbytes(parts, *sizes) for parts in self._layers.values())

    def allocate(self, num_captured: int) -> None:
        """Give the layers their slots.

        Args:
            num_captured: see LoraTokens.
        """
        config, device = self._config, self._device
        self.tokens = self._attention_tokens = LoraTokens(num_captured, config.max_loras_per_batch, device)
        if self._parallel.attn_dp_size > 1:
            self._attention_tokens = LoraTokens(num_captured, config.max_loras_per_batch, device)
        for layer, parts in self._layers.items():
            tokens = self._attention_tokens if layer in self._of_attention else self.tokens
            layer.lora = LoraSlots(parts, config.max_loras_per_batch, config.max_lora_rank, self._dtype, device, tokens)
        logger.info(
            "adapters: %d slots of rank %d, %.3f GB",
            config.max_loras_per_batch,
            config.max_lora_rank,
            self.nbytes / 1e9,
        )

    # -- Passes

    def begin_pass(self, batch: ForwardBatch) -> None:
        """Tell the layers whose tokens they get."""
        if batch.is_captured:
            self.tokens.begin_capture()
        else:
            self.tokens.begin(batch.lora_slots)
            if self._attention_tokens is not self.tokens:
                self._attention_tokens.begin(batch.tokens.lora_slot_of_token)

    def end_pass(self) -> None:
        """What the layers get from now on is of no pass."""
        self.tokens.begin(None)
        self._attention_tokens.begin(None)

    def place(self, placements: list[LoraPlacement]) -> None:
        """Put adapters into slots, in the place of what is there; passes that are queued still read that."""
        for placement in placements:
            loaded = self._loaded[placement.lora_id]
            tensors = {entry.name: loaded.arena.tensor(entry) for entry in loaded.arena.manifest.entries}
            products = {product.name: product for product in loaded.products}
            for layer, parts in self._layers.items():
                assert layer.lora is not None
                layer.lora.clear(placement.slot)
                for place, part in enumerate(parts):
                    product = products.get(part.name)
                    if product is not None:
                        a, b = tensors[product.a_entry], tensors[product.b_entry]
                        layer.lora.put(placement.slot, place, a, b, product.module.scale)

    # -- Adapters that come and go, in the same order on all ranks of a replica

    def offer_at(self, bootstrap_url: str) -> None:
        """From now on offer what is loaded to other instances, which find it by the own instance's bootstrap server."""
        self._bootstrap_url = bootstrap_url

    def begin_load(self, lora_id: int, adapter: LoraAdapter, source: LoraSource) -> None:
        """Load an adapter beside the passes."""
        self._loading[lora_id] = run_beside(lambda: self._load(adapter, source), "load-lora")

    def is_loading(self, lora_id: int) -> bool:
        """Whether this rank still is."""
        return not self._loading[lora_id].done()

    def end_load(self, lora_id: int) -> str | None:
        """Take in an adapter when all ranks of the replica have it, or drop it; they all call it.

        Returns:
            Why it can't be used; None if it can.
        """
        loaded, failure = None, None
        try:
            loaded = self._loading.pop(lora_id).result()
        except (ValueError, OSError, MemoryError, RuntimeError, WeightTransferError) as error:
            failure = one_line(error)
            logger.warning("rank %d: an adapter can't be loaded: %s", self._parallel.world_rank, failure)
        if min_over_replica(int(loaded is not None)):
            assert loaded is not None
            self._loaded[lora_id] = loaded
            return None
        if loaded is not None:
            loaded.close()
        return failure or ELSEWHERE

    def drop(self, lora_id: int) -> None:
        """Forget an adapter. Nothing that is planned from now on uses it."""
        self._loaded.pop(lora_id).close()

    def close(self) -> None:
        """Withdraw all offers."""
        for loaded in self._loaded.values():
            loaded.close()

    def _load(self, adapter: LoraAdapter, source: LoraSource) -> RankAdapter:
        surplus = self._model_config.surplus_tensors
        adapter = without_surplus(adapter, surplus)
        check_adapter(adapter, self._shapes, self._config.max_lora_rank)
        base = self._weights.load
        name, path = adapter.name, ""
        if isinstance(source, LoraFile):
            path = source.path
            config = dataclasses.replace(base, load_format="safetensors", weights_digest=adapter.digest)
        else:
            name = source.name
            config = dataclasses.replace(
                base,
                load_format="remote_instance",
                seeds=(SeedAddress(source.host, source.port, source.scheme),),
                backend="nccl",  # which needs no process of its own for each adapter that is offered
                send_weights_group_ports=(),
                fallback="error",
                weights_digest=adapter.digest,
                shows_keys=not source.is_listed,
                modelexpress_url=None,
            )
        products = products_of(adapter, self._shapes)
        whole = describe_adapter(adapter, products, self._whole_parts, surplus)
        manifest = self._manifest(adapter, products, name)
        arena = HostWeightArena(manifest)
        loader = get_model_loader(config, open_checkpoint=lambda path: CheckpointSource(path, whole))
        report = loader.load_weights(manifest, arena, path).report
        logger.info("rank %d: loaded the adapter %s %s", self._parallel.world_rank, adapter.name, summarize(report))
        offer = self._offer(self._manifest(adapter, products, adapter.name), arena)
        return RankAdapter(products, arena, offer)

    def _manifest(self, adapter: LoraAdapter, products: list[LoraProduct], name: str) -> WeightManifest:
        return adapter_manifest(adapter, products, name, self._parts, self._parallel, self._model_config.dimensions)

    def _offer(self, manifest: WeightManifest, arena: WeightArena) -> WeightSeed | None:
        if self._bootstrap_url is None:
            return None
        config = self._weights
        seed = WeightSeed.start(
            manifest,
            arena,
            host=config.host,
            started_at=self._started_at,
            control_host=config.control_host,
            network=UNUSED,
        )
        try:
            seed.register(
                self._bootstrap_url,
                admin_api_key=config.admin_api_key,
                timeout_s=REGISTRATION_TIMEOUT_S,
                ca_certs=config.load.ssl_ca_certs,
            )
        except BaseException:
            seed.close()
            raise
        return seed


def _linear_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
