"""Owns what a rank must know of a request before it chooses its next token."""

import msgspec

from ramet.srt.sampling.sampling_params import SamplingParams


class SamplingState(msgspec.Struct, kw_only=True):
    """What the sampling rank must know of a request, sent before its first token."""

    rid: str
    params: SamplingParams
    seed: int
    prompt_ids: list[int]  # empty unless a penalty looks at the prompt
    output_ids: list[int]  # tokens that it has already, after a retraction
    return_logprob: bool
    top_logprobs_num: int
    bad_words_ids: list[list[int]] = []  # token sequences that the output must not have
