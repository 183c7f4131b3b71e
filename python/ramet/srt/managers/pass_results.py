"""Owns what becomes of a pass's results: tokens, log-probabilities and vectors go to their requests, or to nobody."""

from collections.abc import Callable, Mapping

from ramet.srt.layers.sampler import INVALID_TOKEN
from ramet.srt.managers.admission import Admission
from ramet.srt.managers.grammar_steps import ChosenToken, GrammarSteps
from ramet.srt.managers.io_struct import FinishReason
from ramet.srt.managers.passes import FinishedPass
from ramet.srt.managers.running_requests import RunningRequests
from ramet.srt.managers.schedule_batch import Req, ScheduleBatch
from ramet.srt.managers.scheduler_output import OutputSender, pooled_reason
from ramet.srt.managers.throughput import Throughput
from ramet.srt.managers.token_budget import TokenBudget


class PassResults:
    """Takes results in, in the order of the passes, and ends the requests that are done."""

    def __init__(
        self,
        running: RunningRequests,
        admission: Admission,
        grammar_steps: GrammarSteps,
        budget: TokenBudget,
        sender: OutputSender,
        clock: Callable[[], float],
    ):
        self._running = running
        self._admission = admission
        self._grammar_steps = grammar_steps
        self._budget = budget
        self._sender = sender
        self._clock = clock
        self.throughput = Throughput()

    def take(self, finished: FinishedPass) -> None:
        """Give what a pass has made to its requests: tokens, log-probabilities, vectors. End those that are done.

        A request that has ended since the pass was queued drops its token.
        """
        batch, result = finished.batch, finished.result
        self._budget.observe(finished.seconds, batch.num_prompt_tokens)
        if result.prompt_logprobs:
            for running, sequence in zip(batch.reqs, finished.plan.sequences, strict=True):
                if (rows := result.prompt_logprobs.get(running.req.rid)) is not None:
                    running.req.logprobs.add_prompt(sequence.logprob_targets, rows)
        chosen = [
            ChosenToken(running, token_id, result.output_logprobs.get(running.req.rid), batch.weight_version)
            for running, token_id in zip(batch.sampled_reqs, result.token_ids, strict=True)
        ]
        self._take_tokens([one for one in chosen if not self._is_for_grammar(one)])
        if batch.pooled_reqs:
            self._take_vectors(batch, result.vectors)

    def collect_tokens(self) -> None:
        """Give requests the tokens that their constraints have taken."""
        if chosen := self._grammar_steps.collect():
            self._take_tokens(chosen)

    def _is_for_grammar(self, chosen: ChosenToken) -> bool:
        """Whether a constraint has to take the token first, which is told of it then."""
        req = chosen.running.req
        if req.grammar is None or req.finish_reason is not None or chosen.token_id == INVALID_TOKEN:
            return False
        if req.sampling_params.max_new_tokens == 0:
            return False
        self._grammar_steps.begin(chosen)
        return True

    def _take_tokens(self, tokens: list[ChosenToken]) -> None:
        gaining: list[Req] = []
        now_s = self._clock()
        for chosen in tokens:
            running, req = chosen.running, chosen.running.req
            running.num_pending -= 1
            if req.finish_reason is None:
                self._take_token(req, chosen, now_s)
                if req.finish_reason is not None:
                    self._running.end(running)
                elif running.is_parked:
                    self._admission.put(req)
                gaining.append(req)
        self._running.drop_ended()
        self.throughput.add(len(gaining))
        self._sender.send_news(gaining)

    def _take_token(self, req: Req, chosen: ChosenToken, now_s: float) -> None:
        req.note_version(chosen.weight_version)
        self._admission.note_first_token(req)
        if req.sampling_params.max_new_tokens == 0:  # nobody wants a token: the prompt has been computed
            req.finish_reason = FinishReason(type="length", length=0)
            return
        processor = self._sender.processor
        if chosen.token_id == INVALID_TOKEN:
            req.finish_reason = processor.no_token_reason(req)
            return
        processor.append_token(req, chosen.token_id)
        req.note_token_time(now_s)
        if req.return_logprob:
            assert chosen.logprobs is not None
            req.logprobs.add_output(chosen.token_id, chosen.logprobs)

    def _take_vectors(self, batch: ScheduleBatch, vectors: Mapping[str, bytes]) -> None:
        """End the requests whose vectors a pass has given."""
        ended: list[Req] = []
        for running in batch.pooled_reqs:
            running.num_pending -= 1
            req = running.req
            if req.finish_reason is None:
                req.note_version(batch.weight_version)
                self._admission.note_first_token(req)
                req.vector = vectors[req.rid]
                req.finish_reason = pooled_reason(req.vector)
                self._running.end(running)
                ended.append(req)
        self._running.drop_ended()
        self._sender.send_news(ended)
