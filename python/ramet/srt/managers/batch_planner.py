"""Owns how a batch becomes the plan that the ranks get: each rank is told of what it does not know yet."""

from collections.abc import Sequence

from ramet.srt.batch.batch_plan import LAST_TOKEN, BatchPlan, PlaceWrite, SequencePlan, StateMoves
from ramet.srt.managers.lora_slots import LoraSlots
from ramet.srt.managers.prefix_groups import shared_prefixes
from ramet.srt.managers.schedule_batch import Req, RunningReq, ScheduleBatch
from ramet.srt.mem_cache.allocator import RowAllocator
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.sampling.sampling_state import SamplingState


class BatchPlanner:
    """Makes plans, and remembers whose sampling state the ranks hold.

    Args:
        rows: the page table, whose changes go out with the next plan.
        lora_slots: the slots of adapters, whose changes do, too.
        caches: one for each attention group, whose pages' places in layers with a window do, too.
    """

    def __init__(self, rows: RowAllocator, lora_slots: LoraSlots, caches: Sequence[RequestCache] = ()):
        self._rows = rows
        self._lora_slots = lora_slots
        self._caches = caches
        self._known_rids: set[str] = set()  # requests whose sampling state the ranks hold
        self._ended_rids: list[str] = []  # those of them that the ranks may forget

    def plan(self, batch: ScheduleBatch) -> BatchPlan:
        """The pass as the ranks get it. The plans must reach them in the order in which they are made."""
        known = self._known_rids
        new_states = [_sampling_state(running.req) for running in batch.sampled_reqs if running.req.rid not in known]
        known.update(state.rid for state in new_states)
        ended, self._ended_rids = self._ended_rids, []
        chunks = set(batch.chunks)
        sequences = [_chunk(running) if running in chunks else _newest_token(running) for running in batch.reqs]
        self._keep_states(batch, sequences)
        return BatchPlan(
            sequences=sequences,
            shared=shared_prefixes(batch.reqs),
            page_writes=self._rows.take_writes(),
            place_writes=self._place_pages(batch),
            state_moves=self._move_states(),
            lora_placements=self._lora_slots.take_placements(),
            new_states=new_states,
            ended_rids=ended,
            grammar_masks={
                running.req.rid: running.req.grammar.mask
                for running in batch.sampled_reqs
                if running.req.grammar is not None
            },
        )

    def _place_pages(self, batch: ScheduleBatch) -> list[PlaceWrite]:
        """Places for what the pass computes, and what has changed since the last one."""
        if not any(cache.windows is not None for cache in self._caches):
            return []
        for running in batch.reqs:
            self._caches[running.group].see(running.handle, running.handle.kv_len + running.extend_len)
        writes = []
        for group, cache in enumerate(self._caches):
            if cache.windows is not None and (changed := cache.windows.take_writes()):
                writes.append(PlaceWrite(group, *(list(column) for column in zip(*changed, strict=True))))
        return writes

    def _keep_states(self, batch: ScheduleBatch, sequences: Sequence[SequencePlan]) -> None:
        """Say which states of linear layers the pass keeps beside the newest."""
        chunks = set(batch.chunks)
        for running, sequence in zip(batch.reqs, sequences, strict=True):
            num_tokens = running.req.num_tokens if running in chunks else None
            cache = self._caches[running.group] if self._caches else None
            if cache is not None and cache.states is not None:
                sequence.saves = cache.plan_states(running.handle, running.extend_len, num_tokens)

    def _move_states(self) -> list[StateMoves]:
        """What has become of states since the last plan, and what the pass keeps at its end."""
        moves = []
        for group, cache in enumerate(self._caches):
            if cache.states is not None and not (steps := cache.states.take_steps()).is_empty:
                moves.append(
                    StateMoves(
                        group,
                        steps.rows,
                        steps.slots,
                        steps.sources,
                        steps.targets,
                        steps.kept_sources,
                        steps.kept_targets,
                    )
                )
        return moves

    def forget(self, rid: str) -> None:
        """Have the ranks drop a request's sampling state: it has stopped running."""
        if rid in self._known_rids:
            self._known_rids.remove(rid)
            self._ended_rids.append(rid)


def _sampling_state(req: Req) -> SamplingState:
    """What the sampling rank must know before it chooses this request's next token."""
    params = req.sampling_params
    return SamplingState(
        rid=req.rid,
        params=params,
        seed=req.sampling_seed,
        prompt_ids=req.origin_input_ids if params.repetition_penalty != 1.0 else [],
        output_ids=list(req.output_ids),
        return_logprob=req.return_logprob,
        top_logprobs_num=req.top_logprobs_num,
        bad_words_ids=req.bad_words_ids,
    )


def _newest_token(running: RunningReq) -> SequencePlan:
    handle = running.handle
    return SequencePlan(
        rid=running.req.rid,
        row=handle.row,
        group=running.group,
        start=handle.kv_len,
        input_ids=[LAST_TOKEN if running.num_pending else running.req.output_ids[-1]],
        is_sampled=True,
        lora_slot=running.lora_slot,
    )


def _chunk(running: RunningReq) -> SequencePlan:
    req, start = running.req, running.handle.kv_len
    positions = running.input_logprob_positions()
    return SequencePlan(
        rid=req.rid,
        row=running.handle.row,
        group=running.group,
        start=start,
        input_ids=req.token_ids(start, start + running.extend_len),
        is_sampled=running.is_last_chunk and req.pooling is None,
        logprob_offset=positions.start - start if positions else 0,
        logprob_targets=req.origin_input_ids[positions.start + 1 : positions.stop + 1],
        top_logprobs_num=req.top_logprobs_num,
        pooling=req.pooling if running.is_last_chunk else None,
        lora_slot=running.lora_slot,
    )
