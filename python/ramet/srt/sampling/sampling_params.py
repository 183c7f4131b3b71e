"""Owns a request's sampling parameters: their defaults, ranges and meaning. No torch."""

import msgspec


class SamplingParams(msgspec.Struct, kw_only=True):
    """How to choose a sequence's tokens and when to stop, already validated and resolved.

    The names and defaults are those of SGLang's /generate.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    sampling_seed: int | None = None
    n: int = 1
    regex: str | None = None
    json_schema: str | None = None
    ebnf: str | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
