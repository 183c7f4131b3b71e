"""Owns recording the passes of all ranks of an instance: the main process's side."""

import contextlib
import functools
import logging
import os
import time

from ramet.srt.errors import ServiceError
from ramet.srt.managers.io_struct import ProfileReqOutput, StartProfileReqInput, StopProfileReqInput
from ramet.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

PROFILE_TIMEOUT_S = 300.0  # a long trace takes its time to be written


class ProfileControl:
    """One recording at a time: the ranks refuse another."""

    def __init__(self, manager: TokenizerManager):
        self._manager = manager
        self._may_record = False  # one that ends by itself does not tell

    async def start(
        self,
        root: str,
        output_dir: str,
        num_steps: int | None,
        activities: list[str],
        with_stack: bool,
        record_shapes: bool,
    ) -> ProfileReqOutput:
        """Have every rank record its passes; the first refusal, if any. Raises ServiceError without an answer.

        Args:
            root: the folder that `output_dir` must be in; the ranks refuse another.
        """
        question = functools.partial(
            StartProfileReqInput,
            profile_id=str(time.time()),
            root=os.path.abspath(root),
            output_dir=os.path.abspath(output_dir),
            num_steps=num_steps,
            activities=activities,
            with_stack=with_stack,
            record_shapes=record_shapes,
        )
        self._may_record = True
        replies = await self._manager.ask_all(question, ProfileReqOutput, PROFILE_TIMEOUT_S)
        return min(replies, key=lambda reply: reply.success)

    async def stop(self) -> ProfileReqOutput:
        """End the recording where there is one; refused if there is none. Raises ServiceError without an answer."""
        replies = await self._manager.ask_all(StopProfileReqInput, ProfileReqOutput, PROFILE_TIMEOUT_S)
        self._may_record = False
        return max(replies, key=lambda reply: reply.success)

    async def end(self) -> None:
        """Wait until what was recorded is written: a rank that is only told to end is killed after some seconds."""
        if self._may_record:
            logger.info("waiting until the profile is written, if one is being recorded")
            with contextlib.suppress(ServiceError):
                await self.stop()
