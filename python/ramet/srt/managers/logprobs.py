"""Owns a request's log-probabilities on their way from the passes that give them to the outputs that show them."""

from collections.abc import Sequence

from ramet.srt.batch.batch_plan import LogprobRows
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput, TokenLogprobs


def no_logprobs() -> TokenLogprobs:
    return TokenLogprobs(logprobs=[], token_ids=[], top_logprobs=[], top_token_ids=[])


def extend_logprobs(total: TokenLogprobs, token_ids: Sequence[int], rows: LogprobRows | TokenLogprobs) -> None:
    """Append the log-probabilities of `token_ids`."""
    total.logprobs += rows.logprobs
    total.token_ids += token_ids
    total.top_logprobs += rows.top_logprobs
    total.top_token_ids += rows.top_token_ids
    total.ranks += rows.ranks


def split_rows(rids: Sequence[str], rows: LogprobRows) -> dict[str, LogprobRows]:
    """Each request's row."""
    return {
        rid: LogprobRows(logprobs=[logprob], top_logprobs=[top], top_token_ids=[top_ids])
        for rid, logprob, top, top_ids in zip(rids, rows.logprobs, rows.top_logprobs, rows.top_token_ids, strict=True)
    }


class UnsentLogprobs:
    """What a request has asked for and got, and nobody has been sent."""

    def __init__(self, message: TokenizedGenerateReqInput):
        self._wants_output = message.return_logprob
        self._is_prompt_due = message.return_logprob and message.logprob_start_len >= 0
        # The first token of a prompt has none, but stands there.
        self._first_ids = message.input_ids[:1] if message.logprob_start_len == 0 else []
        self._output = no_logprobs()
        self.forget_prompt()

    def forget_prompt(self) -> None:
        """The prompt is computed from its beginning."""
        self._prompt = no_logprobs()
        if self._is_prompt_due and self._first_ids:
            first = TokenLogprobs(
                logprobs=[None], token_ids=self._first_ids, top_logprobs=[[]], top_token_ids=[[]], ranks=[0]
            )
            self.add_prompt(first.token_ids, first)

    def add_prompt(self, token_ids: Sequence[int], rows: LogprobRows | TokenLogprobs) -> None:
        """Add those of the next prompt tokens."""
        extend_logprobs(self._prompt, token_ids, rows)

    def add_output(self, token_id: int, rows: LogprobRows) -> None:
        """Add that of the newest output token."""
        extend_logprobs(self._output, [token_id], rows)

    def take(self) -> tuple[TokenLogprobs | None, TokenLogprobs | None]:
        """Those of the prompt, which are sent once, and of the output tokens; None stands for what isn't to be sent."""
        prompt = self._prompt if self._is_prompt_due else None
        if not self._wants_output:
            return prompt, None
        output, self._output = self._output, no_logprobs()
        self._prompt, self._is_prompt_due = no_logprobs(), False
        return prompt, output
