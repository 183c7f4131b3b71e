"""Owns what a replica's leader does when an adapter is loaded or dropped: all its ranks do it between the same passes.

Loading goes on beside the passes, on each rank in a thread of its own. When the leader's is done, all ranks meet and
find out whether each of them has the adapter.
"""

from collections.abc import Callable, Sequence

from ramet.srt.lora.lora_manager import LoraManager
from ramet.srt.managers.io_struct import FinishLoraReq, LoadLoraReqInput, LoraReqOutput, UnloadLoraReqInput
from ramet.srt.managers.lora_slots import LoraSlots
from ramet.srt.mem_cache.request_cache import RequestCache

LoraMessage = LoadLoraReqInput | FinishLoraReq | UnloadLoraReqInput


class LoraDesk:
    """The leader's side.

    Args:
        manager: of this rank; None where there are no adapters, and nobody asks.
        tell: hands a message to the replica's other ranks.
        reply: answers the main process.
    """

    def __init__(
        self,
        manager: LoraManager | None,
        slots: LoraSlots,
        caches: Sequence[RequestCache],
        tell: Callable[[LoraMessage], None],
        reply: Callable[[LoraReqOutput], None],
    ):
        self._manager = manager
        self._slots = slots
        self._caches = caches
        self._tell = tell
        self._reply = reply
        self._loading: list[LoadLoraReqInput] = []

    def __len__(self) -> int:
        """Adapters that are being loaded."""
        return len(self._loading)

    def handle(self, message: LoadLoraReqInput | UnloadLoraReqInput) -> None:
        """Do what the main process asks for; it has made sure that no request has an adapter that it drops."""
        assert self._manager is not None, "an instance without adapters is asked for one"
        if isinstance(message, UnloadLoraReqInput):
            self._tell(message)
            self._manager.drop(message.lora_id)
            self._slots.forget(message.lora_id)
            for cache in self._caches:
                cache.drop(message.lora_id)
            self._answer(message.request_id, None)
        elif message.pinned and self._slots.num_pinned + 1 >= self._slots.num_slots:
            text = (
                f"{self._slots.num_pinned} adapters are pinned: one of the {self._slots.num_slots} slots must be free"
            )
            self._answer(message.request_id, f"{text} for others (--max-loras-per-batch)")
        else:
            self._tell(message)
            follow(self._manager, message)
            self._loading.append(message)

    def poll(self) -> None:
        """Take in what this rank has loaded."""
        while self._loading and self._manager is not None and not self._manager.is_loading(self._loading[0].lora_id):
            message = self._loading.pop(0)
            self._tell(FinishLoraReq(lora_id=message.lora_id))
            failure = self._manager.end_load(message.lora_id)
            if failure is None and message.pinned:
                self._slots.pin(message.lora_id)
            self._answer(message.request_id, failure)

    def _answer(self, request_id: str, failure: str | None) -> None:
        self._reply(LoraReqOutput(request_id=request_id, success=failure is None, message=failure or ""))


def follow(manager: LoraManager, message: LoraMessage) -> None:
    """Do on a rank what its replica's leader says."""
    match message:
        case LoadLoraReqInput():
            manager.begin_load(message.lora_id, message.adapter, message.source)
        case FinishLoraReq():
            manager.end_load(message.lora_id)
        case UnloadLoraReqInput():
            manager.drop(message.lora_id)
