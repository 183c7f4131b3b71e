"""Owns POST /v1/embeddings: inputs to pooled prompts, and their vectors to OpenAI's answer."""

import asyncio
import base64
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.openai.pooling_protocol import EmbeddingRequest
from ramet.srt.entrypoints.openai.serving_pooling import PoolingServing, embedding_pooling, floats, pooling_account


class EmbeddingServing(PoolingServing):
    """The embeddings route of one instance."""

    async def create(self, body: EmbeddingRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        self.choose_model(body.model)
        return await until_disconnect(request, self._answer(body))

    async def _answer(self, body: EmbeddingRequest) -> Response:
        pooling = embedding_pooling(self.manager.limits, body.dimensions, body.normalize)
        add_special_tokens = body.add_special_tokens is not False
        sequences = await self.pool(body.sized_prompts(), pooling, add_special_tokens)
        data = []
        for index, sequence in enumerate(sequences):
            await asyncio.sleep(0)  # others have the event loop, too
            vector = sequence.vector
            shown: Any = base64.b64encode(vector).decode() if body.encoding_format == "base64" else floats(vector)
            item = {"object": "embedding", "index": index, "embedding": shown}
            data.append(msgspec.Raw(msgspec.json.encode(item)))
        answer = {"object": "list", "data": data, "model": self.model_name}
        return json_response({**answer, **pooling_account(sequences)})
