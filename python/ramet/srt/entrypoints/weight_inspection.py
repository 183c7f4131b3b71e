"""Owns looking at an instance's weights on all its ranks: the main process's side."""

import functools
import hashlib
from array import array
from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.errors import RequestError
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.inspection_messages import (
    CheckAction,
    CheckWeightsOutput,
    CheckWeightsReq,
    RankChecksums,
    ReadWeightOutput,
    ReadWeightReq,
)

READ_TIMEOUT_S = 60.0
CHECK_TIMEOUT_S = 600.0  # all bytes are hashed


@dataclass(frozen=True)
class CheckedWeights:
    """What all ranks have."""

    ranks: list[RankChecksums]  # in the order of their numbers

    def of_rank(self, checked: RankChecksums) -> str:
        """One digest of all tensors of a rank: SHA-256 over names and checksums in the order of the names."""
        digest = hashlib.sha256()
        for name in sorted(checked.checksums):
            digest.update(name.encode() + checked.checksums[name].encode())
        return digest.hexdigest()

    @property
    def of_all(self) -> str:
        """One digest of all ranks: SHA-256 over theirs."""
        return hashlib.sha256("".join(map(self.of_rank, self.ranks)).encode()).hexdigest()


class WeightInspection:
    """Asks every replica; none plans a pass while it looks.

    Args:
        parallel: of any rank, for the sizes.
    """

    def __init__(self, manager: TokenizerManager, parallel: ParallelConfig):
        self._manager = manager
        self._parallel = parallel

    async def read(self, name: str, num_rows: int) -> list[Any]:
        """The numbers in the first rows of a tensor, as nested lists; a list of those where there are several replicas.

        Args:
            name: of a checkpoint's tensor, or of one of the arenas.

        Raises:
            RequestError: if there is none, or it is too much.
            ServiceError: if a replica does not answer.
        """
        question = functools.partial(ReadWeightReq, name=name, num_rows=num_rows)
        replies = await self._manager.ask_all(question, ReadWeightOutput, READ_TIMEOUT_S)
        if failures := dict.fromkeys(reply.failure for reply in replies if reply.failure):
            raise RequestError("; ".join(failures), param="name")
        read = [_nested(array("f", reply.values), reply.shape) for reply in replies]
        return read if len(read) > 1 else read[0]

    async def check(self, action: CheckAction) -> CheckedWeights:
        """Hash all tensors of all ranks.

        Raises:
            RequestError: if a rank has no snapshot, or other weights than then.
            ServiceError: if a replica does not answer.
        """
        question = functools.partial(CheckWeightsReq, action=action)
        replies = await self._manager.ask_all(question, CheckWeightsOutput, CHECK_TIMEOUT_S)
        ranks = sorted((one for reply in replies for one in reply.ranks), key=lambda one: one.rank)
        faults = [f"rank {one.rank}: {one.failure}" for one in ranks if one.failure]
        faults += [f"rank {one.rank}: {name_some(one.different)} differ" for one in ranks if one.different]
        if faults:
            raise RequestError("; ".join(faults), param="action")
        return CheckedWeights(ranks)

    def place(self, rank: int) -> dict[str, int]:
        """A rank's parallel coordinates, as SGLang names them."""
        sizes = self._parallel
        one = ParallelConfig.of_rank(rank, tp_size=sizes.tp_size, pp_size=sizes.pp_size, dp_size=sizes.dp_size)
        return {
            "tp_rank": one.tp_rank,
            "tp_size": one.tp_size,
            "dp_rank": one.dp_rank,
            "dp_size": one.dp_size,
            "pp_rank": one.pp_rank,
            "pp_size": one.pp_size,
            "rank": rank,
            "size": one.world_size,
        }


def _nested(numbers: "array[float]", shape: tuple[int, ...]) -> list[Any]:
    """Numbers as nested lists, the last of which is one row."""
    rows: list[Any] = numbers.tolist()
    for extent in reversed(shape[1:]):
        rows = [rows[start : start + extent] for start in range(0, len(rows), extent)]
    return rows
