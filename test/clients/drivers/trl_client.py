"""Owns what TRL does with a rollout server: its clients for vLLM's server, but for the weights themselves.

Those go by vLLM's NCCL engine, which TRL takes from vLLM and which needs a GPU. The clients need nothing else of vLLM:
they are told that it is there.
"""

import os
import sys

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torchvision_operators  # noqa: E402, F401 - before what imports torchvision
from accelerate import PartialState  # noqa: E402
from steps import URL, run, step  # noqa: E402
from trl.experimental.async_grpo.vllm_client import VLLMClient as AsyncClient  # noqa: E402
from trl.generation import vllm_client  # noqa: E402

vllm_client.is_vllm_available = lambda *_args, **_kwargs: True
PROMPTS = [list(range(10, 30)), list(range(40, 47))]
MESSAGES = [[{"role": "user", "content": "grow"}], [{"role": "user", "content": "grow a plant"}]]
GREEDY = {"temperature": 0.0, "max_tokens": 8, "generation_kwargs": {"ignore_eos": True}}


def client():
    return vllm_client.VLLMClient(base_url=URL, connection_timeout=30.0)


@step
def generate():
    return client().generate(PROMPTS, logprobs=0, **GREEDY)


@step
def generate_several():
    """Of each prompt, as GRPO does, with the likeliest other tokens."""
    return client().generate(PROMPTS, n=3, logprobs=2, temperature=0.0, max_tokens=4)


@step
def chat():
    return client().chat(MESSAGES, logprobs=1, **GREEDY)


@step
def score():
    """What a teacher's tokens are worth, by the model that has said them."""
    known = client().generate(PROMPTS, **GREEDY)["completion_ids"]
    sequences = [prompt + completion for prompt, completion in zip(PROMPTS, known, strict=True)]
    return client().get_sequence_logprobs(sequences, [len(prompt) for prompt in PROMPTS], top_logprobs=3)


@step
def score_unlikely():
    """Tokens that nobody has said: prompts, each from its third token on."""
    return client().get_sequence_logprobs(PROMPTS, [2, 2], top_logprobs=3)


@step
def server():
    """All that it asks before it sends weights, and after."""
    asked = client()
    asked.reset_prefix_cache()
    return {"info": asked.get_server_info(), "world_size": asked.get_world_size()}


@step
def control():
    """The asynchronous trainer's: it stops the server around each sync."""
    PartialState()  # as its trainer does, for the log
    asked = AsyncClient(URL)
    asked.wait_for_server_ready()
    asked.pause()
    asked.resume()
    return {
        "dtype": asked.get_dtype(), "max_model_len": asked.get_max_model_len(), "world_size": asked.get_world_size(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run())
