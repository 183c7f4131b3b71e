"""Owns SGLang's /encode: prompts to embeddings, in the shape of its native answers. `Engine` uses it, too."""

from typing import Any

from ramet.srt.entrypoints.generate_request import Output
from ramet.srt.entrypoints.openai.pooling_protocol import EncodeReqInput
from ramet.srt.entrypoints.openai.serving_pooling import embedding_pooling, finished_vectors, floats, pooled_inputs
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.tokenizer_manager import TokenizerManager


async def answer_encode(manager: TokenizerManager, body: EncodeReqInput) -> Output | list[Output]:
    """The embedding of each prompt; a list for a list of prompts.

    Raises:
        RequestError: that names what is wrong in the request.
        ServiceError: if the instance can't answer it.
    """
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("exactly one of text and input_ids must be given", param="text")
    pooling = embedding_pooling(manager.limits, body.dimensions, None)
    generation = await manager.generate(pooled_inputs(body.sized_prompts(), pooling), body.rid or None)
    outputs = [_output(sequence) for sequence in finished_vectors(await generation.finish())]
    return outputs if body.is_batch else outputs[0]


def _output(sequence: RunningSequence) -> dict[str, Any]:
    return {
        "embedding": list(floats(sequence.vector)),
        "meta_info": {
            "id": sequence.request.rid,
            "finish_reason": {"type": "stop"},
            "prompt_tokens": sequence.prompt_tokens,
            "cached_tokens": sequence.cached_tokens,
            "e2e_latency": sequence.e2e_latency_s,
            "weight_version": sequence.weight_version,
        },
    }
