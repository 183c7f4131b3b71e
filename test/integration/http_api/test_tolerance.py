"""What real clients send is taken, and what would change the answer is refused by its name."""

import json
from typing import Any

import httpx
import pytest
from http_answers import events, generate, repeated
from ramet.srt.entrypoints.http.answers import ChatCompletion, Completion
from ramet.srt.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: dict[str, Any] = {"role": "user", "content": "hello"}


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"messages": [USER], "max_tokens": 2} | fields)


def complete(http: httpx.Client, **fields: Any) -> Any:
    answer = http.post(COMPLETIONS, json={"prompt": "grow a", "max_tokens": 3} | fields)
    assert answer.status_code == 200, answer.text
    Completion.model_validate_json(answer.text)
    return answer.json()["choices"][0]


def refusal(answer: httpx.Response) -> tuple[str, str | None]:
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"], answer.json()["error"]["param"]


SENT_BACK: dict[str, Any] = {  # as the published client's model_dump() has it
    "role": "assistant", "content": "hi", "annotations": None, "audio": None, "function_call": None, "tool_calls": None,
    "refusal": None,
}  # fmt: skip
CALL = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
CHATS: dict[str, dict[str, Any]] = {
    "sglang-router": {"continue_final_message": False, "separate_reasoning": True, "stream_reasoning": True,
                      "return_hidden_states": False, "lora_path": None, "session_params": None, "rid": None},
    "openai": {"tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto", "reasoning_effort": "low",
               "store": True, "modalities": ["text"], "verbosity": "low", "prompt_cache_key": "k",
               "metadata": {"a": "b"},
               "safety_identifier": "s", "top_logprobs": 0, "seed": 2**63 - 1, "stream_options": None, "audio": None,
               "prediction": None, "web_search_options": None, "user": "u", "functions": [], "function_call": "auto"},
    "evaluation": {"reasoning_effort": None, "extra": None, "other": [], "another": {}, "more": "", "last": False},
    "vllm": {"use_beam_search": False, "length_penalty": 1.0, "add_generation_prompt": True, "documents": None,
             "echo": False, "priority": 0, "truncate_prompt_tokens": None, "cache_salt": None, "request_id": "r",
             "include_reasoning": True, "add_special_tokens": False, "spaces_between_special_tokens": True,
             "mm_processor_kwargs": None, "chat_template": None, "structured_outputs": {}, "stop": "",
             "logit_bias": {}, "response_format": {}},
    "empty stream options": {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    "messages": {"messages": [USER, SENT_BACK | {"content": None, "tool_calls": []},
                              USER | {"id": "1", "timestamp": 5, "created_at": "now"}, SENT_BACK,
                              SENT_BACK | {"content": None, "tool_calls": [CALL]},
                              {"role": "tool", "tool_call_id": "c", "content": "done", "cache_control": {"type": "e"}},
                              USER | {"tool_calls": [], "content": [
                                  {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}]},
}  # fmt: skip


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_chats_of_real_clients_are_taken(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = chat(http, **fields)
    assert answer.status_code == 200, answer.text
    if "messages" not in fields:
        answers = [one.json()["choices"] for one in (answer, chat(http))]
        assert answers[0] == answers[1]


def test_other_bodies_of_real_clients_are_taken(http: httpx.Client) -> None:
    complete(
        http,
        best_of=1,
        logprobs=False,
        return_hidden_states=False,
        lora_path=None,
        return_routed_experts=False,
        suffix=None,
    )
    output = generate(
        http, text="grow a", model=None, log_metrics=True, return_hidden_states=False, background=False, no_logs=False,
        return_bytes=False, return_entropy=False, lora_path=None, stream=None, return_logprob=None, image_data=None,
        sampling_params={"max_new_tokens": 3, "spaces_between_special_tokens": True, "stop_regex": [], "n": 1},
    )  # fmt: skip
    assert output["output_ids"] == generate(http, text="grow a", sampling_params={"max_new_tokens": 3})["output_ids"]
    assert http.post("/abort_request", json={"rid": "x", "abort_all": None, "abort_message": None}).status_code == 200
    assert http.post("/abort_request", json={"rid": "", "abort_all": True}).status_code == 200
    assert http.post("/abort_request", json={"rid": "", "abort_all": False}).status_code == 400


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"return_hidden_states": True}, "return_hidden_states is not supported (the model's insides"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities is not supported"),
        (CHAT, {"tool_choice": "required"}, "tool_choice: there are no tools to choose from"),
        (CHAT, {"thinking_token_budget": 0}, "thinking_token_budget is not supported"),
        (CHAT, {"unheard_of": 0}, "unheard_of is unknown or not supported"),
        (CHAT, {"messages": [USER | {"audio": {"id": "a"}}]}, "messages[0].audio is not supported"),
        (CHAT, {"stream": True, "stream_options": {"other": 1}}, "stream_options.other is unknown"),
        (CHAT, {"priority": 1}, "priority: requests have priorities only with --schedule-policy priority"),
        (CHAT, {"chat_template": "x"}, "chat_template: templates of requests are not taken here"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "only one of them can be true"),
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs are not there in a stream"),
        (CHAT, {"rid": "a", "request_id": "b"}, "rid and request_id are two names of the same, but differ"),
        (COMPLETIONS, {"best_of": 2}, "best_of is not supported (the best of several outputs): it may be null or 1"),
        (COMPLETIONS, {"guided_regex": "("}, "guided_regex can't be used"),
        (COMPLETIONS, {"structured_outputs": {"json": {"not": {}}}}, "structured_outputs can't be used"),
        (COMPLETIONS, {"guided_choice": ["a"], "regex": "b"}, "regex and guided_choice together"),
        (COMPLETIONS, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs would give"),
        (COMPLETIONS, {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag is not"),
        (COMPLETIONS, {"allowed_token_ids": [9999]}, "allowed_token_ids: token id 9999"),
        ("/generate", {"lora_id": "x"}, "lora_id is not supported (adapters by their numbers): it may be null"),
        (CHAT, {"lora_path": "x"}, "lora_path is not supported (adapters): it may be null"),
        ("/generate", {"sampling_params": {"stop_regex": "x"}}, "stop_regex is not supported"),
        ("/generate", {"background": True}, "background is not supported"),
        ("/tokenize", {"unheard_of": 1}, "unheard_of is unknown"),
        ("/tokenize", {"messages": [USER]}, "exactly one of prompt and messages"),
        ("/detokenize", {"tokens": [331]}, "token ids must be in [0, 331)"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(
    http: httpx.Client, path: str, fields: dict[str, Any], words: str
) -> None:
    prompts = {CHAT: {"messages": [USER]}, "/generate": {"text": "a"}, "/detokenize": {"tokens": [1]}}
    message, param = refusal(http.post(path, json=prompts.get(path, {"prompt": "a"}) | fields))
    assert words in message and param is not None and param in message


def test_a_model_may_be_left_out_but_not_be_another(http: httpx.Client) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "a"}), ("/generate", {"text": "a"}),
                       ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):  # fmt: skip
        assert [
            http.post(path, json=body | model).status_code for model in ({}, {"model": ""}, {"model": "other"})
        ] == [
            200,
            200,
            404,
        ]


# ---- what the fields do ----


def test_a_prompt_is_scored(http: httpx.Client, tokenizer: Tokenizer) -> None:
    choice = complete(http, max_tokens=0, echo=True, logprobs=1)
    assert choice["text"] == "grow a" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(tokenizer.encode("grow a")) - 1)
    params = {"max_new_tokens": 0}
    output = generate(http, text="grow a", sampling_params=params, return_logprob=True)
    assert output["output_ids"] == [] and output["meta_info"]["completion_tokens"] == 0
    assert [one[1] for one in output["meta_info"]["input_token_logprobs"]] == tokenizer.encode("grow a")
    assert chat(http, max_tokens=0).json()["choices"][0]["message"]["content"] == ""
    streamed = events(http, COMPLETIONS, {"prompt": "grow a", "max_tokens": 0, "echo": True, "stream": True})
    assert [(one["choices"][0]["text"], one["choices"][0]["finish_reason"]) for one in streamed] == [
        ("grow a", "length")
    ]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("is_last", [False, True])
def test_usage_in_every_event(http: httpx.Client, path: str, is_last: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": is_last}
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "grow a"}
    body = prompt | {"max_tokens": 6, "stream": True, "stream_options": options}
    found = events(http, path, body)
    counts = [one["usage"]["completion_tokens"] for one in found]
    assert counts == sorted(counts) and counts[0] <= 2 and counts[-1] == 6
    assert bool(found[-1]["choices"]) is not is_last


def test_token_ids_and_prompt_logprobs(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("grow a")
    choice = complete(http, max_tokens=2, return_token_ids=True, prompt_logprobs=2, logprobs=1)
    assert choice["prompt_token_ids"] == ids and choice["token_ids"] == ids[:2]
    assert [len(one) for one in choice["logprobs"]["top_logprobs"]] == [2, 2]  # and the token itself
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    entry = choice["prompt_logprobs"][1]
    assert entry[str(ids[1])] == {"logprob": -0.5, "rank": 3, "decoded_token": tokenizer.decode([ids[1]])}
    assert [one["rank"] for one in entry.values()] == [3, 1, 2], "the fake scheduler finds others likelier"
    answer = chat(http, return_token_ids=True, prompt_logprobs=0)
    ChatCompletion.model_validate_json(answer.text)
    content = answer.json()
    assert len(content["prompt_logprobs"]) == len(content["prompt_token_ids"]) == content["usage"]["prompt_tokens"]
    assert content["choices"][0]["logprobs"] is None and len(content["choices"][0]["token_ids"]) == 2
    for path, prompt in ((CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "grow a"})):
        body = prompt | {"max_tokens": 5, "return_token_ids": True}
        whole = http.post(path, json=body).json()
        streamed = events(http, path, body | {"stream": True})
        choices = [one["choices"][0] for one in streamed]
        assert sum((one.get("token_ids", []) for one in choices), []) == whole["choices"][0]["token_ids"]
        holders = streamed if path == CHAT else choices
        assert [one["prompt_token_ids"] for one in holders if "prompt_token_ids" in one] == [
            (whole if path == CHAT else whole["choices"][0])["prompt_token_ids"]
        ]


def test_the_stop_string_may_stay(http: httpx.Client, tokenizer: Tokenizer) -> None:
    prompt = "the quick brown fox"
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        fields = {"prompt": prompt, "max_tokens": 30, "stop": ["row"]}
        texts = [complete(http, **fields, **{name: keeps})["text"] for keeps in (False, True)]
        assert texts[1] == texts[0] + "row" and repeated(tokenizer, prompt, 30).startswith(texts[1])


def test_how_a_chat_becomes_a_prompt(http: httpx.Client) -> None:
    def num_tokens(**fields: Any) -> int:
        count = chat(http, **fields).json()["usage"]["prompt_tokens"]
        extra = {name: value for name, value in fields.items() if name != "max_tokens"}
        assert http.post("/tokenize", json={"messages": [USER]} | extra).json()["count"] == count
        return count

    assert num_tokens(add_generation_prompt=False) < num_tokens() == num_tokens(add_special_tokens=False)


def test_tokens_and_back(http: httpx.Client, tokenizer: Tokenizer) -> None:
    def ask(path: str, **body: Any) -> Any:
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    texts = ["grow a clone", "", "植物"]
    ids = [tokenizer.encode(text) for text in texts]
    for prefix in ("", "/v1"):
        one = ask(f"{prefix}/tokenize", prompt=texts[0], return_token_strs=True)
        assert one == {"tokens": ids[0], "count": len(ids[0]), "max_model_len": 256,
                       "token_strs": [tokenizer.token(token_id) for token_id in ids[0]]}  # fmt: skip
        several = ask(f"{prefix}/tokenize", prompt=texts)
        assert (several["tokens"], several["count"]) == (ids, [len(one) for one in ids])
        assert ask(f"{prefix}/detokenize", tokens=ids[0]) == {"text": texts[0], "prompt": tokenizer.decode(ids[0])}
        assert ask(f"{prefix}/detokenize", tokens=ids, skip_special_tokens=True) == {"text": texts, "prompt": texts}
    assert ask("/detokenize", tokens=[]) == {"text": "", "prompt": ""}
    many = [5, 6] * 20_000  # more values than the main process parses unseen
    assert len(ask("/detokenize", tokens=many)["text"]) > 20_000
    assert ask("/tokenize", prompt=["grow " * 2000] * 9, return_token_strs=True)["count"][8] > 2000
    assert http.post("/tokenize", json={"prompt": ["a" * (2 << 20)] * 3}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [5] * (1 << 18) + [6]}).status_code == 400


def test_one_of_some_texts(http: httpx.Client) -> None:
    """The fake scheduler obeys no constraint, but compiles it: that these can be."""
    for fields in ({"guided_choice": ["a|b", "c(", "\n"]}, {"structured_outputs": {"choice": ["x"]}},
                   {"guided_json": json.dumps({"type": "object"})}, {"guided_grammar": 'start: "a"'},
                   {"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}},
                   {"guided_json": {"type": "array", "uniqueItems": True}}):  # fmt: skip
        complete(http, **fields)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_where_cached_tokens_lay(http: httpx.Client, path: str, stream: bool) -> None:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    body = prompt | {"max_tokens": 2, "stream": stream, "return_cached_tokens_details": True}
    answer = http.post(path, json=body)
    if stream:
        *_, last, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert done == "[DONE]"
    content = json.loads(last) if stream else answer.json()
    assert content["sglext"] == {"cached_tokens_details": {"device": 0, "host": 0}}
    assert "sglext" not in http.post(path, json=prompt | {"max_tokens": 2}).json()


def test_tokens_by_their_ids(http: httpx.Client) -> None:
    """As TRL reads log-probabilities."""
    asked = {"max_tokens": 3, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = complete(http, logprobs=2, **asked)
    names = [f"token_id:{one}" for one in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names and len(names) == 3
    plain = complete(http, logprobs=2, max_tokens=3)["logprobs"]
    assert choice["logprobs"]["text_offset"] == plain["text_offset"]
    assert choice["logprobs"]["token_logprobs"] == plain["token_logprobs"]
    for name, top in zip(names, choice["logprobs"]["top_logprobs"], strict=True):
        assert name in top and all(one.removeprefix("token_id:").isdigit() for one in top) and len(top) == 3
    answer = http.post(CHAT, json={"messages": [USER], "logprobs": True, "top_logprobs": 2, **asked}).json()["choices"][
        0
    ]
    content = answer["logprobs"]["content"]
    assert [one["token"] for one in content] == [f"token_id:{one}" for one in answer["token_ids"]]
    assert all(top["token"].startswith("token_id:") for one in content for top in one["top_logprobs"])
    assert bytes(content[0]["bytes"]) and not bytes(content[0]["bytes"]).startswith(b"token_id")


def test_what_trainers_read_of_vllms_configuration(http: httpx.Client) -> None:
    assert "vllm_config" not in http.get("/server_info").json()
    config = http.get("/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert config["weight_transfer_config"] == {"backend": "nccl"} and config["model_config"]["dtype"].startswith(
        "torch."
    )
    assert config["parallel_config"]["tensor_parallel_size"] == 1
    assert http.get("/server_info", params={"config_format": "text"}).status_code == 400
