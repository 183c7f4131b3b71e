"""Owns POST /v1/rerank: documents in the order in which they answer a query, in Jina's and Cohere's shape."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.openai.pooling_protocol import RerankRequest
from ramet.srt.entrypoints.openai.reranker import NoReranker, Reranker
from ramet.srt.entrypoints.openai.serving_base import answer_head
from ramet.srt.entrypoints.openai.serving_pooling import (
    PoolingServing,
    check_joined_size,
    instruction_of,
    pooling_account,
)
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.tokenizer_manager import TokenizerManager

RENDER_THREADS = ThreadPoolExecutor(16, "reranker template")  # they only wait for another process


class PairServing(PoolingServing):
    """The common part of the routes that hold a query against a document."""

    def __init__(self, manager: TokenizerManager, model_name: str, reranker: Reranker | NoReranker):
        super().__init__(manager, model_name)
        self._reranker = reranker

    async def score_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        instruction: str | None,
        names: Sequence[str],
        query_name: str,
    ) -> tuple[list[float], list[RunningSequence]]:
        """How well each document answers its query, from 0 to 1, and the sequences that were computed for it.

        Args:
            names: what the client calls each document.
            query_name: what it calls the queries.

        Raises:
            RequestError: if the model is no reranker, or a prompt can't be made or served.
            ServiceError: if the instance can't serve it.
        """
        reranker = self._reranker
        if isinstance(reranker, NoReranker):
            raise RequestError(reranker.reason, param="model")
        check_joined_size(queries, documents, query_name, names[0].partition("[")[0])
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(RENDER_THREADS, reranker.prompts, queries, documents, instruction)
        pairs = zip(names, prompts, strict=True)
        sequences = await self.pool(pairs, reranker.pooling, add_special_tokens=False)  # the template has written them
        return [reranker.score(sequence.vector) for sequence in sequences], sequences


class RerankServing(PairServing):
    """The rerank route of one instance."""

    async def create(self, body: RerankRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        self.choose_model(body.model)
        return await until_disconnect(request, self._answer(body))

    async def _answer(self, body: RerankRequest) -> Response:
        documents = body.texts()
        names = [f"documents[{index}]" for index in range(len(documents))]
        instruction = instruction_of(body.instruct, body.instruction)
        queries = [body.query] * len(documents)
        scores, sequences = await self.score_pairs(queries, documents, instruction, names, "query")
        best = sorted(range(len(documents)), key=lambda index: -scores[index])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if body.return_documents is not False:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        head = answer_head("", "rerank", self.model_name)
        answer = {"id": head["id"], "model": self.model_name, "results": results}
        return json_response({**answer, **pooling_account(sequences)})
