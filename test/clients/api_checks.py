"""Owns what a step of an API client must have seen, mostly the texts that plain HTTP gets for the same questions."""

import json
from typing import Any

from clients.conftest import FLOW, PlainAnswers

FINISHED = {"stop", "length", "tool_calls", "end_turn", "max_tokens", "tool_use", "tool-calls"}


def chat(saw: Any, plain: PlainAnswers) -> None:
    """The chat's answer, and where they are told its finish and the usage."""
    assert saw["text"] == plain.chat
    assert saw.get("whole", plain.chat) == plain.chat
    assert saw.get("num_pieces", 2) > 1
    assert saw.get("finish_reason", "stop") == "stop"
    usage = saw.get("usage")
    if isinstance(usage, dict) and "prompt_tokens" in usage:
        counted = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [usage[name] for name in counted] == [plain.usage[name] for name in counted]
    elif isinstance(usage, list):
        assert usage[:2] == [plain.usage["prompt_tokens"], plain.usage["completion_tokens"]]


def sent_back(saw: Any, plain: PlainAnswers) -> None:
    """The second answer of a conversation."""
    assert saw["text"] == plain.sent_back
    assert saw.get("previous", True)


def batch(saw: Any, plain: PlainAnswers) -> None:
    assert saw["texts"] == [plain.chat] * 3


def completion(saw: Any, plain: PlainAnswers) -> None:
    assert saw["text"] == plain.completion


def scored(saw: Any, plain: PlainAnswers) -> None:
    """The prompt itself, a log-probability for each token but the first."""
    assert saw["text"] == FLOW["prompt"]
    assert saw["logprobs"][0] is None
    assert len(saw["logprobs"]) > 1
    assert all(value < 0 for value in saw["logprobs"][1:])


def logprobs(saw: Any, plain: PlainAnswers) -> None:
    """A log-probability for each token; the one that ends the answer may be among them."""
    chat(saw, plain)
    assert plain.chat in {"".join(saw["tokens"]), "".join(saw["tokens"][:-1])}
    assert set(saw["num_tops"]) == {2}


def models(saw: Any, plain: PlainAnswers) -> None:
    assert saw == ["fake"]


def call(saw: Any, plain: PlainAnswers) -> None:
    """A call of the flow's function, its arguments as the schema has them."""
    assert saw["name"] == FLOW["tool"]["name"]
    assert saw.get("id", "some")
    assert saw.get("num_calls", 1) == 1
    assert saw.get("indices", [0]) == [0]
    assert saw.get("finish_reason", "tool_calls") in {"tool_calls", "stop"}
    _weather(saw["arguments"])
    for same in ("whole", "pieces"):
        assert _parsed(saw.get(same, saw["arguments"])) == _parsed(saw["arguments"])


def called_twice(saw: Any, plain: PlainAnswers) -> None:
    """A loop of calls that was ended after two: both times the function was really called."""
    assert len(saw["results"]) == 2
    for arguments in saw["results"]:
        _weather(arguments)


def goes_through(saw: Any, plain: PlainAnswers) -> None:
    assert saw.get("finish_reason", saw.get("stop_reason")) in FINISHED


def text(saw: Any, plain: PlainAnswers) -> None:
    assert isinstance(saw["text"], str)
    assert saw["text"]


def plant(saw: Any, plain: PlainAnswers) -> None:
    """An object of the flow's schema."""
    found = saw["object"] if "object" in saw else json.loads(saw["text"])
    assert sorted(found) == ["edible", "plant"]
    assert found["plant"] in FLOW["schema"]["properties"]["plant"]["enum"]
    assert isinstance(found["edible"], bool)


def json_text(saw: Any, plain: PlainAnswers) -> None:
    """An object, or the beginning of one that the length has cut off."""
    assert saw["text"].lstrip().startswith("{")
    if saw["finish_reason"] == "stop":
        assert isinstance(json.loads(saw["text"]), dict)


def response_events(saw: Any, plain: PlainAnswers) -> None:
    """OpenAI's order of a streamed response, numbered from 0."""
    assert saw["text"] == plain.chat
    kinds = saw["kinds"]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert saw.get("numbers", list(range(len(kinds)))) == list(range(len(kinds)))
    assert saw.get("whole", plain.chat) == plain.chat


def response_call_events(saw: Any, plain: PlainAnswers) -> None:
    call(saw, plain)
    assert "response.function_call_arguments.done" in saw["kinds"]
    assert saw["kinds"][-1] == "response.completed"


def response(saw: Any, plain: PlainAnswers) -> None:
    chat(saw, plain)
    assert saw["status"] == "completed"


def cut(saw: Any, plain: PlainAnswers) -> None:
    """An answer that its length has ended, and that says so."""
    assert saw["text"]
    assert plain.chat.startswith(saw["text"])
    assert saw["text"] != plain.chat
    assert saw["why"] in (["length"], ["max_tokens"], ["incomplete", "max_output_tokens"])


def message(saw: Any, plain: PlainAnswers) -> None:
    assert saw["text"] == plain.chat
    assert (saw["role"], saw["type"], saw["stop_reason"]) == ("assistant", "message", "end_turn")
    assert saw["usage"] == [plain.usage["prompt_tokens"], plain.usage["completion_tokens"]]


def message_events(saw: Any, plain: PlainAnswers) -> None:
    """Anthropic's order of a streamed message."""
    assert saw["text"] == plain.chat
    kinds = [kind for kind in saw["kinds"] if kind != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert saw["stop_reason"] == "end_turn"
    assert [saw["input_tokens"], saw["output_tokens"]] == [
        plain.usage["prompt_tokens"], plain.usage["completion_tokens"],
    ]  # fmt: skip


def message_stopped(saw: Any, plain: PlainAnswers) -> None:
    assert saw["text"] == saw["before"]
    assert saw["stop_reason"] == "stop_sequence"
    assert saw["stopped_by_word"]


def message_call(saw: Any, plain: PlainAnswers) -> None:
    call(saw, plain)
    assert saw["stop_reason"] == "tool_use"


def message_refused(saw: Any, plain: PlainAnswers) -> None:
    """Anthropic's shape of an error, with the field's name in the message."""
    assert saw["type"] == "error"
    assert saw["error"]["type"] == "invalid_request_error"
    assert "temperature" in saw["error"]["message"]


def counted(saw: Any, plain: PlainAnswers) -> None:
    assert saw["counted"] == saw["used"] == plain.usage["prompt_tokens"]


def refused(saw: Any, plain: PlainAnswers) -> None:
    assert saw == {"param": "temperature", "code": "model_not_found"}


def agent_called(saw: Any, plain: PlainAnswers) -> None:
    """The agents SDK has run the tool and got a text for its result."""
    assert saw["kinds"][:2] == ["tool_call_item", "tool_call_output_item"]
    assert saw["kinds"][-1] == "message_output_item"


def agent_called_in_pieces(saw: Any, plain: PlainAnswers) -> None:
    assert saw["kinds"][:2] == ["tool_called", "tool_output"]
    assert saw["output"] == FLOW["tool_result"]


def graph(saw: Any, plain: PlainAnswers) -> None:
    assert saw["kinds"] == ["human", "ai", "tool", "ai"]
    assert saw["text"]


def _parsed(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _weather(arguments: Any) -> None:
    values = _parsed(arguments)
    assert sorted(values) == ["city", "days"]
    assert values["city"] in FLOW["tool"]["parameters"]["properties"]["city"]["enum"]
    assert values["days"] in (1, 2, 3)
