"""What the tests of the HTTP API share: the fake scheduler's answers and how to ask."""

import json
from typing import Any

import httpx
from ramet.srt.entrypoints.http.answers import NativeOutput
from ramet.srt.text.tokenizer import Tokenizer


def repeated(tokenizer: Tokenizer, prompt: str, num_tokens: int) -> str:
    """What the fake scheduler makes of a prompt."""
    ids = tokenizer.encode(prompt)
    return tokenizer.decode([ids[place % len(ids)] for place in range(num_tokens)], skip_special_tokens=True)


def generate(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    for one in answer if isinstance(answer, list) else [answer]:
        NativeOutput.model_validate(one)
    return answer


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON events of a stream that must end with [DONE]."""
    with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
