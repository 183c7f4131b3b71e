"""Owns the execution of batch plans on one rank: plan to tensors, forward pass, sampling. Decides nothing."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from ramet.srt.batch.batch_plan import LAST_TOKEN, BatchPlan, BatchResult
from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.sampler import LogprobTensors, SamplingInfo, compute_logprobs, sample, uniforms_of
from ramet.srt.managers.logprobs import split_rows
from ramet.srt.managers.rank_profiler import RankProfiler, Wait, in_sight
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.penalties import SamplingRow, apply_logit_rules
from ramet.srt.utils.device import HostCopies, to_device


class TpModelWorker:
    """One rank's model and the sampling state of the requests that run on it."""

    def __init__(self, model_runner: ModelRunner):
        self.model_runner = model_runner
        self.device = model_runner.device
        self.profiler = RankProfiler(model_runner.parallel.world_rank, self.device, model_runner.finish_sending)
        self._rows: dict[str, SamplingRow] = {}
        self._info_rows: list[SamplingRow] = []
        self._info: SamplingInfo | None = None
        # A decode pass takes its input from here, before the host has seen it.
        self._last_tokens = model_runner.req_pool.last_tokens

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> None:
        """Queue this rank's part of a pass on the device, where another rank reports its result."""
        if self.profiler.is_recording:
            self.profiler.record(plan, self._launch)
        else:
            self._launch(plan)

    @torch.inference_mode()
    def launch_for_result(self, plan: BatchPlan) -> Wait:
        """The same on the rank that reports its replica's results: the function returned waits for this pass's."""
        is_recording = self.profiler.is_recording
        wait = self.profiler.record(plan, self._launch) if is_recording else self._launch(plan)
        if wait is None:
            raise RuntimeError("the tokens are chosen in the last pipeline stage, which this rank is not in")
        return in_sight(wait) if is_recording else wait

    def _launch(self, plan: BatchPlan) -> Wait | None:
        """Compute this rank's part; the tokens, where it is the last one's, can be waited for."""
        for rid in plan.ended_rids:
            self._rows.pop(rid, None)
        for state in plan.new_states:
            self._rows[state.rid] = SamplingRow(state)
        self.model_runner.req_pool.write(plan.page_writes)
        result = BatchResult(token_ids=[], output_logprobs={}, prompt_logprobs={})
        sampled = [sequence for sequence in plan.sequences if sequence.is_sampled]
        if plan.is_decode:
            last_hidden_states = self._decode(plan)
        else:
            batch = self._extend_batch(plan)
            hidden_states = self.model_runner.forward(batch)
            last_hidden_states = None
            if hidden_states is not None:
                self._add_prompt_logprobs(plan, hidden_states, result)
                last_hidden_states = hidden_states[batch.logits_rows]
        if last_hidden_states is None:  # they go on to the next pipeline stage
            return None
        if not sampled:
            return lambda: result
        logits = self.model_runner.compute_logits(last_hidden_states)
        return self._sample([s.rid for s in sampled], [s.row for s in sampled], logits, plan, result)

    def _decode(self, plan: BatchPlan) -> torch.Tensor | None:
        """Hidden states [batch_size, hidden_size] of one new token for each sequence, in the last pipeline stage."""
        table_rows = [sequence.row for sequence in plan.sequences]
        known = [s for s in plan.sequences if s.input_ids[0] != LAST_TOKEN]
        if known:
            new = [[s.row for s in known], [s.input_ids[0] for s in known]]
            places, tokens = to_device(new, torch.int64, self.device)
            self._last_tokens.index_copy_(0, places, tokens)
        starts = [sequence.start for sequence in plan.sequences]
        return self.model_runner.decode(table_rows, starts, self._own_sequences(plan))

    def _own_sequences(self, plan: BatchPlan) -> slice:
        """The sequences whose attention this rank computes: all, unless attention is data-parallel."""
        parallel = self.model_runner.parallel
        if parallel.attn_dp_size == 1:
            return slice(0, len(plan.sequences))
        groups = [sequence.group for sequence in plan.sequences]
        return slice(bisect_left(groups, parallel.attn_dp_rank), bisect_right(groups, parallel.attn_dp_rank))

    def _extend_batch(self, plan: BatchPlan) -> ForwardBatch:
        """New tokens of several sequences, prompt chunks and single ones, as tensors on the device."""
        runner = self.model_runner
        all_lens = [len(sequence.input_ids) for sequence in plan.sequences]
        own = self._own_sequences(plan)
        sequences, lens = plan.sequences[own], all_lens[own]
        ends = [sequence.start + new for sequence, new in zip(sequences, lens, strict=True)]
        first_token = sum(all_lens[: own.start])
        flat_ids = np.concatenate([np.asarray(sequence.input_ids, dtype=np.int64) for sequence in plan.sequences])
        tokens = np.stack(
            [
                np.concatenate(
                    [np.arange(0), *(np.arange(end - new, end) for new, end in zip(lens, ends, strict=True))]
                ),
                np.repeat(np.arange(len(lens)), lens),
            ]
        )
        input_ids = to_device(flat_ids, torch.int64, self.device)
        if LAST_TOKEN in flat_ids:
            row_of_token = np.repeat([sequence.row for sequence in plan.sequences], all_lens)
            last = self._last_tokens.index_select(0, to_device(row_of_token, torch.int64, self.device))
            input_ids = torch.where(input_ids == LAST_TOKEN, last, input_ids)
        positions, sequence_of_token = to_device(tokens, torch.int64, self.device)
        rows, seq_lens = to_device([[s.row for s in sequences], ends], torch.int64, self.device)
        block_tables = runner.req_pool.req_to_page[rows, : -(-max(ends, default=0) // runner.page_size)]
        pages = block_tables[sequence_of_token, positions // runner.page_size]
        return ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            input_ids=input_ids,
            positions=positions,
            out_cache_loc=pages * runner.page_size + positions % runner.page_size,
            block_tables=block_tables,
            seq_lens=seq_lens.to(torch.int32),
            seq_lens_cpu=ends,
            extend_lens_cpu=lens,
            logits_rows=to_device(_last_rows(plan, all_lens), torch.int64, self.device),
            attn_tokens=slice(first_token, first_token + sum(lens)) if runner.parallel.attn_dp_size > 1 else None,
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

    def _sample(
        self, rids: list[str], table_rows: list[int], logits: torch.Tensor, plan: BatchPlan, result: BatchResult
    ) -> Wait:
        """Choose one token for each row of `logits`; the function returned waits for them."""
        rows = [self._rows[rid] for rid in rids]
        asked = [index for index, row in enumerate(rows) if row.state.return_logprob]
        places = to_device(asked, torch.int64, self.device) if asked else None
        raw = logits[places] if places is not None else None
        apply_logit_rules(logits, rows, plan.grammar_masks, self.model_runner.model_config.eos_token_ids)
        info = self._info_of(rows)
        uniforms = None
        if not info.all_greedy:
            num_output_tokens = np.array([row.num_output_tokens for row in rows], dtype=np.uint64)
            uniforms = to_device(uniforms_of(info.seeds, num_output_tokens), torch.float32, self.device)
        tokens = sample(logits, info, uniforms)
        usable = tokens.clamp(min=0)  # a request that got no token ends, but maybe not before the next pass
        self._last_tokens.index_copy_(0, to_device(table_rows, torch.int64, self.device), usable)
        for index, row in enumerate(rows):
            row.append(usable[index : index + 1])

        copies = HostCopies()
        host_tokens = copies.add(tokens)
        logprobs = None
        if raw is not None:
            nums = [rows[index].state.top_logprobs_num for index in asked]
            chosen = compute_logprobs(raw, tokens[places], max(nums))
            logprobs = LogprobTensors(*(copies.add(part) for part in (chosen.chosen, chosen.values, chosen.token_ids)))
        copies.close(self.device)

        def wait() -> BatchResult:
            copies.wait()
            result.token_ids = host_tokens.tolist()
            if logprobs is not None:
                result.output_logprobs = split_rows([rids[index] for index in asked], logprobs.to_rows(nums))
            return result

        return wait

    def _info_of(self, rows: list[SamplingRow]) -> SamplingInfo:
        """The requests' sampling parameters as tensors, made again only when the batch has changed."""
        if self._info is None or rows != self._info_rows:  # the same objects: a request id can come again
            self._info_rows = rows
            self._info = SamplingInfo.from_params(
                [row.state.params for row in rows],
                [row.state.seed for row in rows],
                self.model_runner.model_config.vocab_size,
                self.device,
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
