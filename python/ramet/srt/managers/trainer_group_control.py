"""Owns the groups in which trainers broadcast to all ranks of an instance: the main process's side."""

import functools
import logging
from dataclasses import dataclass

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.managers.weight_update_control import WeightUpdateControl, failure_of
from ramet.srt.weights.update_messages import JoinGroupReq, LeaveGroupReq, WeightStepOutput

logger = logging.getLogger(__name__)

STATELESS = "weight transfer engine"  # the name here of the group of vLLM's, which has none
ANSWER_TIMEOUT_S = 120.0  # for ranks to say what has come of meeting a trainer, and for processes to start
LEAVE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Group:
    """What a trainer says of its group."""

    name: str
    host: str  # of its store, where its rank 0 listens
    port: int
    rank_offset: int  # of this instance's rank 0
    size: int
    backend: str
    is_stateless: bool = False  # as vLLM's trainers make them
    timeout_s: float = 300.0  # for all to come


class TrainerGroupControl:
    """Joins and leaves them, on all ranks or on none.

    Args:
        world_size: ranks of this instance.
    """

    def __init__(self, manager: TokenizerManager, control: WeightUpdateControl, world_size: int):
        self._manager = manager
        self._control = control
        self._world_size = world_size
        self._numbers: dict[str, int] = {}  # of groups that have been joined, by name; a rank may have left since
        self._last_number = 0
        self._num_calls: dict[str, int] = {}  # in which trainers have said what they broadcast, by the group's name

    async def join(self, group: Group) -> None:
        """Have every rank meet the trainer and the other members, in the place of a group of that name.

        A trainer that starts again needs not wait for what the one before has asked for.

        Raises:
            RequestError: if it has no places for all ranks, or they don't meet; then none of them is in it.
            ServiceError: if a replica does not answer.
        """
        if not 1 <= group.rank_offset <= group.size - self._world_size:
            raise RequestError(
                f"this instance has {self._world_size} ranks, and rank 0 is the trainer's: from rank "
                f"{group.rank_offset} on, a group of {group.size} has no places for them",
                param="world_size",
            )
        await self._control.shielded(self._join(group))

    async def leave(self, name: str) -> None:
        """Have every rank leave; whoever waits for something in the group gets an error.

        Raises:
            RequestError: if there is none of that name, and none is being joined.
            ServiceError: if a replica does not answer.
        """
        if name not in self._numbers:
            raise RequestError(f"there is no group {name!r}", param="group_name")
        await self._control.shielded(self._leave(name, self._numbers[name]))

    def count_call(self, name: str) -> int:
        """Note that a trainer says what it broadcasts in a group, whatever comes of it; which call it is.

        It may have sent it already. Of what nobody has received the next call would get the bytes for its own.
        0 where there is no such group.
        """
        if name in self._num_calls:
            self._num_calls[name] += 1
        return self._num_calls.get(name, 0)

    def count_lost_call(self, *, is_stateless: bool) -> None:
        """The same of a call of which nobody can tell what it is about: it may be any group's.

        Args:
            is_stateless: whether it came by vLLM's route.
        """
        for name in self._num_calls:
            if (name == STATELESS) == is_stateless:
                self._num_calls[name] += 1

    async def _join(self, group: Group) -> None:
        self._last_number += 1
        self._num_calls[group.name] = 0
        number = self._numbers[group.name] = self._last_number
        question = functools.partial(
            JoinGroupReq,
            name=group.name,
            number=number,
            host=group.host,
            port=group.port,
            rank_offset=group.rank_offset,
            size=group.size,
            backend=group.backend,
            is_stateless=group.is_stateless,
            timeout_s=group.timeout_s,
        )
        try:
            timeout_s = group.timeout_s + ANSWER_TIMEOUT_S
            failure = failure_of(await self._manager.ask_all(question, WeightStepOutput, timeout_s))
        except ServiceError:
            await self._leave(group.name, number)
            raise
        if failure:
            await self._leave(group.name, number)
            raise RequestError(failure)
        logger.info("all ranks have met a trainer at %s:%d in the group %r", group.host, group.port, group.name)

    async def _leave(self, name: str, number: int) -> None:
        if self._numbers.get(name) == number:
            del self._numbers[name]
            self._num_calls.pop(name, None)
        question = functools.partial(LeaveGroupReq, name=name, number=number)
        await self._manager.ask_all(question, WeightStepOutput, LEAVE_TIMEOUT_S)
