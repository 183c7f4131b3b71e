"""Runs all ranks of a tensor-parallel group in threads of the test itself: what they exchange goes over lists."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sharded_models as sm
import torch
from ramet.srt.batch.batch_plan import PageWrite, SequencePlan
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.device_config import pick_device
from ramet.srt.configs.load_config import LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.distributed import communication_op
from ramet.srt.model_executor import model_runner
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.server_args import ServerArgs

T = TypeVar("T")
TIMEOUT_S = 60
PAGE_SIZE = 4


class RankThreads:
    """The ranks of one model, each with its weights from disk."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: str | Path, tp_size: int, ep_size: int = 1, **server_args: Any
    ):
        sizes = {"max_total_tokens": 2048, "page_size": PAGE_SIZE, "tp_size": tp_size}
        args = ServerArgs(model_path=str(folder), **(sizes | server_args))
        config = ModelConfig.from_path(str(folder))
        runner_config = args.runner_config("cpu", dtype=config.dtype, quantization=config.quantization)
        device = pick_device("cpu", 0)
        self.runners = [
            ModelRunner(runner_config, config, parallel, device, lambda phase: None, LoadContext())
            for parallel in sm.all_ranks(tp_size, ep_size)
        ]
        torch.set_num_threads(1)
        self._barrier = threading.Barrier(tp_size)
        self._local = threading.local()
        self._parts: list[Any] = [None] * tp_size
        monkeypatch.setattr(communication_op, "get_tp_group", lambda: self)
        monkeypatch.setattr(communication_op, "dist", self)

    # What torch.distributed is to communication_op.

    def all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def all_gather(self, parts: list[torch.Tensor], tensor: torch.Tensor, group: Any) -> None:
        for part, other in zip(parts, self._exchange(tensor), strict=True):
            part.copy_(other)

    def get_world_size(self, group: Any) -> int:
        return len(self.runners)

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self._local.rank] = tensor.clone()
        self._barrier.wait(TIMEOUT_S)
        parts = list(self._parts)
        self._barrier.wait(TIMEOUT_S)
        return parts

    def run(self, work: Callable[[ModelRunner], T]) -> list[T]:
        """Call `work` with each rank's runner, all at once. Returns what the ranks gave."""

        def run_rank(rank: int) -> T:
            self._local.rank = rank
            try:
                return work(self.runners[rank])
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.runners)) as pool:
            return list(pool.map(run_rank, range(len(self.runners))))

    def logprobs(self, sequences: Sequence[Sequence[int]], chunk: int) -> list[torch.Tensor]:
        """float32 [len, vocab_size] of each sequence, computed in chunks of so many tokens. All ranks agree on it."""

        def compute(runner: ModelRunner) -> list[torch.Tensor]:
            results = []
            for ids in sequences:
                pages = list(range(1, 1 + -(-len(ids) // PAGE_SIZE)))
                switch_len = runner.model_config.rope.switch_len
                is_long = switch_len is not None and len(ids) > switch_len
                runner.req_pool.write([PageWrite(row=0, start=0, pages=pages, is_long=is_long)])
                parts = []
                for start in range(0, len(ids), chunk):
                    part = list(ids[start : start + chunk])
                    hidden = runner.run_pass(_tokens(start, part), [slice(0, 1)])
                    parts.append(runner.compute_logits(hidden).log_softmax(-1))
                results.append(torch.cat(parts))
            return results

        first, *others = self.run(compute)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return first


def stage_logprobs(
    monkeypatch: pytest.MonkeyPatch, folder: str | Path, pp_size: int, ids: Sequence[int]
) -> torch.Tensor:
    """float32 [len, vocab_size]: of one sequence through pipeline stages of one rank each, one behind the other."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(model_runner, "send_to_next_stage", lambda tensor: sent.append(tensor))
    monkeypatch.setattr(model_runner, "receive_from_previous_stage", lambda tensor: tensor.copy_(sent.pop()))
    args = ServerArgs(model_path=str(folder), max_total_tokens=2048, page_size=PAGE_SIZE, pp_size=pp_size)
    config = ModelConfig.from_path(str(folder))
    runner_config = args.runner_config("cpu", dtype=config.dtype, quantization=config.quantization)
    for parallel in sm.ranks_of(pp_size=pp_size):
        runner = ModelRunner(runner_config, config, parallel, pick_device("cpu", 0), lambda phase: None, LoadContext())
        runner.req_pool.write([PageWrite(row=0, start=0, pages=list(range(1, 1 + -(-len(ids) // PAGE_SIZE))))])
        hidden = runner.run_pass(_tokens(0, list(ids)), [slice(0, 1)])
        runner._sending = None  # nothing is waited for
    torch.set_num_threads(1)
    return runner.compute_logits(hidden).log_softmax(-1)


def _tokens(start: int, ids: list[int]) -> PassTokens:
    return PassTokens.of([SequencePlan(rid="", row=0, start=start, input_ids=ids, is_sampled=False)])
