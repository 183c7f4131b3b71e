"""Owns sessions: updates whose tensors come in several calls, or in one that is a session of its own.

What comes is put into a stage on every rank. When the session is ended, the stage is verified and switched to, or
nothing is. While the instance sleeps, or has no weights, a call that does not bring all tensors begins a session, too,
which the call ends with which they are whole. A session that fails, or that nobody goes on with, has no stage any more;
it stays known until somebody ends it or begins another, so that a tensor that comes late is not taken for an update by
itself.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_report import Content, Staged, UpdateReport, note_update
from ramet.srt.managers.weight_update_control import WeightUpdateControl, check_version_name
from ramet.srt.weights.update_messages import LentTensors, PutTensorsReq, SealWeightsReq, TensorsSource

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
NEXT = "/end_weight_update or /begin_weight_update comes next"


@dataclass
class Session:
    """One that has been begun."""

    number: int  # of the content that it makes
    last_used: float  # by the event loop's clock, in seconds
    staged: Staged = Staged()
    is_empty: bool = True
    version: str | None = None
    abort_all: bool = False
    is_implicit: bool = False  # nobody has begun it: it ends when what has come is whole
    failure: str = ""  # why nothing comes of it


class WeightSessions:
    """Takes tensors, in a session or not.

    Args:
        timeout_s: between two calls of a session.
        note_updated: called when other weights serve.
    """

    def __init__(
        self, control: WeightUpdateControl, timeout_s: float, note_updated: Callable[[], Awaitable[None]]
    ) -> None:
        self._control = control
        self._timeout_s = timeout_s
        self._note_updated = note_updated
        self._session: Session | None = None
        self._turn = asyncio.Lock()  # held by the call that is being answered
        self._watch: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Raises RequestError if a session is open, or adapters are loaded."""
        await self._control.shielded(self._begin())

    async def put(self, source: TensorsSource, version: str | None, *, abort_all: bool) -> UpdateReport | Staged:
        """Take tensors into the session that is open; if there is none, they are an update of their own.

        Or the first part of one, while nothing serves: by a trainer for which one call is too small.

        Args:
            version: a name for what the weights are afterwards; the last one counts.
            abort_all: end the requests that have not ended before the switch.

        Returns:
            What has come, in a session that goes on, and what it waits for if nobody has begun it.

        Raises:
            RequestError: if they can't be taken: with the reason. Nothing comes of the session then.
            ServiceError: if a replica does not answer.
        """
        check_version_name(version)
        return await self._control.shielded(self._noted(self._put(source, version, abort_all)))

    async def end(self, version: str | None = None) -> UpdateReport:
        """Serve what has come.

        Raises:
            RequestError: if no session is open, nothing has come in it, or it makes no whole with what serves.
            ServiceError: if a replica does not answer.
        """
        check_version_name(version)
        return await self._control.shielded(self._noted(self._end(version)))

    async def discard(self) -> None:
        """Serve nothing of what has come: for whoever finds a session open whose trainer has gone.

        Raises:
            RequestError: if no session is open.
        """
        await self._control.shielded(self._discard())

    async def _noted(self, work: Coroutine[Any, Any, Result]) -> Result:
        report = await work
        if isinstance(report, UpdateReport):
            await self._note_updated()
        return report

    async def _begin(self) -> None:
        async with self._turn:
            session = self._session
            if session is not None and not session.failure:
                if not session.is_implicit:
                    raise RequestError("a session is open already: /end_weight_update ends it")
                await self._drop(self._take())
            async with self._control.turn():
                number = await self._control.new_number()
                self._open(Session(number, asyncio.get_running_loop().time()))

    def _open(self, session: Session) -> None:
        self._session, self._control.has_session = session, True
        if self._watch is not None:
            self._watch.cancel()
        self._watch = asyncio.create_task(self._give_up_late(session))

    async def _put(self, source: TensorsSource, version: str | None, abort_all: bool) -> UpdateReport | Staged:
        async with self._turn:
            session = self._session
            if session is None or session.is_implicit and session.failure and self._must_be_whole:
                self._session = None  # nothing is there that what comes could be a half of
                return await self._update(source, version, abort_all)
            if session.failure:
                raise RequestError(f"{session.failure}; {NEXT}")
            question = functools.partial(PutTensorsReq, number=session.number, is_first=session.is_empty, source=source)
            try:
                staged = Staged.of(await self._control.stage(question, session.number))
            except (RequestError, ServiceError) as error:
                self._fail(session, f"the session has failed: {error}")
                if session.is_implicit and isinstance(error, RequestError):
                    raise RequestError(f"{error}; what came before is dropped, too: send all tensors again") from None
                raise
            session.is_empty, session.staged = False, session.staged + staged
            session.version, session.abort_all = version or session.version, abort_all or session.abort_all
            session.last_used = asyncio.get_running_loop().time()
            if session.is_implicit and not staged.lacks:
                return await self._serve_session(self._take(), None)
            return staged if session.is_implicit else replace(staged, lacks="")

    async def _update(self, source: TensorsSource, version: str | None, abort_all: bool) -> UpdateReport | Staged:
        async with self._control.turn():
            number = await self._control.new_number()
            question = functools.partial(PutTensorsReq, number=number, is_first=True, source=source)
            staged = Staged.of(await self._control.stage(question, number))
            if self._must_be_whole and staged.lacks and not isinstance(source, LentTensors):  # who say what is all
                now = asyncio.get_running_loop().time()
                self._open(Session(number, now, staged, False, version, abort_all, is_implicit=True))
                return staged
            return await self._serve(number, staged, version, abort_all)

    @property
    def _must_be_whole(self) -> bool:
        """Whether tensors without a session wait for the rest: nothing serves, and half of them must never do."""
        return self._control.is_asleep or not self._control.has_base

    def _take(self) -> Session:
        """The session, which is none any more. Raises RequestError if there is none."""
        session, self._session = self._session, None
        if self._watch is not None:
            self._watch.cancel()
        if session is None:
            raise RequestError("no session is open: /begin_weight_update opens one")
        return session

    async def _discard(self) -> None:
        async with self._turn:
            await self._drop(self._take())

    async def _drop(self, session: Session) -> None:
        try:
            await self._control.drop(session.number)
        finally:
            self._control.has_session = False

    async def _end(self, version: str | None) -> UpdateReport:
        async with self._turn:
            session = self._take()
            if session.failure:
                raise RequestError(session.failure)
            return await self._serve_session(session, version)

    async def _serve_session(self, session: Session, version: str | None) -> UpdateReport:
        try:
            if session.is_empty:
                raise RequestError("nothing has come in this session: the weights are what they were")
            async with self._control.turn(session=True):
                chosen = version or session.version
                return await self._serve(session.number, session.staged, chosen, session.abort_all)
        except BaseException:
            await self._control.drop(session.number)
            raise
        finally:
            self._control.has_session = False

    async def _serve(self, number: int, staged: Staged, version: str | None, abort_all: bool) -> UpdateReport:
        sealed = await self._control.stage(functools.partial(SealWeightsReq, number=number), number)
        origin = f"tensors on top of {self._control.current.version}" if self._control.has_base else "tensors"
        content = Content(number, version or f"update-{number}", origin, None)
        report = await self._control.serve(content, staged + Staged.of(sealed), abort_all=abort_all)
        note_update(report)
        return report

    async def _give_up_late(self, session: Session) -> None:
        """Forget a session when nobody has gone on with it for too long."""
        loop = asyncio.get_running_loop()
        while session is self._session and not session.failure:
            if (left := session.last_used + self._timeout_s - loop.time()) > 0:
                await asyncio.sleep(left)
                continue
            async with self._turn:
                if session is self._session and session.last_used + self._timeout_s <= loop.time():
                    self._fail(session, f"the session was given up after {self._timeout_s:g} s without a call")
                    await self._control.drop(session.number)

    def _fail(self, session: Session, reason: str) -> None:
        logger.warning("%s", reason)
        session.failure = f"{reason}; the weights are what they were before it"
        self._control.has_session = False
