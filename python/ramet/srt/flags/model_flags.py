"""Owns the flags about the model: where it is, what it is called, how its text is read."""

import dataclasses
from dataclasses import dataclass

from ramet.srt.configs.kv_cache_config import KV_CACHE_DTYPES
from ramet.srt.configs.parser_config import REASONING_PARSERS, TOOL_CALL_PARSERS
from ramet.srt.flags.flag import COUNT, flag

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("fp8",)  # while plain weights are read
SAMPLING_DEFAULTS = ("model", "openai")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is served."""

    model_path: str = flag(dataclasses.MISSING, "Folder or Hugging Face hub id of the model.", aliases=("--model",))
    tokenizer_path: str | None = flag(None, "Folder or hub id of the tokenizer; the model's when not given.")
    served_model_name: tuple[str, ...] = flag(
        (),
        "Name of the model in the API, or several: the first is the one that metrics and metadata servers know; the "
        "model path when not given.",
        several=True,
    )
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.")
    dtype: str = flag("auto", "Type of the weights and activations; auto takes the checkpoint's.", choices=DTYPES)
    quantization: str | None = flag(
        None,
        "Type of the linear layers' and experts' weights: fp8 quantises them while they load; "
        "the checkpoint's when not given.",
        choices=QUANTIZATIONS,
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of the keys and values in the KV cache: auto takes that of the activations; fp8_e4m3 holds twice as many "
        "tokens, with the scales of the checkpoint where it has some.",
        choices=KV_CACHE_DTYPES,
    )
    context_length: int | None = flag(
        None, "Longest prompt plus output in tokens; the model's when not given.", limit=COUNT
    )
    chat_template: str | None = flag(None, "File with a Jinja chat template that replaces the model's.")
    trust_request_chat_template: bool = flag(
        False, "Let a request bring its own chat template (`chat_template`); the template's limits hold for it, too."
    )
    tool_call_parser: str = flag(
        "auto",
        "How the model writes tool calls: auto goes by its chat template, none leaves them in the answer's text.",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = flag(
        "auto",
        "How the model writes what it thinks before it answers: auto goes by its chat template, none leaves it in the "
        "answer's text.",
        choices=REASONING_PARSERS,
    )
    is_embedding: bool = flag(
        False,
        "Make embeddings of prompts, and nothing else. A model whose modules.json pools its last token does so anyway.",
    )
    classifier_from_token: str | None = flag(
        None,
        "Rank texts by the token that the model would answer with: the one for an irrelevant document and that for a "
        "relevant one, joined by a comma (no,yes). Not needed for a model whose modules.json names them.",
    )
    sampling_defaults: str = flag(
        "model",
        "Where temperature, top_k, top_p, min_p and repetition_penalty of a request come from that doesn't give them: "
        "the model's generation_config.json, or OpenAI's defaults, which sample from all tokens.",
        choices=SAMPLING_DEFAULTS,
    )
    random_seed: int = flag(0, "Seed of dummy weights and of the sampling seeds given to requests without one.")
