"""Owns the memory of responses: what `previous_response_id`, item references and GET /v1/responses/{id} find.

It is bounded by number and by bytes; what was used longest ago goes first. Everything is kept as JSON.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

MAX_RESPONSES = 4096
MAX_BYTES = 128 << 20
MAX_RESPONSE_BYTES = 8 << 20  # a larger one, its conversation included, is not kept
OBJECT_BYTES = 256  # what an object takes beside its JSON, about
POINTER_BYTES = 8


@dataclass(eq=False, slots=True)
class StoredItem:
    """One item of a conversation, which all responses of the conversation share."""

    id: str
    data: bytes  # JSON
    response_id: str  # of the response that it came with
    num_responses: int = 0  # that have it

    @property
    def num_bytes(self) -> int:
        return len(self.data) + OBJECT_BYTES

    def decode(self) -> dict[str, Any]:
        """The item."""
        return msgspec.json.decode(self.data)


@dataclass(eq=False, slots=True)
class StoredResponse:
    """A response, the items that it answers, and its own."""

    id: str
    data: bytes  # JSON
    input: tuple[StoredItem, ...]  # with those of the conversation before
    output: tuple[StoredItem, ...]

    @property
    def items(self) -> tuple[StoredItem, ...]:
        """The conversation, with its answer."""
        return self.input + self.output

    @property
    def num_bytes(self) -> int:
        """Without its items."""
        return len(self.data) + OBJECT_BYTES + POINTER_BYTES * (len(self.input) + len(self.output))


class ResponseStore:
    """Responses by their ids, and items by theirs.

    Args:
        max_bytes: of all responses and items, each item counted once.
        max_response_bytes: of one response and its conversation.
    """

    def __init__(
        self,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_response_bytes = max_response_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()  # the last one was used last
        self._items: dict[str, StoredItem] = {}  # by ids that were made here
        self._shared: dict[bytes, StoredItem] = {}  # all of them, by their JSON
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def add(
        self,
        response: dict[str, Any],
        history: Sequence[StoredItem],
        new_items: Iterable[dict[str, Any]],
        own_ids: frozenset[str],
    ) -> None:
        """Remember a response, unless it is too large.

        Args:
            history: the conversation before.
            new_items: what has been asked now.
            own_ids: which of them have ids of ours: by no other id an item can be referred to, for who chooses an id
                could put words into the mouths of others.
        """
        response_id = response["id"]
        asked = [self._item(item, response_id) for item in new_items]
        told = [self._item(item, response_id) for item in response["output"]]
        stored = StoredResponse(
            response_id, msgspec.json.encode(response), input=(*history, *asked), output=tuple(told)
        )
        if stored.num_bytes + sum(item.num_bytes for item in stored.items) > self._max_response_bytes:
            return
        for item in (*told, *(item for item in asked if item.id in own_ids)):
            self._items.setdefault(item.id, item)
        self._responses[response_id] = stored
        self.num_bytes += stored.num_bytes
        for item in stored.items:
            if not item.num_responses:
                self.num_bytes += item.num_bytes
                self._shared[item.data] = item
            item.num_responses += 1
        while len(self._responses) > self._max_responses or self.num_bytes > self._max_bytes:
            self.delete(next(iter(self._responses)))

    def _item(self, item: dict[str, Any], response_id: str) -> StoredItem:
        """The item; the one that is there, if it is the same: clients may send all of a conversation each time."""
        data = msgspec.json.encode(item)
        return self._shared.get(data) or StoredItem(item["id"], data, response_id)

    def get(self, response_id: str) -> StoredResponse | None:
        """The response, which has been used by this."""
        stored = self._responses.get(response_id)
        if stored is not None:
            self._responses.move_to_end(response_id)
        return stored

    def get_item(self, item_id: str) -> StoredItem | None:
        """The item; the response that it came with has been used by this."""
        item = self._items.get(item_id)
        if item is not None:
            self.get(item.response_id)
        return item

    def delete(self, response_id: str) -> bool:
        """Forget a response; items that later responses of its conversation have stay. False if it is not there."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self.num_bytes -= stored.num_bytes
        for item in stored.items:
            item.num_responses -= 1
            if not item.num_responses:
                self.num_bytes -= item.num_bytes
                self._shared.pop(item.data, None)
                if self._items.get(item.id) is item:
                    del self._items[item.id]
        return True
