"""Owns the execution of batch plans on one rank: plan to tensors, forward pass, sampling. Decides nothing."""

from collections.abc import Sequence

import torch

from ramet.srt.layers.sampler import SamplingInfo, compute_logprobs, sample, uniform
from ramet.srt.model_executor.batch_plan import BatchPlan, BatchResult, LogprobRows
from ramet.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.penalties import SamplingRow, apply_logit_rules


class TpModelWorker:
    """One rank's model and the sampling state of the requests that run on it."""

    def __init__(self, model_runner: ModelRunner):
        self.model_runner = model_runner
        self._samples = model_runner.parallel.world_rank == model_runner.parallel.sampling_rank
        self._rows: dict[str, SamplingRow] = {}
        self._info_key: list[str] = []
        self._info: SamplingInfo | None = None

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> BatchResult | None:
        """Compute this rank's part of a pass; the tokens and log-probabilities if it is the rank that samples."""
        self._take_states(plan)
        batch = self._forward_batch(plan)
        hidden_states = self.model_runner.forward(batch)
        if hidden_states is None:
            return None
        result = BatchResult(token_ids=[], output_logprobs={}, prompt_logprobs={})
        self._add_prompt_logprobs(plan, hidden_states, result)
        sampled = [sequence.rid for sequence in plan.sequences if sequence.is_sampled]
        if sampled:
            logits = self.model_runner.compute_logits(hidden_states[batch.logits_rows])
            if self._samples:
                self._sample(sampled, logits, plan, result)
        return result if self._samples else None

    def _take_states(self, plan: BatchPlan) -> None:
        for rid in plan.ended_rids:
            self._rows.pop(rid, None)
        for state in plan.new_states:
            self._rows[state.rid] = SamplingRow(state)

    def _forward_batch(self, plan: BatchPlan) -> ForwardBatch:
        """The plan as tensors on the rank's device."""
        runner = self.model_runner
        for write in plan.page_writes:
            runner.req_pool.write(write.row, write.start, write.pages)
        device, page_size = runner.device, runner.page_size
        lens = [len(sequence.input_ids) for sequence in plan.sequences]
        starts = [sequence.start for sequence in plan.sequences]
        ends = [start + new for start, new in zip(starts, lens, strict=True)]
        input_ids = [token_id for sequence in plan.sequences for token_id in sequence.input_ids]
        if plan.is_decode:
            positions = torch.tensor(starts, dtype=torch.int64, device=device)
            sequence_of_token = torch.arange(len(starts), device=device)
        else:
            positions = torch.cat(
                [torch.arange(start, end, device=device) for start, end in zip(starts, ends, strict=True)]
            )
            sequence_of_token = torch.repeat_interleave(
                torch.arange(len(starts), device=device), torch.tensor(lens, device=device)
            )
        table_rows = torch.tensor([sequence.row for sequence in plan.sequences], dtype=torch.int64, device=device)
        block_tables = runner.req_pool.req_to_page[table_rows, : -(-max(ends) // page_size)]
        pages = block_tables[sequence_of_token, positions // page_size]
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE if plan.is_decode else ForwardMode.EXTEND,
            input_ids=torch.tensor(input_ids, dtype=torch.int64, device=device),
            positions=positions,
            out_cache_loc=pages * page_size + positions % page_size,
            block_tables=block_tables,
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            seq_lens_cpu=ends,
            extend_lens_cpu=lens,
            logits_rows=torch.tensor(_last_rows(plan, lens), dtype=torch.int64, device=device),
        )

    def _add_prompt_logprobs(self, plan: BatchPlan, hidden_states: torch.Tensor, result: BatchResult) -> None:
        first_row = 0
        for sequence in plan.sequences:
            if sequence.logprob_targets:
                start = first_row + sequence.logprob_offset
                result.prompt_logprobs[sequence.rid] = self.model_runner.prompt_logprobs(
                    hidden_states[start : start + len(sequence.logprob_targets)],
                    sequence.logprob_targets,
                    sequence.top_logprobs_num,
                )
            first_row += len(sequence.input_ids)

    def _sample(self, rids: list[str], logits: torch.Tensor, plan: BatchPlan, result: BatchResult) -> None:
        """Choose one token for each row of `logits`; note the log-probabilities that were asked for."""
        rows = [self._rows[rid] for rid in rids]
        asked = [index for index, row in enumerate(rows) if row.state.return_logprob]
        raw = logits[asked].clone() if asked else None
        apply_logit_rules(logits, rows, plan.grammar_masks, self.model_runner.model_config.eos_token_ids)
        uniforms = [uniform(row.state.seed, row.num_output_tokens) for row in rows]
        tokens = sample(logits, self._info_of(rids, rows), torch.tensor(uniforms, device=logits.device))
        result.token_ids = tokens.tolist()
        for row, token_id in zip(rows, result.token_ids, strict=True):
            row.append(token_id)
        if raw is not None:
            nums = [rows[index].state.top_logprobs_num for index in asked]
            logprobs = compute_logprobs(raw, tokens[asked], nums)
            for place, index in enumerate(asked):
                result.output_logprobs[rids[index]] = LogprobRows(
                    logprobs=[logprobs.logprobs[place]],
                    top_logprobs=[logprobs.top_logprobs[place]],
                    top_token_ids=[logprobs.top_token_ids[place]],
                )

    def _info_of(self, rids: list[str], rows: Sequence[SamplingRow]) -> SamplingInfo:
        """The requests' sampling parameters as tensors, made again only when the batch has changed."""
        if self._info is None or rids != self._info_key:
            self._info_key = rids
            self._info = SamplingInfo.from_params(
                [row.state.params for row in rows], self.model_runner.model_config.vocab_size, self.model_runner.device
            )
        return self._info


def _last_rows(plan: BatchPlan, lens: Sequence[int]) -> list[int]:
    """The row of the last new token of each sampled sequence."""
    rows = []
    end = 0
    for sequence, new in zip(plan.sequences, lens, strict=True):
        end += new
        if sequence.is_sampled:
            rows.append(end - 1)
    return rows
