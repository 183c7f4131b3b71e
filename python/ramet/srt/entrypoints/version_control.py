"""Owns giving an instance's weights another version's name, everywhere where it stands: the main process's side."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import RenameWeightsReqInput, RenameWeightsReqOutput
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.weights.control_messages import WeightReply, WeightRequest, WeightsRenamed
from ramet.srt.weights.version import check_version

logger = logging.getLogger(__name__)

RENAME_TIMEOUT_S = 60.0  # for the passes under way to end, or for a rank to register anew

AskRank = Callable[[str, int, WeightRequest, float], Awaitable[WeightReply]]


class VersionControl:
    """Changes the name, one change after the other.

    Args:
        ask_rank: tells a rank that offers its weights something about them.
        num_offers: how many ranks, from 0 on, offer theirs.
        turn: held by whoever changes the weights or their version's name.
        is_asleep: whether the weights are offered to nobody because the instance sleeps.
    """

    def __init__(
        self,
        manager: TokenizerManager,
        ask_rank: AskRank,
        num_offers: int,
        turn: asyncio.Lock,
        is_asleep: Callable[[], bool] = lambda: False,
    ):
        self._is_asleep = is_asleep
        self._manager = manager
        self._ask_rank = ask_rank
        self._num_offers = num_offers
        self._turn = turn

    async def rename(self, version: str, *, abort_all: bool) -> None:
        """Have all ranks and replicas call the weights, whose bytes stay, by another version's name.

        Args:
            abort_all: end the requests that run or wait; else those that run go on, and their answers name both.

        Raises:
            RequestError: if it is no name, or a rank can't say it to others: then nothing has changed.
            ServiceError: if a rank does not answer, in the same way; or a replica does not, which will do it yet.
        """
        try:
            check_version(version, "new_version")
        except ValueError as error:
            raise RequestError(str(error), param="new_version") from None
        async with self._turn:
            if self._is_asleep():
                raise RequestError("the instance is asleep: its weights get another name when it is awake")
            old = self._manager.weight_version
            try:
                await self._rename_offers(version)
            except (RequestError, ServiceError):
                with contextlib.suppress(RequestError, ServiceError):  # of the rank that has failed already
                    await self._rename_offers(old)
                raise
            question = functools.partial(RenameWeightsReqInput, version=version, abort_all=abort_all)
            try:
                await self._manager.ask_all(question, RenameWeightsReqOutput, RENAME_TIMEOUT_S)
            finally:
                self._manager.note_weight_version(version)
            logger.info("the weights go by the version %s now, before by %s", version, old)

    async def _rename_offers(self, version: str) -> None:
        """Raises the first failure, once all ranks have answered."""
        news = WeightsRenamed(version=version)
        asked = (self._ask_rank("target", rank, news, RENAME_TIMEOUT_S) for rank in range(self._num_offers))
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
