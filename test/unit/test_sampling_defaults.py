"""A model's generation_config.json gives the defaults of sampling, a request's own values win, bad ones are named."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from ramet.srt.entrypoints.generate_request import GenerateReqInput
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from ramet.srt.entrypoints.openai.serving_base import OpenAIServing
from ramet.srt.managers.prepare_requests import Limits
from ramet.srt.sampling.sampling_defaults import read_sampling_defaults
from ramet.srt.sampling.sampling_params import SamplingParams, parse_sampling_params

FILE = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}


def read(folder: Path, content: Any) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_sampling_defaults(str(folder), 100)


def test_what_counts_and_what_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_sampling_defaults(str(tmp_path), 100) == {}
    with caplog.at_level(logging.INFO):
        content = {
            **FILE,
            "do_sample": False,
            "max_new_tokens": 9,
            "eos_token_id": 2,
            "num_beams": 4,
            "typical_p": None,
        }
        assert read(tmp_path, content) == FILE
    assert caplog.messages[-1].endswith("ignored: do_sample, max_new_tokens, num_beams")
    assert read(tmp_path, {"temperature": None, "top_k": 50.0}) == {"top_k": 50.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "0.6"), ("top_k", 1.5), ("top_k", -2), ("top_p", 0), ("top_p", 1.5),
     ("min_p", 2), ("repetition_penalty", 0), ("temperature", True), ("top_p", [0.9]), ("temperature", float("nan"))],
)  # fmt: skip
def test_bad_values_are_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name}"):
        read(tmp_path, {name: value})


def test_a_requests_own_value_wins() -> None:
    assert parse_sampling_params({}, 100, FILE) == SamplingParams(**FILE)
    params = parse_sampling_params({"temperature": 0, "top_k": None, "top_p": 1}, 100, FILE)
    assert (params.temperature, params.top_k, params.top_p) == (0, 20, 1)
    assert parse_sampling_params({}, 100, {"temperature": 0.0, "top_k": 0}).top_k == -1


def test_every_route_has_them() -> None:
    limits = Limits(vocab_size=100, max_req_len=50, has_eos=True, grammars=True, sampling_defaults=FILE)
    native = GenerateReqInput.make(input_ids=[[5], [6]], sampling_params=[{}, {"top_k": 7}]).sequence_inputs(limits)
    assert [one.sampling_params.top_k for one in native] == [20, 7]
    assert native[0].sampling_params.temperature == 0.6

    class Manager:
        pass

    manager: Any = Manager()
    manager.limits = limits
    serving = OpenAIServing(manager, "m")
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for body in (CompletionRequest(model="m", prompt="x"), ChatCompletionRequest(**chat)):
        params = serving.sampling_params(body, 5, None)
        assert {name: getattr(params, name) for name in FILE} == FILE
    for body in (
        CompletionRequest(model="m", prompt="x", temperature=1.0),
        ChatCompletionRequest(**chat, temperature=1.0, top_p=None),
    ):
        params = serving.sampling_params(body, 5, None)
        assert (params.temperature, params.top_p) == (1.0, 0.95)
