"""Asks /generate for greedy tokens twice, and compares them and their log-probabilities with what is expected."""

import httpx
import pytest


def check_generate_twice(server, prompts, num_tokens, expected, logprobs):
    """Tokens and log-probabilities, by HTTP; twice, as the second time most of it comes from the cache.

    Returns:
        How many of the first prompt's tokens did, the second time.
    """
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    for _ in range(2):
        answers = httpx.post(f"{server.url}/generate", json=body, timeout=120).json()
        assert [answer["output_ids"] for answer in answers] == expected
        for answer, wanted in zip(answers, logprobs, strict=True):
            got = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
            assert got == pytest.approx(wanted, abs=1e-4)
    return answers[0]["meta_info"]["cached_tokens"]
