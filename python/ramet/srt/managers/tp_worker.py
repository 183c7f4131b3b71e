"""Owns the execution of batch plans on one rank: plan to tensors, forward pass, sampling. Decides nothing."""

from bisect import bisect_left, bisect_right
from itertools import accumulate

import numpy as np
import torch

from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.sampler import LogprobTensors, SamplingInfo, compute_logprobs, sample, uniforms_of
from ramet.srt.managers.logprobs import split_rows
from ramet.srt.managers.pooler import PooledTokens, queue_pooling, take_vectors
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
        group = self.model_runner.parallel.attn_dp_rank
        moves = [one for one in plan.state_moves if one.group == group]
        for one in moves:
            self.model_runner.states.begin_pass(one)
        self.model_runner.req_pool.place([write for write in plan.place_writes if write.group == group])
        if plan.lora_placements and self.model_runner.lora is not None:
            self.model_runner.lora.place(plan.lora_placements)
        result = BatchResult(token_ids=[], output_logprobs={}, prompt_logprobs={})
        hidden_states = self.model_runner.run_pass(PassTokens.of(plan.sequences, plan.shared), self._groups(plan))
        for one in moves:
            self.model_runner.states.end_pass(one)
        if hidden_states is None:  # they go on to the next pipeline stage
            return None
        copies, pooled = HostCopies(), PooledTokens()
        if not plan.is_decode:
            self._add_prompt_logprobs(plan, hidden_states, result)
            pooled = queue_pooling(plan, hidden_states, self.model_runner.compute_logits, copies)
            hidden_states = hidden_states[to_device(_last_rows(plan), torch.int64, self.device)]
        sampled = [sequence for sequence in plan.sequences if sequence.is_sampled]
        if not sampled:
            return self._end_of_pass(result, copies, pooled)
        logits = self.model_runner.compute_logits(hidden_states)
        finish = self._sample([s.rid for s in sampled], [s.row for s in sampled], logits, plan, result, copies)
        if not pooled:
            return finish

        def wait() -> BatchResult:
            finish()
            result.vectors = take_vectors(pooled)
            return result

        return wait

    def _end_of_pass(self, result: BatchResult, copies: HostCopies, pooled: PooledTokens) -> Wait:
        """For a pass that chooses no token: the leader is to see when it ends, and not to plan far beyond it.

        A pipeline's last stage has no overlap: it would launch nothing meanwhile.
        """
        if pooled or self.model_runner.parallel.pp_size == 1:
            copies.close(self.device)

        def wait() -> BatchResult:
            copies.wait()
            result.vectors = take_vectors(pooled)
            return result

        return wait

    def _groups(self, plan: BatchPlan) -> list[slice]:
        """The sequences of each attention group: all are in one, unless attention is data-parallel."""
        groups = [sequence.group for sequence in plan.sequences]
        numbers = range(self.model_runner.parallel.attn_dp_size)
        return [slice(bisect_left(groups, number), bisect_right(groups, number)) for number in numbers]

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
        self,
        rids: list[str],
        table_rows: list[int],
        logits: torch.Tensor,
        plan: BatchPlan,
        result: BatchResult,
        copies: HostCopies,
    ) -> Wait:
        """Choose one token for each row of `logits`; the function returned waits for them and all other copies."""
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


def _last_rows(plan: BatchPlan) -> list[int]:
    """The row of the last new token of each sampled sequence."""
    ends = accumulate(len(sequence.input_ids) for sequence in plan.sequences)
    return [end - 1 for sequence, end in zip(plan.sequences, ends, strict=True) if sequence.is_sampled]
