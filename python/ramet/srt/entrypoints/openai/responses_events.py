"""Owns the way from what a model's output tells to a response's output items, and to the events of its stream.

Source: OpenAI's API reference of the Responses API's streaming events.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ramet.srt.entrypoints.openai.content_tokens import ContentTokens
from ramet.srt.entrypoints.openai.responses_items import encode_reasoning, new_id
from ramet.srt.errors import RequestError
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart

Fields = dict[str, Any]
Logprobs = Sequence[Fields]  # an entry for each token


class _OpenItem:
    """An output item that still grows. What its methods yield are events, without what all events of an item have."""

    def __init__(self, prefix: str) -> None:
        self.id = new_id(prefix)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def item(self, status: str) -> Fields:
        """The item with what it has so far."""
        raise NotImplementedError

    def begin(self) -> Iterator[Fields]:
        yield {"type": "response.output_item.added", "item": self.item("in_progress")}

    def add(self, text: str) -> Iterator[Fields]:
        self._pieces.append(text)
        yield self._delta(text)

    def _delta(self, text: str) -> Fields:
        raise NotImplementedError

    def end(self, status: str) -> Iterator[Fields]:
        yield {"type": "response.output_item.done", "item": self.item(status)}


class _PartItem(_OpenItem):
    """One whose text is its only part."""

    kind = ""  # in the names of its events

    def part(self) -> Fields:
        raise NotImplementedError

    def begin(self) -> Iterator[Fields]:
        item = self.item("in_progress")
        yield {"type": "response.output_item.added", "item": {**item, "content": []}}
        yield self._event("response.content_part.added", part=self.part())

    def _delta(self, text: str) -> Fields:
        return self._event(f"response.{self.kind}.delta", delta=text)

    def end(self, status: str) -> Iterator[Fields]:
        yield self._event(f"response.{self.kind}.done", text=self.text)
        yield self._event("response.content_part.done", part=self.part())
        yield from super().end(status)

    def _event(self, kind: str, **fields: Any) -> Fields:
        return {"type": kind, "item_id": self.id, "content_index": 0, **fields}


class _OpenMessage(_PartItem):
    kind = "output_text"

    def __init__(self) -> None:
        super().__init__("msg")
        self._logprobs: list[Fields] = []

    def part(self) -> Fields:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def item(self, status: str) -> Fields:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": [self.part()]}

    def say(self, text: str, logprobs: Logprobs) -> Iterator[Fields]:
        """As `add`, with the log-probabilities of the text's tokens."""
        self._logprobs += logprobs
        for event in self.add(text):
            yield {**event, "logprobs": logprobs}

    def end(self, status: str) -> Iterator[Fields]:
        done, *others = super().end(status)
        yield {**done, "logprobs": list(self._logprobs)}
        yield from others


class _OpenReasoning(_PartItem):
    kind = "reasoning_text"

    def __init__(self, is_encoded: bool) -> None:
        super().__init__("rs")
        self._is_encoded = is_encoded

    def part(self) -> Fields:
        return {"type": "reasoning_text", "text": self.text}

    def item(self, status: str) -> Fields:
        item: Fields = {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": [self.part()]}
        if self._is_encoded:
            item["encrypted_content"] = encode_reasoning(self.text) if self.text else None
        return item


class _OpenCall(_OpenItem):
    def __init__(self, call_id: str, name: str) -> None:
        super().__init__("fc")
        self._call_id = call_id
        self._name = name

    def item(self, status: str) -> Fields:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }

    def _delta(self, text: str) -> Fields:
        return {"type": "response.function_call_arguments.delta", "item_id": self.id, "delta": text}

    def end(self, status: str) -> Iterator[Fields]:
        done = {"type": "response.function_call_arguments.done", "item_id": self.id}
        yield {**done, "name": self._name, "arguments": self.text}
        yield from super().end(status)


class ResponseEvents:
    """Makes the events of one response. Each method returns those that are due, in order.

    Args:
        head: what the response has beside its status and what comes out.
        encodes_reasoning: whether reasoning items have an `encrypted_content`.
    """

    def __init__(self, head: Fields, *, encodes_reasoning: bool = False):
        self.response = {**head, "status": "in_progress", "output": [], "usage": None, "error": None}
        self.response |= {"incomplete_details": None, "completed_at": None}
        self._encodes_reasoning = encodes_reasoning
        self._num_events = 0
        self._output: list[Fields] = []  # items that are done
        self._open: _OpenItem | None = None
        self._tokens = ContentTokens()

    def begin(self) -> list[Fields]:
        """The events with which a stream begins."""
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def add(self, told: Sequence[Event], logprobs: Logprobs = ()) -> list[Fields]:
        """What the output tells next.

        Args:
            logprobs: of the tokens that came with it. Those of content are shown, with it.
        """
        events: list[Fields] = []
        self._tokens.add(logprobs)
        for one in told:
            if isinstance(one, ToolCallStart):
                _, call_id, name = one
                events += self._begin(_OpenCall(call_id, name))
            elif isinstance(one, ToolCallArguments):
                assert isinstance(self._open, _OpenCall)
                events += self._add(one.text)
            elif isinstance(one, Reasoning):
                if not isinstance(self._open, _OpenReasoning):
                    events += self._begin(_OpenReasoning(self._encodes_reasoning))
                self._tokens.skip(one.text)
                events += self._add(one.text)
            else:
                assert isinstance(one, Content)
                events += self._say(one.text)
        return events

    def _say(self, text: str) -> list[Fields]:
        """Content."""
        is_next, is_last = isinstance(self._open, _OpenMessage), isinstance(self._open, _OpenCall)
        logprobs = self._tokens.take(text, is_next=is_next, is_last=is_last)
        events = [] if is_next else self._begin(_OpenMessage())
        return events + self._of_message(text, logprobs)

    def _of_message(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        assert isinstance(self._open, _OpenMessage)
        return self._of_item(self._open.say(text, logprobs))

    def end(self, finish_reason: str, usage: Fields, completed_at: int) -> list[Fields]:
        """The events with which a stream ends.

        Args:
            finish_reason: as chats have it: stop, tool_calls, length or abort.
        """
        if finish_reason == "abort":
            return self.fail("server_error", "the request was aborted", usage)
        is_complete = finish_reason != "length"
        status = "completed" if is_complete else "incomplete"
        events: list[Fields] = []
        if isinstance(self._open, _OpenMessage) and (rest := self._tokens.rest()):
            events += self._of_message("", rest)  # such as the one that ends the output
        if self._open is None or (is_complete and isinstance(self._open, _OpenReasoning)):
            events += self._begin(_OpenMessage())  # the model has chosen to say nothing
        # Behind a whole call the reason is tool_calls.
        is_cut_off = finish_reason == "stop" and isinstance(self._open, _OpenCall)
        events += self._close("incomplete" if is_cut_off else status)
        self.response |= {"status": status, "output": self._output, "usage": usage}
        if is_complete:
            self.response["completed_at"] = completed_at
        else:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._lifecycle(status)]

    def fail(self, code: str, message: str, usage: Fields | None = None) -> list[Fields]:
        """The events with which a stream ends whose request has failed."""
        events = self._close("incomplete")
        error = {"code": code, "message": message}
        self.response |= {"status": "failed", "output": self._output, "usage": usage, "error": error}
        return [*events, self._lifecycle("failed")]

    def fail_with(self, error: Exception, message: str) -> list[Fields]:
        """The same, and what clients know as an error."""
        param = error.param if isinstance(error, RequestError) else None
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        fields = {"type": "error", "code": code, "message": message, "param": param}
        return [*self.fail(code, message), self._numbered(fields)]

    # ---- events ----

    def _begin(self, item: _OpenItem) -> list[Fields]:
        events = self._close("completed")
        self._open = item
        return events + self._of_item(item.begin())

    def _add(self, text: str) -> list[Fields]:
        assert self._open is not None
        return self._of_item(self._open.add(text))

    def _close(self, status: str) -> list[Fields]:
        if self._open is None:
            return []
        events = self._of_item(self._open.end(status))
        self._output.append(self._open.item(status))
        self._open = None
        return events

    def _of_item(self, events: Iterator[Fields]) -> list[Fields]:
        return [self._numbered({**event, "output_index": len(self._output)}) for event in events]

    def _lifecycle(self, kind: str) -> Fields:
        return self._numbered({"type": f"response.{kind}", "response": dict(self.response)})

    def _numbered(self, event: Fields) -> Fields:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        return event
