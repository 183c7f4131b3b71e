"""Owns loading and unloading adapters on all replicas of an instance: the main process's side."""

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.lora.adapter import LoraAdapter, LoraSource, check_lora_name
from ramet.srt.lora.adapter_paths import (
    AdapterList,
    ListedAdapter,
    LoraPath,
    ask_instance,
    choose_listed,
    instance_address,
    instance_path,
    read_folder,
)
from ramet.srt.managers.io_struct import LoadLoraReqInput, LoraReqOutput, UnloadLoraReqInput
from ramet.srt.managers.lora_registry import LoadedAdapter, LoraRegistry
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer
from ramet.srt.utils.net import SeedAddress
from ramet.srt.utils.threads import run_beside

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
UNLOAD_TIMEOUT_S = 60.0  # once no request has the adapter

Result = TypeVar("Result")


class LoraControl:
    """Loads and unloads by name, one after the other.

    Args:
        served_name: of the model, which no adapter may have.
        is_on: whether the instance takes adapters.
        load_config: how other instances are asked.
        on_drop: called with the name of an adapter that is not there any more.
        has_session: whether tensors are coming for other weights, with which no adapter could stay.
    """

    def __init__(
        self,
        manager: TokenizerManager,
        served_name: str,
        is_on: bool,
        load_config: LoadConfig,
        on_drop: Callable[[str], None],
        has_session: Callable[[], bool],
    ):
        self._manager = manager
        self._served_name = served_name
        self._is_on = is_on
        self._load_config = load_config
        self._on_drop = on_drop
        self._has_session = has_session
        self.turn = asyncio.Lock()  # of whoever loads or unloads, or changes the weights below the adapters

    @property
    def registry(self) -> LoraRegistry:
        return self._manager.adapters

    def list_for_instances(self) -> AdapterList:
        """What other instances are told."""
        return AdapterList(
            adapters=[ListedAdapter(adapter=one.adapter, pinned=one.pinned) for one in self.registry.usable()]
        )

    async def load(self, path: LoraPath) -> LoadedAdapter:
        """Have every replica load an adapter; requests can name it then.

        Raises:
            RequestError: if it can't be loaded; the message says why.
            ServiceError: if a replica does not answer.
        """
        self._check_is_on()
        try:
            check_lora_name(path.name)
        except ValueError as error:
            raise RequestError(f"lora_name: {error}", param="lora_name") from None
        try:
            async with self.turn:
                self._check_weights_stay()
                self._check_is_free(path.name)
                adapter, source = await _beside(lambda: self._find(path))
                return await self._load(adapter, source, path)
        except ValueError as error:
            if isinstance(error, RequestError):
                raise
            text = f"lora_path: the adapter {path.name!r} can't be loaded: {error}"
            raise RequestError(text, param="lora_path") from None

    async def load_path(self, path: LoraPath) -> None:
        """Load an adapter, or all of an instance's where the path has no name. Raises what `load` raises."""
        found = None if path.name else instance_address(path.path)
        if found is None:
            await self.load(path)
            return
        listed = await self.ask_first([found[0]])
        if isinstance(listed, str):
            raise RequestError(listed)
        await self.load_listed(*listed)

    async def ask_first(
        self, addresses: Sequence[SeedAddress], *, are_listed: bool = False
    ) -> tuple[SeedAddress, list[ListedAdapter]] | str:
        """The adapters of the first instance that tells them; why none does.

        Args:
            are_listed: at a metadata server: no key is shown to them.
        """
        failures = []
        for address in addresses:
            try:
                server = self._server(address, are_listed)
                ask = functools.partial(ask_instance, server, self._load_config.timeout_s)
                return address, await _beside(ask)
            except ValueError as error:
                failures.append(str(error))
        return "; ".join(failures)

    async def load_listed(
        self, address: SeedAddress, listed: Sequence[ListedAdapter], *, is_listed: bool = False
    ) -> None:
        """Load an instance's adapters, but for those whose names are taken. Raises what `load` raises."""
        for one in listed:
            if self.registry.get(one.adapter.name) is None:
                await self.load(LoraPath(one.adapter.name, instance_path(address), one.pinned, is_listed))

    async def unload(self, name: str) -> None:
        """Give an adapter to no further request at once, and drop it when those that have it have ended.

        Raises:
            RequestError: if there is none of that name.
            ServiceError: if a replica does not answer.
        """
        self._check_is_on()
        loaded = self.registry.get(name)
        if loaded is None or loaded.is_leaving:
            state = "is not loaded" if loaded is None else "is being unloaded already"
            raise RequestError(f"lora_name: the adapter {name!r} {state}", param="lora_name", status_code=404)
        await self.registry.retire(loaded)
        async with self.turn:
            question = functools.partial(UnloadLoraReqInput, lora_id=loaded.lora_id)
            await self._manager.ask_all(question, LoraReqOutput, UNLOAD_TIMEOUT_S)
            self.registry.remove(name)
            self._manager.metrics.forget_adapter(name)
            self._on_drop(name)
        logger.info("unloaded the adapter %s", name)

    def _check_is_on(self) -> None:
        if not self._is_on:
            text = "lora_name: this instance takes no adapters: start it with --enable-lora"
            raise RequestError(text, param="lora_name")

    def _check_weights_stay(self) -> None:
        """An adapter belongs to the weights that serve when it is loaded; those that come would be refused."""
        reason = self._manager.weights_refusal
        if self._has_session():
            reason = "a session (/begin_weight_update) is open: end it first (/end_weight_update)"
        if reason is not None:
            raise RequestError(f"lora_name: no adapter is loaded while other weights are to come: {reason}",
                               param="lora_name")  # fmt: skip

    def _check_is_free(self, name: str) -> None:
        if name == self._served_name or name in self.registry.also_served:
            raise RequestError(f"lora_name: {name!r} is the model itself", param="lora_name")
        loaded = self.registry.get(name)
        if loaded is not None:
            state = "is being unloaded: try again when that is done" if loaded.is_leaving else "is loaded already"
            raise RequestError(f"lora_name: an adapter {name!r} {state}", param="lora_name")

    def _find(self, path: LoraPath) -> tuple[LoraAdapter, LoraSource]:
        """For a thread. Raises ValueError if there is no such adapter."""
        found = instance_address(path.path)
        if found is None:
            return read_folder(path)
        address, there = found
        server = self._server(address, path.is_listed)
        listed = ask_instance(server, self._load_config.timeout_s)
        return choose_listed(listed, server, there or path.name, path)

    def _server(self, address: SeedAddress, is_listed: bool) -> SeedServer:
        config = self._load_config
        return SeedServer(address, config.api_keys, config.ssl_ca_certs, shows_keys=not is_listed)

    async def _load(self, adapter: LoraAdapter, source: LoraSource, path: LoraPath) -> LoadedAdapter:
        lora_id = self.registry.next_number()
        question = functools.partial(
            LoadLoraReqInput, lora_id=lora_id, adapter=adapter, source=source, pinned=path.pinned
        )
        try:
            replies = await self._manager.ask_all(question, LoraReqOutput, LOAD_TIMEOUT_S)
        except ServiceError:
            self._on_drop(path.name)
            raise
        failures = [reply.message for reply in replies if not reply.success]
        if failures:
            have_it = [replica for replica, reply in enumerate(replies) if reply.success]
            drop = functools.partial(UnloadLoraReqInput, lora_id=lora_id)
            await self._manager.ask_all(drop, LoraReqOutput, UNLOAD_TIMEOUT_S, have_it)
            self._on_drop(path.name)
            raise ValueError(failures[0])
        loaded = LoadedAdapter(lora_id, adapter, path.path, path.pinned)
        self.registry.add(loaded)
        logger.info("loaded the adapter %s from %s", path.name, path.path)
        return loaded


async def _beside(work: Callable[[], Result]) -> Result:
    """Work in a thread for which an end of the instance does not wait: other instances may take their time."""
    return await asyncio.wrap_future(run_beside(work, "find-lora"))
