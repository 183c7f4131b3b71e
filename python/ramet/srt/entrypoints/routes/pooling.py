"""Owns the HTTP routes of requests that generate nothing: embeddings, scores, ranks."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.encode_request import answer_encode
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.openai.pooling_answers import (
    EmbeddingList,
    LabelScores,
    NativeEmbedding,
    Ranking,
    ScoreList,
)
from ramet.srt.entrypoints.openai.pooling_protocol import EmbeddingRequest, EncodeReqInput, RerankRequest, ScoreRequest
from ramet.srt.entrypoints.openai.serving_embedding import EmbeddingServing
from ramet.srt.entrypoints.openai.serving_rerank import RerankServing
from ramet.srt.entrypoints.openai.serving_score import ScoreServing


def make_pooling_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["embeddings"], responses=ERRORS | NOT_FOUND)

    @router.post("/v1/embeddings", responses={200: {"model": EmbeddingList}})
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """The embedding of one or several texts."""
        return await EmbeddingServing(instance.manager, instance.server_args.model_name).create(body, request)

    @router.post("/encode", responses={200: {"model": NativeEmbedding | list[NativeEmbedding]}})
    async def encode(body: EncodeReqInput, request: Request) -> Response:
        """The embedding of one or several prompts, in SGLang's native shape."""

        async def answer() -> Response:
            return json_response(await answer_encode(instance.manager, body))

        return await until_disconnect(request, answer())

    @router.post("/v1/score", responses={200: {"model": LabelScores | ScoreList}})
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How likely labels are behind a query and each item; or how well documents answer queries."""
        model_name = instance.server_args.model_name
        return await ScoreServing(instance.manager, model_name, instance.reranker).create(body, request)

    @router.post("/v1/rerank", responses={200: {"model": Ranking}})
    @router.post("/v2/rerank", responses={200: {"model": Ranking}})
    @router.post("/rerank", responses={200: {"model": Ranking}})
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Documents in the order in which they answer a query."""
        model_name = instance.server_args.model_name
        return await RerankServing(instance.manager, model_name, instance.reranker).create(body, request)

    return router
