"""Owns which adapters requests can name, under which numbers, and how many requests have each of them."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ramet.srt.errors import RequestError
from ramet.srt.lora.adapter import NO_ADAPTER, LoraAdapter
from ramet.srt.weights.errors import name_some


@dataclass
class LoadedAdapter:
    """An adapter that every replica has."""

    lora_id: int  # of no other adapter, before or after it
    adapter: LoraAdapter
    path: str  # as it was given
    pinned: bool
    is_leaving: bool = False  # no further request gets it


class LoraRegistry:
    """The main process's side. A name that is free again can become another adapter's, a number can't."""

    def __init__(self) -> None:
        self.also_served: tuple[str, ...] = ()  # further names of the model itself
        self._loaded: dict[str, LoadedAdapter] = {}
        self._numbers = itertools.count(NO_ADAPTER + 1)
        self._id_of_request: dict[str, int] = {}
        self._num_requests: Counter[int] = Counter()
        self._unused: dict[int, asyncio.Event] = {}  # of adapters that leave

    def next_number(self) -> int:
        return next(self._numbers)

    def add(self, loaded: LoadedAdapter) -> None:
        """From now on requests can name it."""
        self._loaded[loaded.adapter.name] = loaded

    def remove(self, name: str) -> None:
        """The name is free."""
        self._unused.pop(self._loaded.pop(name).lora_id, None)

    def get(self, name: str) -> LoadedAdapter | None:
        return self._loaded.get(name)

    def names(self) -> list[str]:
        """Of all adapters, those among them that some requests still have while they are being unloaded."""
        return list(self._loaded)

    def usable(self) -> list[LoadedAdapter]:
        """Those that requests can name now, in the order in which they were loaded."""
        return [loaded for loaded in self._loaded.values() if not loaded.is_leaving]

    # -- Requests

    def name_of(self, model: str | None, served: str) -> str:
        """The adapter that a request's `model` names: by its name, or as served:name. "" for the model itself.

        Raises:
            RequestError: if it names neither.
        """
        if not model or model == served or model in self.also_served:
            return ""
        for name in (model, *(model.removeprefix(f"{one}:") for one in (served, *self.also_served))):
            loaded = self._loaded.get(name)
            if loaded is not None and not loaded.is_leaving:
                return name
        raise unknown_model(model, (served, *self.also_served), (loaded.adapter.name for loaded in self.usable()))

    def resolve(self, name: str) -> int:
        """The number of the adapter that has the name now. Raises RequestError if a request can't have it."""
        if not name:
            return NO_ADAPTER
        loaded = self._loaded.get(name)
        if loaded is None or loaded.is_leaving:
            state = "is not loaded" if loaded is None else "is being unloaded"
            raise RequestError(
                f"lora_path: the adapter {name!r} {state}", param="lora_path", code="model_not_found", status_code=404
            )
        return loaded.lora_id

    def begin(self, rid: str, lora_id: int) -> None:
        """A request goes to its replica."""
        if lora_id != NO_ADAPTER:
            self._id_of_request[rid] = lora_id
            self._num_requests[lora_id] += 1

    def end(self, rid: str) -> None:
        """The replica is done with it."""
        lora_id = self._id_of_request.pop(rid, NO_ADAPTER)
        if lora_id != NO_ADAPTER:
            self._num_requests[lora_id] -= 1
            if not self._num_requests[lora_id]:
                del self._num_requests[lora_id]
                if lora_id in self._unused:
                    self._unused[lora_id].set()

    async def retire(self, loaded: LoadedAdapter) -> None:
        """Give an adapter to no further request, and wait until those that have it have ended."""
        loaded.is_leaving = True
        event = self._unused.setdefault(loaded.lora_id, asyncio.Event())
        if self._num_requests[loaded.lora_id]:
            await event.wait()


def unknown_model(name: str, served: Iterable[str], adapters: Iterable[str] = ()) -> RequestError:
    """What is said of a model that is not there."""
    names = list(adapters)
    others = f" and the adapters {name_some(names)}" if names else ""
    text = f"the model {name!r} does not exist; this instance serves {', '.join(map(repr, served))}{others}"
    return RequestError(text, param="model", code="model_not_found", status_code=404)
