"""Owns the description of the answers of routes that generate nothing, for the OpenAPI page."""

from typing import Literal

from ramet.srt.entrypoints.http.answers import Answer, AnswerMetadata


class PoolingUsage(Answer):
    """Token counts of a request without output."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    """One embedding: numbers, or float32 with the lowest byte first, in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Answer):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PoolingUsage
    metadata: AnswerMetadata


class StopReason(Answer):
    """Why an embedding ended: it is whole."""

    type: Literal["stop"]


class EncodeMetaInfo(Answer):
    """What is known about an embedding besides its numbers."""

    id: str
    finish_reason: StopReason
    prompt_tokens: int
    cached_tokens: int
    e2e_latency: float
    weight_version: str


class NativeEmbedding(Answer):
    """One answer of /encode."""

    embedding: list[float]
    meta_info: EncodeMetaInfo


class Score(Answer):
    """How well two texts fit together, from 0 to 1."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(Answer):
    """The answer of /v1/score to two sides."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    metadata: AnswerMetadata


class LabelScores(Answer):
    """The answer of /v1/score to labels: for each item the labels' probabilities."""

    scores: list[list[float]]
    model: str
    usage: PoolingUsage
    metadata: AnswerMetadata
    object: Literal["scoring"]


class RankedText(Answer):
    """A document."""

    text: str


class RankedDocument(Answer):
    """A document's place in the request, and how well it answers the query, from 0 to 1."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Answer):
    """The answer of /v1/rerank: the best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: PoolingUsage
    metadata: AnswerMetadata
