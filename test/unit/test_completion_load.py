"""What the load generator makes of answers: good ones, and every way in which one can fail."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
from bench_mixed import third, token_times  # noqa: E402 - its folder is made importable above
from completion_load import Load, Outcome, Prompts, Request, done, evenly, poisson  # noqa: E402 - the same

USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def text_event(text: str, finish_reason: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


# The first token of a prompt says how it is answered.
ANSWERS = {
    10: [text_event("a"), text_event("b"), text_event("", "length"), USAGE, None],
    11: [text_event("", "length"), USAGE, None],  # tokens without a text
    12: [text_event("a", "length"), {"choices": [], "usage": {"completion_tokens": 1}}, None],
    13: [text_event("a"), text_event("b", "length"), USAGE],  # no [DONE]
    14: [text_event("a"), {"error": {"message": "it has died"}}, None],
    15: [None],
    16: 503,
    17: [text_event("a"), "half an event"],
}


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": "the model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["model"], body["stream"], body["ignore_eos"]) == ("the model", True, True)
        assert body["stream_options"] == {"include_usage": True}
        events = ANSWERS[body["prompt"][0]]
        if isinstance(events, int):
            self._answer(events, "full")
        else:
            self._answer(200, "".join(self._line(event) for event in events))

    def _line(self, event: dict | str | None) -> str:
        return f"data: {'[DONE]' if event is None else event if isinstance(event, str) else json.dumps(event)}\n\n"

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("parses_at_once", [False, True])
def test_what_counts_as_failed(url, parses_at_once):
    with Load(url) as load:
        outcomes = load.run([Request(f"{first},7", 2) for first in ANSWERS], parses_at_once)
    good, silent, short, unended, dead, empty, refused, garbled = outcomes
    assert done(outcomes) == [good, silent]
    assert (len(good.times), len(silent.times)) == (2, 1)
    assert 0 < good.ttft_s <= good.e2e_s and len(good.gaps()) == 1 and good.num_tokens == 2
    assert short.error == "1 tokens came, not 2"
    assert unended.error == "the stream has no end"
    assert "it has died" in dead.error
    assert empty.error == "0 tokens came, not 2"
    assert refused.error == "503: full"
    assert garbled.error.startswith("an event that can't be read")


def test_a_server_that_is_not_there():
    with pytest.raises(OSError, match="Cannot connect"), Load("http://127.0.0.1:9"):
        pass


def test_arrivals():
    prompts = Prompts(100, "a seed")
    arrivals = poisson(prompts, 50.0, 20.0, 3, 4, "short")
    assert arrivals[0].at_s == 0.0 and 800 < len(arrivals) < 1200
    assert all(later.at_s - one.at_s > 0 for one, later in zip(arrivals, arrivals[1:], strict=False))
    assert [one.at_s for one in evenly(prompts, 2.0, 2.0, 3, 4, "long")] == [0.5, 1.0, 1.5]
    ids = [int(word) for one in arrivals for word in one.prompt.split(",")]
    assert len(ids) == 3 * len(arrivals) and min(ids) == 10 and max(ids) == 99
    assert [one.prompt for one in poisson(Prompts(100, "a seed"), 50.0, 20.0, 3, 4, "")] == [
        one.prompt for one in arrivals
    ]


def outcome(sent_s: float, *times: float, error: str = "") -> Outcome:
    made = Outcome("short", len(times), sent_s, times[-1], num_tokens=len(times), error=error)
    made.times.extend(times)
    return made


def test_token_times_count_while_all_decode():
    outcomes = [outcome(0.0, 1.0, 1.25, 1.5, 1.75, 2.0), outcome(0.0, 1.25, 1.75, 2.25)]
    assert token_times(outcomes, settle_s=0.25) == [0.25, 0.25]  # between 1.5, and 2.0 where the first one ends


def test_a_third_of_a_long_run():
    outcomes = [outcome(0.0, 1.0, 2.0), outcome(1.0, 3.0, 5.0), outcome(2.0, 3.0, error="503: full")]
    first, last = third(outcomes, 0.0, 2.0), third(outcomes, 2.0, 6.0)
    assert (first["requests"], first["failed"], first["tokens_per_s"]) == (2, 0, 0.5)
    assert (last["requests"], last["failed"], last["tokens_per_s"]) == (1, 1, 0.75)
    assert first["itl"]["p99"] == 2000.0
