"""Owns what the routes share that generate nothing: from prompts to vectors, and their usage counts."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.entrypoints.openai.serving_base import OpenAIServing, version_metadata
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.prepare_requests import Limits, SequenceInput, check_task

MAX_JOINED_CHARS = 64 << 20  # of the prompts of one request together, in each of which the same text can stand
MAX_JOINED_IDS = 8 << 20


class PoolingServing(OpenAIServing):
    """The common part of the routes for embeddings, scores and ranks."""

    async def pool(
        self, prompts: Iterable[tuple[str, str | list[int]]], pooling: Pooling, add_special_tokens: bool = True
    ) -> list[RunningSequence]:
        """What has become of prompts, each given with its parameter's name: sequences with vectors.

        Raises:
            RequestError: if one can't be served.
            ServiceError: if the instance can't serve them, or somebody has aborted them.
        """
        inputs = pooled_inputs(prompts, pooling, add_special_tokens)
        for one in inputs:
            one.lora_name = self.lora_name
        generation = await self.manager.generate(inputs)
        return finished_vectors(await generation.finish())


def check_joined_size(
    queries: Sequence[str | list[int]], documents: Sequence[str | list[int]], name: str, other: str
) -> None:
    """Refuse what becomes too much when each query is put beside its document. Raises RequestError.

    Args:
        name, other: what the client calls queries and documents.
    """
    pairs = zip(queries, documents, strict=True)
    size = sum(len(query) + len(document) for query, document in pairs)
    is_text = isinstance(documents[0], str)
    if size > (MAX_JOINED_CHARS if is_text else MAX_JOINED_IDS):
        limit = f"{MAX_JOINED_CHARS} characters" if is_text else f"{MAX_JOINED_IDS} token ids"
        raise RequestError(f"{name}, put beside each of {other}, makes prompts of more than {limit}", param=name)


def pooled_inputs(
    prompts: Iterable[tuple[str, str | list[int]]], pooling: Pooling, add_special_tokens: bool = True
) -> list[SequenceInput]:
    """The inputs of a request that generates nothing."""
    return [
        SequenceInput(
            text=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            add_special_tokens=add_special_tokens,
            pooling=pooling,
            param=param,
        )
        for param, prompt in prompts
    ]


def finished_vectors(sequences: list[RunningSequence]) -> list[RunningSequence]:
    """The sequences. Raises ServiceError unless all have their vectors: an aborted one has nothing to show."""
    if not all(sequence.vector for sequence in sequences):
        raise ServiceError("the request was aborted")
    return sequences


def embedding_pooling(limits: Limits, dimensions: int | None, normalize: bool | None) -> Pooling:
    """What an embedding is made of: by the model's own files, where a request doesn't say it.

    Raises:
        RequestError: if the model makes none, or none of that length.
    """
    check_task(Pooling(), limits)
    config = limits.embedding
    assert config is not None
    if dimensions is not None and dimensions != limits.hidden_size:
        if not config.may_be_cut:
            raise RequestError(
                f"dimensions: the model's embeddings have {limits.hidden_size} and can't be cut", param="dimensions"
            )
        if config.dimensions and dimensions not in config.dimensions:
            allowed = ", ".join(map(str, (*config.dimensions, limits.hidden_size)))
            raise RequestError(f"dimensions must be one of {allowed} for this model", param="dimensions")
        if dimensions > limits.hidden_size:
            raise RequestError(f"dimensions must be at most {limits.hidden_size} for this model", param="dimensions")
    return Pooling(dimensions=dimensions, normalize=config.normalize if normalize is None else normalize)


def floats(vector: bytes) -> tuple[float, ...]:
    """The numbers of a vector, float32, lowest byte first."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def pooling_account(sequences: Sequence[RunningSequence]) -> dict[str, Any]:
    """Token counts of a request without output, and which weights have answered it."""
    num_tokens = sum(sequence.prompt_tokens for sequence in sequences)
    return {
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "metadata": version_metadata(sequences),
    }


def instruction_of(instruct: str | None, instruction: str | None) -> str | None:
    """The instruction, which goes by two names. Raises RequestError if both say something else."""
    if instruct is not None and instruction is not None and instruct != instruction:
        raise RequestError("instruct and instruction are two names of the same: give one", param="instruction")
    return instruction if instruct is None else instruct
