"""Owns which fields of other servers' APIs a body may have that no route here reads, and at which values.

Every such field is taken where it says nothing: null, false, "", [] or {}. What else is taken of it the tables say, one
for each kind of object; docs/http.md shows them (`make docs`). A field that no table has is one that says something, as
soon as it is not empty, and is refused by its name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class ForeignField(NamedTuple):
    """A field that clients send and that nothing here depends on.

    `values` are those that are taken beside the empty ones; None: every value is.
    """

    name: str
    by: str  # whose API has it
    about: str
    values: tuple[Any, ...] | None = ()

    @property
    def is_free(self) -> bool:
        """Whether every value is taken."""
        return self.values is None

    def takes(self, value: Any) -> bool:
        """Whether the answer is the one that was asked for."""
        return self.values is None or is_empty(value) or any(_is_same(value, one) for one in self.values)


Table = Mapping[str, ForeignField]


def is_empty(value: Any) -> bool:
    """Whether a JSON value says nothing. 0 is not empty: a limit of 0 is one."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _table(*fields: ForeignField) -> Table:
    return {field.name: field for field in fields}


def _free(by: str, about: str, *names: str) -> list[ForeignField]:
    return [ForeignField(name, by, about, None) for name in names]


def _only(by: str, about: str, *names: str, values: tuple[Any, ...] = ()) -> list[ForeignField]:
    return [ForeignField(name, by, about, values) for name in names]


_OPENAI_ROUTES = (
    *_free("OpenAI", "who asks, for abuse reports", "user", "safety_identifier"),
    *_free("OpenAI", "kept with answers, which are not kept here", "metadata", "store"),
    *_free("OpenAI", "in which class of service", "service_tier"),
    *_free("OpenAI", "which cache to look into; there is one, and it is always looked into", "prompt_cache_key",
           "prompt_cache_retention"),
    *_free("SGLang, vLLM", "fast tokenizers have no such choice", "spaces_between_special_tokens"),
    *_free("SGLang", "what the server logs and measures", "log_metrics", "no_logs", "custom_labels"),
    *_free("vLLM", "there is one library for constrained output", "guided_decoding_backend"),
    *_only("vLLM", "white space between the parts of JSON", "guided_whitespace_pattern"),
    *_only("vLLM", "beam search", "use_beam_search"),
    *_only("vLLM", "beam search", "length_penalty", values=(1,)),
    *_only("vLLM", "cutting a prompt that is too long", "truncate_prompt_tokens"),
    *_only("vLLM", "separate prefix caches", "cache_salt"),
    *_only("SGLang", "separate prefix caches", "extra_key"),
    *_only("vLLM", "prefill and decode on several instances", "kv_transfer_params"),
    *_only("SGLang", "prefill and decode on several instances", "bootstrap_host", "bootstrap_port", "bootstrap_room",
           "bootstrap_pair_key", "decode_tp_size", "disagg_prefill_dp_rank"),
    *_only("SGLang", "choosing a replica", "data_parallel_rank", "routed_dp_rank"),
    *_only("vLLM", "code of the operator's", "vllm_xargs", "logits_processors"),
    *_only("SGLang", "code of the caller's", "custom_logit_processor", "custom_params"),
    *_only("SGLang", "adapters", "lora_path", "lora_id"),
    *_only("SGLang", "sessions", "session_params"),
    *_only("SGLang", "stop strings that are patterns", "stop_regex"),
    *_only("SGLang", "the model's insides in answers", "return_hidden_states", "return_routed_experts"),
    *_only("SGLang", "log-probabilities of a part of the prompt", "logprob_start_len", values=(-1,)),
)  # fmt: skip

CHAT = _table(
    *_OPENAI_ROUTES,
    *_free("OpenAI", "how long an answer is to be; the model decides", "verbosity"),
    *_only("OpenAI", "tools, by an older name", "functions"),
    *_only("OpenAI", "tools, by an older name", "function_call", values=("none", "auto")),
    *_only("vLLM", "a limit of the reasoning", "thinking_token_budget"),
    *_only("OpenAI", "what comes out beside text", "modalities", values=(["text"],)),
    *_only("OpenAI", "speech", "audio"),
    *_only("OpenAI", "a text that the answer may repeat", "prediction"),
    *_only("OpenAI", "a search in the web", "web_search_options"),
    *_only("vLLM", "documents for the template", "documents"),
    *_only("vLLM", "the last message in front of the answer", "echo"),
    *_only("vLLM, SGLang", "pictures, sound and films", "mm_processor_kwargs", "media_io_kwargs", "images_config",
           "use_audio_in_video", "max_dynamic_patch", "min_dynamic_patch"),
)  # fmt: skip

COMPLETIONS = _table(
    *_OPENAI_ROUTES,
    *_only("OpenAI", "the best of several outputs", "best_of", values=(1,)),
    *_only("OpenAI", "text behind the output", "suffix"),
    *_only("vLLM", "prompts as embeddings", "prompt_embeds"),
)

GENERATE = _table(
    *_free("SGLang", "what the server logs and measures", "log_metrics", "no_logs", "custom_labels",
           "validation_time", "received_time"),
    *_free("SGLang", "who asks", "conversation_id"),
    *_only("SGLang", "an answer that nobody waits for", "background"),
    *_only("SGLang", "what goes in beside text", "modalities", values=(["text"],)),
    *_only("SGLang", "pictures, sound and films", "image_data", "video_data", "audio_data"),
    *_only("SGLang", "prompts as embeddings", "input_embeds"),
    *_only("SGLang", "log-probabilities of chosen tokens", "token_ids_logprob"),
    *_only("SGLang", "the model's insides in answers", "return_hidden_states", "return_routed_experts",
           "return_entropy"),
    *_only("SGLang", "bytes in the place of text", "return_bytes"),
    *_only("SGLang", "adapters by their numbers", "lora_id"),
    *_only("SGLang", "sessions", "session_params"),
    *_only("SGLang", "code of the caller's", "custom_logit_processor"),
    *_only("SGLang", "prefill and decode on several instances", "bootstrap_host", "bootstrap_port", "bootstrap_room",
           "bootstrap_pair_key", "decode_tp_size", "disagg_prefill_dp_rank"),
    *_only("SGLang", "choosing a replica", "data_parallel_rank", "routed_dp_rank"),
    *_only("SGLang", "separate prefix caches", "extra_key"),
)  # fmt: skip

POOLING = _table(
    *_free("OpenAI", "who asks, for abuse reports", "user", "safety_identifier"),
    *_free("SGLang", "what the server logs and measures", "log_metrics", "no_logs"),
    *_only("vLLM", "which requests come first", "priority", values=(0,)),
    *_only("vLLM", "cutting a prompt that is too long", "truncate_prompt_tokens", "truncation_side"),
    *_only("Cohere", "cutting a document that is too long", "max_tokens_per_doc", "max_chunks_per_doc"),
    *_only("Jina", "embeddings of the parts of one text", "late_chunking"),
    *_only("Jina", "another kind of embedding", "task", "embedding_type"),
)

SAMPLING = _table(
    *_only("SGLang", "stop strings that are patterns", "stop_regex"),
    *_only("SGLang", "a constraint that begins at a tag", "structural_tag"),
    *_only("SGLang", "code of the caller's", "custom_params"),
    *_only("SGLang", "tokens between two events, which --stream-interval sets for all", "stream_interval"),
)

STREAM_OPTIONS = _table(*_free("OpenAI", "padding of events", "include_obfuscation"))

MESSAGE = _table(
    *_free("user interfaces", "what they know of a message", "id", "timestamp", "created_at"),
    *_free("OpenAI", "sources of an earlier answer", "annotations"),
    *_free("Anthropic, proxies", "up to where to cache; the prefix cache does so by itself", "cache_control"),
    *_only("OpenAI", "speech", "audio"),
    *_only("OpenAI", "a call, by an older name", "function_call"),
)
TEXT_PART = _table(
    *_free("Anthropic, proxies", "up to where to cache; the prefix cache does so by itself", "cache_control"),
    *_free("OpenAI", "sources of an earlier answer", "annotations"),
)
TOOL = _table(*_free("Anthropic, proxies", "up to where to cache; the prefix cache does so by itself", "cache_control"))
TOOL_CALL = _table(*_free("OpenAI", "place in the stream that the call came from", "index"))
STRUCTURED_OUTPUTS = _table(
    *_free("vLLM", "there is one library for constrained output", "disable_fallback"),
    *_only("vLLM", "white space between the parts of JSON", "disable_any_whitespace", "whitespace_pattern"),
    *_only("vLLM", "members that a schema does not name", "disable_additional_properties"),
    *_only("vLLM", "a constraint that begins at a tag", "structural_tag"),
)

# ---- Anthropic's routes ----

_CACHE = _free("Anthropic", "up to where to cache; the prefix cache does so by itself", "cache_control")

MESSAGES = _table(
    *_CACHE,
    *_free("Anthropic", "who asks, for abuse reports", "metadata", "user_profile_id"),
    *_free("Anthropic", "in which class of service, and who pays", "service_tier", "billing_policy"),
    *_free("Anthropic", "other models for what this one declines; it declines nothing", "fallbacks",
           "fallback_credit_token"),
    *_only("Anthropic", "in which class of service", "speed", values=("standard",)),
    *_only("Anthropic", "where in the world the answer is made", "inference_geo"),
    *_only("Anthropic", "a machine of the server's for tools", "container"),
    *_only("Anthropic", "tools of other servers", "mcp_servers"),
    *_only("Anthropic", "a summary in place of an answer", "compaction"),
    *_only("Anthropic", "parts of the conversation that the server leaves out", "context_management",
           values=({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})),
    *_only("Anthropic", "why the cache had no more", "diagnostics", values=({"previous_message_id": None},)),
)  # fmt: skip
TURN = _table(
    *_free("Anthropic", "what an answer has beside its content", "id", "type", "model", "stop_reason", "stop_sequence",
           "stop_details", "usage", "container", "diagnostics"),
    *_free("user interfaces", "what they know of a message", "timestamp", "created_at"),
    *_CACHE,
)  # fmt: skip
BLOCK = _table(*_CACHE)
TEXT_BLOCK = _table(
    *_CACHE,
    *_free("Anthropic", "sources of an earlier answer", "citations"),
    *_free("Anthropic's client", "what it has read in an earlier answer", "parsed_output"),
)
THINKING_BLOCK = _table(*_CACHE, *_free("Anthropic", "what an earlier answer was signed with", "signature"))
TOOL_USE_BLOCK = _table(*_CACHE, *_only("Anthropic", "who has called", "caller", values=({"type": "direct"},)))
CUSTOM_TOOL = _table(
    *_CACHE,
    *_free("Anthropic", "arguments are always streamed as they come", "eager_input_streaming"),
    *_only("Anthropic", "who may call", "allowed_callers", values=(["direct"],)),
    *_only("Anthropic", "a tool that the model has to search for", "defer_loading"),
    *_only("Anthropic", "examples of arguments", "input_examples"),
)
OUTPUT_CONFIG = _table(*_only("Anthropic", "a limit of tokens over several requests", "task_budget"))

# ---- /v1/responses ----

RESPONSES = _table(
    *_free("OpenAI", "in which class of service", "service_tier"),
    *_free("OpenAI", "how long a prefix is kept; the prefix cache keeps what it has room for",
           "prompt_cache_retention", "prompt_cache_options"),
    *_free("OpenAI", "a limit for tools that the server runs; it runs none", "max_tool_calls"),
    *_only("OpenAI", "dropping the beginning of an input that is too long", "truncation", values=("disabled",)),
    *_only("OpenAI", "an answer that nobody waits for", "background", "background_options"),
    *_only("OpenAI", "conversations that the server keeps; it keeps responses: previous_response_id", "conversation"),
    *_only("OpenAI", "prompts that the server keeps", "prompt"),
    *_only("OpenAI", "shortening a long conversation", "context_management"),
    *_only("OpenAI", "a check of what is said", "moderation"),
    *_only("OpenAI", "pictures", "image"),
)  # fmt: skip
RESPONSES_REASONING = _table(
    *_free("OpenAI", "a summary of the reasoning; none is made, the item has the reasoning itself", "summary",
           "generate_summary"),
    *_only("OpenAI", "which reasoning of earlier turns counts; the chat template decides", "context", values=("auto",)),
    *_only("OpenAI", "another way to reason", "mode", values=("standard",)),
)  # fmt: skip
RESPONSES_ITEM = _table(
    *_free("OpenAI", "how far the item had come, and who made it", "status", "created_by"),
    *_free("OpenAI", "whether a message was the answer or a word between", "phase"),
    *_only("OpenAI", "who calls", "caller", values=({"type": "direct"},)),
    *_only("OpenAI", "groups of tools", "namespace"),
    *_only("OpenAI", "calls that nobody waits for", "async"),
)
RESPONSES_PART = _table(
    *_free("OpenAI", "what is known of an earlier answer", "annotations", "logprobs"),
    *_free("OpenAI", "up to where to cache; the prefix cache does so by itself", "prompt_cache_breakpoint"),
)
RESPONSES_TOOL = _table(
    *_free("OpenAI", "what the function answers", "output_schema"),
    *_only("OpenAI", "who calls", "allowed_callers", values=(["direct"],)),
    *_only("OpenAI", "tools that are looked for", "defer_loading"),
    *_only("OpenAI", "calls that nobody waits for", "async"),
)
WEIGHT_UPDATE = _table(
    *_free("SGLang", "what the prefix cache holds of other weights, which is never used again", "flush_cache"),
    *_free("SGLang", "what has no effect there either", "is_async", "keep_pause", "token_step", "manifest"),
    *_free("SGLang", "memory that is given back, and graphs, which stay valid", "torch_empty_cache",
           "recapture_cuda_graph"),
    *_only("SGLang", "how files are read", "load_format", values=("auto", "safetensors")),
)  # fmt: skip
WEIGHTS_CHECKER = _table(
    *_only("SGLang", "tensors that are left out of a comparison", "skip_tensor_list"),
    *_only("SGLang", "a comparison of numbers; here bytes are compared", "allow_quant_error"),
)

TRANSFER = _table(*_free("vLLM", "how many buffers a trainer sends from", "packed_num_buffers"))

CONTINUE = _table(
    *_free("SGLang", "memory that its allocator holds back; a pause gives none away", "torch_empty_cache")
)

TABLES: Mapping[str, Table] = {
    "The body of `POST /v1/chat/completions`": CHAT,
    "The body of `POST /v1/completions`": COMPLETIONS,
    "The body of `POST /generate`": GENERATE,
    "`sampling_params` of `POST /generate`": SAMPLING,
    "The bodies of embeddings, scores and ranks": POOLING,
    "`stream_options`": STREAM_OPTIONS,
    "A message": MESSAGE,
    "A part of a message's content": TEXT_PART,
    "A tool in `tools`": TOOL,
    "A call in `tool_calls`": TOOL_CALL,
    "`structured_outputs`": STRUCTURED_OUTPUTS,
    "The bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`": MESSAGES,
    "A message there": TURN,
    "A block of text there": TEXT_BLOCK,
    "A block of thinking there": THINKING_BLOCK,
    "A block `tool_use` there": TOOL_USE_BLOCK,
    "Other blocks there": BLOCK,
    "A tool there": CUSTOM_TOOL,
    "`output_config`": OUTPUT_CONFIG,
    "The body of `POST /v1/responses`": RESPONSES,
    "`reasoning` of a response": RESPONSES_REASONING,
    "An item of a response's `input`": RESPONSES_ITEM,
    "A part of an item's content": RESPONSES_PART,
    "A tool of a response": RESPONSES_TOOL,
    "The body of `POST /continue_generation`": CONTINUE,
    "The bodies of updates of weights": WEIGHT_UPDATE,
    "`init_info` and `update_info` of vLLM's": TRANSFER,
    "The body of `POST /weights_checker`": WEIGHTS_CHECKER,
}
_BODIES = (
    CHAT,
    COMPLETIONS,
    GENERATE,
    SAMPLING,
    POOLING,
    MESSAGES,
    RESPONSES,
    CONTINUE,
    WEIGHT_UPDATE,
    WEIGHTS_CHECKER,
)
_PARTS = tuple(table for table in TABLES.values() if table not in _BODIES)


def without_foreign(body: Mapping[str, Any], known: Iterable[str], table: Table) -> dict[str, Any]:
    """The body without the fields that are neither known nor say anything that matters. Others stay, to be refused."""
    return {name: value for name, value in body.items() if name in known or not _is_taken(name, value, table)}


def _is_taken(name: str, value: Any, table: Table) -> bool:
    field = table.get(name)
    return is_empty(value) if field is None else field.takes(value)


def describe_refused(name: str, table: Table | None) -> str:
    """What stands behind the name of a field that is refused.

    Args:
        table: that of the body, or None for a field in a part of one, such as a message.
    """
    field = next((one[name] for one in ((table,) if table is not None else _PARTS) if name in one), None)
    if field is None:
        return "is unknown or not supported"
    values = "".join(f" or {value!r}".replace("'", '"') for value in field.values or ())
    return f"is not supported ({field.about}): it may be null{values}"


def foreign_schema(table: Table) -> dict[str, Any]:
    """JSON schema of the table's fields, and of those that nobody knows: what an object may have beside its own."""
    empty: list[Any] = [None, False, "", [], {}]
    return {
        "properties": {
            name: {"description": f"{field.by}'s: {field.about}."}
            | ({} if field.values is None else {"enum": [*empty, *field.values]})
            for name, field in table.items()
        },
        "additionalProperties": {"enum": empty},
    }
