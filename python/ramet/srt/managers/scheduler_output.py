"""Owns what a request's new token means: whether it ends the request, and what is sent on of it."""

from collections.abc import Callable, Iterable, Sequence

from ramet.srt.managers.io_struct import (
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    FinishReason,
    RequestOutput,
    TokenizedGenerateReqInput,
)
from ramet.srt.managers.request_grammar import GrammarFailure
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.text.incremental_decode import IncrementalDecoder, TextStream, prompt_tail
from ramet.srt.text.tokenizer import Tokenizer

PROGRESS_S = 1.0  # of tokens after which an output is sent that is not streamed: metrics and logs know of it


class OutputProcessor:
    """Appends tokens, decides when a request ends and collects its unsent output."""

    def __init__(self, get_tokenizer: Callable[[], Tokenizer], eos_token_ids: Sequence[int], stream_interval: int):
        self.get_tokenizer = get_tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stream_interval = stream_interval

    def append_token(self, req: Req, token_id: int) -> None:
        """Add an output token to the request and set its finish reason if it is the last."""
        req.output_ids.append(token_id)
        req.finish_reason = self._finish_reason(req, token_id)

    def no_token_reason(self, req: Req) -> FinishReason:
        """Why a request ends for which no token could be chosen."""
        params, grammar = req.sampling_params, req.grammar
        banned = self.eos_token_ids.union(params.stop_token_ids)
        if grammar is not None and len(req.output_ids) < params.min_new_tokens and not grammar.allows_beyond(banned):
            text = f"{grammar.constraint.name} lets the output end before min_new_tokens ({params.min_new_tokens})"
            return FinishReason(type="abort", message=text, status_code=400, param="min_new_tokens")
        name = next((name for name in ("allowed_token_ids", "bad_words") if getattr(params, name)), None)
        if name is not None:
            text = f"{name} and what else the request asks for leave no token that could come next"
            return FinishReason(type="abort", message=text, status_code=400, param=name)
        message = "the model left no token to choose"
        return FinishReason(type="abort", message=message, status_code=500)

    def _finish_reason(self, req: Req, token_id: int) -> FinishReason | None:
        params = req.sampling_params
        num_tokens = len(req.output_ids)
        stop = self._matched_stop(req, token_id) if params.stop else None
        if num_tokens >= params.min_new_tokens and (
            token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos)
        ):
            req.ends_in_stop_token = True
            return FinishReason(type="stop", matched=token_id)
        if stop is not None:
            return FinishReason(type="stop", matched=stop)
        if req.grammar is not None and req.grammar.is_terminated:
            return FinishReason(type="stop", matched=token_id)
        if num_tokens >= params.max_new_tokens:
            return FinishReason(type="length", length=num_tokens)
        if req.grammar is not None and req.grammar.failure is not None:  # nothing more can follow
            return failure_reason(req.grammar.constraint.name, req.grammar.failure)
        return None

    def _matched_stop(self, req: Req, token_id: int) -> str | None:
        """The stop string that the newest token completed. The detokenizer decodes the same way, so that both agree."""
        if req.stop_stream is None:
            params = req.sampling_params
            tokenizer, skips = self.get_tokenizer(), params.skip_special_tokens
            tail = prompt_tail(tokenizer, req.origin_input_ids, skips)
            decoder = IncrementalDecoder(tokenizer, tail, skips)
            req.stop_stream = TextStream(decoder, params.stop, params.min_new_tokens)
        req.stop_stream.push([token_id])
        return req.stop_stream.matched

    def collect(self, req: Req) -> RequestOutput | None:
        """What the request has gained since its last output, or None if it is not yet time to send it."""
        return make_output(req) if req.finish_reason is not None or self._is_due(req) else None

    def _is_due(self, req: Req) -> bool:
        """The first token of a stream is never held back."""
        if not req.stream:
            return req.token_s is not None and req.token_s - req.sent_s >= PROGRESS_S
        return req.num_sent_tokens == 0 or len(req.output_ids) - req.num_sent_tokens >= self.stream_interval


class OutputSender:
    """Sends what requests have gained, and says of those that never ran why."""

    def __init__(self, processor: OutputProcessor, channel: SchedulerChannel):
        self.processor = processor
        self._channel = channel

    def send_news(self, reqs: Iterable[Req]) -> None:
        """Send what it is time to send of what the requests have gained."""
        outputs = (self.processor.collect(req) for req in reqs if not req.is_silent)
        self.send([output for output in outputs if output is not None])

    def send(self, outputs: list[RequestOutput]) -> None:
        """To the detokenizer; those without text straight to the tokenizer manager."""
        if tokens := [output for output in outputs if not output.is_pooled]:
            self._channel.send(BatchTokenIDOutput(outputs=tokens))
        if pooled := [output for output in outputs if output.is_pooled]:
            self._channel.reply(BatchEmbeddingOutput(outputs=pooled))


def make_output(req: Req) -> RequestOutput:
    """Everything that the request has gained since its last output; it counts as sent."""
    token_ids = req.output_ids[req.num_sent_tokens :]
    req.num_sent_tokens = len(req.output_ids)
    new_versions = req.versions[req.num_sent_versions :]
    req.num_sent_versions = len(req.versions)
    gaps_s, req.unsent_gaps_s = req.unsent_gaps_s, []
    if req.token_s is not None:
        req.sent_s = req.token_s
    input_logprobs, output_logprobs = req.logprobs.take()
    return RequestOutput(
        rid=req.rid,
        token_ids=token_ids,
        finish_reason=req.finish_reason,
        prompt_tokens=len(req.origin_input_ids),
        completion_tokens=len(req.output_ids),
        cached_tokens=req.cached_tokens,
        queue_time_s=req.queue_time_s,
        prefill_time_s=req.prefill_time_s,
        input_logprobs=input_logprobs,
        output_logprobs=output_logprobs,
        gaps_s=gaps_s,
        ends_in_stop_token=req.ends_in_stop_token,
        is_pooled=req.pooling is not None,
        vector=req.vector,
        new_versions=new_versions,
    )


def pooled_reason(vector: bytes) -> FinishReason:
    """Why a request with a pooling ends with its vector; see BatchResult."""
    if vector:
        return FinishReason(type="stop")
    return FinishReason(type="abort", message="the model's numbers are not finite", status_code=500)


def failure_reason(param: str, failure: GrammarFailure) -> FinishReason:
    """Why a request ended whose constraint, the parameter `param`, can't be followed."""
    return FinishReason(type="abort", message=failure.message, status_code=failure.status_code, param=param)


def aborted_reason() -> FinishReason:
    """Why a request ended whose client has gone."""
    return FinishReason(type="abort", message="aborted", status_code=499)


def refusal(message: TokenizedGenerateReqInput, reason: FinishReason, queue_time_s: float = 0.0) -> RequestOutput:
    """The output of a request that never ran."""
    return RequestOutput(
        rid=message.rid,
        token_ids=[],
        finish_reason=reason,
        prompt_tokens=len(message.input_ids),
        completion_tokens=0,
        cached_tokens=0,
        queue_time_s=queue_time_s,
        is_pooled=message.pooling is not None,
    )
