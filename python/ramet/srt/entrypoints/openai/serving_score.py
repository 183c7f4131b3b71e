"""Owns POST /v1/score in both its meanings: SGLang's, of labels behind texts, and vLLM's, of texts side by side."""

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.openai.pooling_protocol import Prompt, ScoreRequest, as_list, named
from ramet.srt.entrypoints.openai.serving_base import answer_head
from ramet.srt.entrypoints.openai.serving_pooling import check_joined_size, floats, instruction_of, pooling_account
from ramet.srt.entrypoints.openai.serving_rerank import PairServing
from ramet.srt.errors import RequestError

LABEL_FIELDS = ("query", "items", "label_token_ids")


class ScoreServing(PairServing):
    """The score route of one instance."""

    async def create(self, body: ScoreRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        self.choose_model(body.model)
        sides = body.given_sides
        given = [name for name in LABEL_FIELDS if getattr(body, name) is not None]
        if given and sides:
            raise RequestError(f"{given[0]} and {sides[0][0]} belong to different calls: give one", param=given[0])
        if len(sides) > 1:
            raise RequestError(f"{sides[0][0]} and {sides[1][0]} are names of the same: give one", param=sides[1][0])
        if not given and not sides:
            raise RequestError(
                "what to score must be given: query, items and label_token_ids, or queries and documents", param="query"
            )
        answer = self._score_pairs(body, *sides[0]) if sides else self._score_labels(body)
        return await until_disconnect(request, answer)

    async def _score_pairs(self, body: ScoreRequest, first: str, second: str) -> Response:
        """vLLM's: one text beside each of several, or as many beside as many."""
        for name in (first, second):
            if getattr(body, name) is None:
                raise RequestError(f"{name} must be given", param=name)
        queries, documents = getattr(body, first), getattr(body, second)
        names = [second] if isinstance(documents, str) else [f"{second}[{index}]" for index in range(len(documents))]
        queries = [queries] if isinstance(queries, str) else queries
        documents = [documents] if isinstance(documents, str) else documents
        if len(queries) not in (1, len(documents)):
            raise RequestError(
                f"{first} has {len(queries)} texts and {second} {len(documents)}: {first} must have one, or as many",
                param=first,
            )
        if len(queries) == 1:
            queries = queries * len(documents)
        instruction = instruction_of(body.instruct, body.instruction)
        scores, sequences = await self.score_pairs(queries, documents, instruction, names, first)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        head = answer_head("list", "score", self.model_name)
        return json_response({**head, "data": data, **pooling_account(sequences)})

    async def _score_labels(self, body: ScoreRequest) -> Response:
        """SGLang's: the probabilities of labels as the token behind the query and each item."""
        for name in LABEL_FIELDS:
            if getattr(body, name) is None:
                raise RequestError(f"{name} must be given", param=name)
        for name in ("instruct", "instruction"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} belongs to queries and documents, not to label_token_ids", param=name)
        labels = body.label_token_ids or []
        vocab_size = self.manager.limits.vocab_size
        if max(labels) >= vocab_size:
            raise RequestError(f"label_token_ids: token ids must be in [0, {vocab_size})", param="label_token_ids")
        items = _items(body)
        query: Any = body.query
        check_joined_size([query] * len(items), [item for _, item in items], "query", "items")
        prompts = [(name, _joined(query, item, bool(body.item_first))) for name, item in items]
        sequences = await self.pool(prompts, Pooling(label_token_ids=labels))
        scores = [_probabilities(sequence.vector, bool(body.apply_softmax)) for sequence in sequences]
        answer = {"scores": scores, "model": self.model_name, "object": "scoring"}
        return json_response({**answer, **pooling_account(sequences)})


def _items(body: ScoreRequest) -> list[tuple[str, Prompt]]:
    """Each item with what the client calls it."""
    return list(named("items", as_list(body.items), is_list=isinstance(body.items, list)))


def _joined(query: Any, item: Any, item_first: bool) -> Prompt:
    """The query with an item behind it, or in front of it."""
    if isinstance(query, str) != isinstance(item, str):
        raise RequestError("query and items must both be texts, or both be token ids", param="items")
    joined: Prompt = item + query if item_first else query + item
    return joined


def _probabilities(vector: bytes, apply_softmax: bool) -> list[float]:
    """Of the labels among all tokens; with `apply_softmax` among the labels alone, whose sum is then 1."""
    logprobs = floats(vector)
    best = max(logprobs) if apply_softmax else 0.0
    values = [math.exp(logprob - best) for logprob in logprobs]
    return [value / math.fsum(values) for value in values] if apply_softmax else values
