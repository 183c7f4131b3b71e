"""Owns an arena's memory on offer to other hosts: a transport process that serves it, and the next when that ends."""

import logging
import os
import socket
import threading

from ramet.srt.environ import envs
from ramet.srt.model_loader.arena.base import LentFile, LentMemory, SharedFile, WeightArena
from ramet.srt.model_loader.transport.engine_messages import StartEngine
from ramet.srt.model_loader.transport.mooncake_engine import EngineError, MooncakeEngine, choose_protocol
from ramet.srt.model_loader.transport.transport_process import (
    TransportEndedError,
    TransportProcess,
    numeric_address,
)
from ramet.srt.utils.net import address_family, format_address, reachable_host
from ramet.srt.weights.errors import WeightTransferError

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1  # before a process that has ended is started again
MAX_PAUSE_S = 30.0
PING_PERIOD_S, PING_TIMEOUT_S = 10.0, 30.0
NUM_STARTS = 5  # of a process for a new offer
STEADY_S = 60.0  # a process that has run for so long was no failure of the start before


class MemoryOffer:
    """Lets others read an arena's memory, as `session_id` at `address`: both stay what they are for the offer's life.

    Reads that are under way when the process ends fail. The rank goes on, whatever becomes of its offer.
    """

    def __init__(self, arena: WeightArena, process: TransportProcess) -> None:
        """
        Args:
            process: becomes the offer's.

        Raises:
            WeightTransferError: if Mooncake refuses the memory, or the process has ended.
            OSError: if the memory can't be given away.
        """
        self._arena = arena
        self._process = process
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._pause_s = FIRST_PAUSE_S
        self.session_id = process.session_id
        try:
            self.address = _offer(arena, process, 0)
        except BaseException:
            process.kill()
            raise
        self._watch(process)
        threading.Thread(target=self._ping, name="transport-ping", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the transport process."""
        return self._process.pid

    def close(self) -> None:
        """Let nobody read any more."""
        self._closing.set()
        with self._lock:
            self._steady.cancel()
            self._process.kill()

    def _watch(self, process: TransportProcess) -> None:
        steady = self._steady = threading.Timer(STEADY_S, self._note_steady)
        steady.daemon = True
        steady.start()

        def on_end(end: str) -> None:
            steady.cancel()
            threading.Thread(target=self._start_again, args=(end,), name="offer-again", daemon=True).start()

        process.watch(on_end)

    def _ping(self) -> None:
        """Find a process that was stopped, or hangs: it is ended, and another one takes its place."""
        while not self._closing.wait(PING_PERIOD_S):
            process = self._process
            try:
                process.ping(PING_TIMEOUT_S)
            except TransportEndedError:
                continue  # is being started again
            except WeightTransferError:
                if not self._closing.is_set():
                    logger.warning("the transport process %d has not moved for %g s: ending it",
                                   process.pid, PING_TIMEOUT_S)  # fmt: skip
                    process.abort()

    def _note_steady(self) -> None:
        self._pause_s = FIRST_PAUSE_S

    def _start_again(self, end: str) -> None:
        """Until it succeeds, with longer and longer pauses: whoever ends the process again and again gets slow."""
        rank = self._arena.manifest.parallel.world_rank
        logger.warning("rank %d: %s; weights are not read over the network until it runs again", rank, end)
        while not self._closing.wait(self._pause_s):
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            try:
                process = self._process.successor()
            except WeightTransferError as error:
                logger.warning("rank %d: the transport process can't be started again: %s", rank, error)
                continue
            try:
                _offer(self._arena, process, self.address)
            except (WeightTransferError, OSError) as error:
                process.kill()
                logger.warning("rank %d: the weights can't be offered again: %s", rank, error)
                continue
            with self._lock:
                if self._closing.is_set():
                    process.kill()
                    return
                self._process = process
            logger.info("rank %d: weights are read over the network again, as %s", rank, self.session_id)
            self._watch(process)
            return


def _offer(arena: WeightArena, process: TransportProcess, address: int) -> int:
    match arena.share():
        case SharedFile(fd):
            return process.offer_file(fd, arena.nbytes, address)
        case LentMemory(handle, offset):
            return process.offer_gpu_memory(handle, offset, arena.nbytes, address)
        case LentFile(fd, nbytes):
            try:
                return process.offer_gpu_file(fd, nbytes, arena.gpu_id, address)
            finally:
                os.close(fd)


class OfferFromHere:
    """The same by an engine in this process, where the other one can't register the memory. It can end this process."""

    def __init__(self, arena: WeightArena, name: str, address: str) -> None:
        """Raises WeightTransferError if Mooncake does not start, or refuses the memory."""
        try:
            if name not in _engines:
                _engines[name] = MooncakeEngine(
                    StartEngine(name, address, choose_protocol(), envs.MOONCAKE_DEVICE.get())
                )
            self._engine = _engines[name]
            self._engine.register(arena.address, arena.nbytes)
        except EngineError as error:
            rank = arena.manifest.parallel.world_rank
            raise WeightTransferError("register", rank, name, error) from error
        self.address = arena.address
        self.session_id = format_address(name, self._engine.port)

    def close(self) -> None:
        """Let nobody read any more."""
        self._engine.unregister(self.address)


_engines: dict[str, MooncakeEngine] = {}  # of this process, which are never destroyed


def offer_memory(arena: WeightArena, process: TransportProcess) -> MemoryOffer | OfferFromHere:
    """An arena's memory on offer by a transport process, or from this one where that can't be.

    A network card wants to be allowed to write to what it registers, and may not know a GPU's memory that belongs to
    another process; and not every GPU may be used by two processes.

    Raises:
        WeightTransferError: if Mooncake refuses the memory.
        OSError: if the memory can't be given away.
    """
    try:
        return _offer_surely(arena, process)
    except TransportEndedError:
        raise
    except (WeightTransferError, OSError) as error:
        if process.protocol == "tcp" and arena.gpu_id < 0:
            raise
        process.kill()
        rank = arena.manifest.parallel.world_rank
        logger.warning(
            "rank %d: the transport process can't offer the weights by %s, so this process does, and is not safe from "
            "what is sent to it: %s", rank, process.protocol, getattr(error, "cause", error),
        )  # fmt: skip
        return OfferFromHere(arena, process.name, process.address)


def _offer_surely(arena: WeightArena, process: TransportProcess) -> MemoryOffer:
    """An offer by a process that may have been ended by a stranger since it was started; or else by the next one."""
    for _ in range(NUM_STARTS - 1):
        try:
            return MemoryOffer(arena, process)
        except TransportEndedError as error:
            logger.warning("rank %d: %s; starting another", arena.manifest.parallel.world_rank, error.cause)
            process = process.successor()
    return MemoryOffer(arena, process)


def start_offering_process(host: str, rank: int, gpu_id: int = -1) -> TransportProcess:
    """A transport process that listens at the address by which others reach `host`, and nowhere else.

    Args:
        gpu_id: of the GPU whose memory it will offer; -1: none's.

    Raises:
        WeightTransferError: if Mooncake is not installed or does not start.
    """
    name = reachable_host(host)
    try:
        address = numeric_address(name)
        with socket.socket(address_family(address)) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise WeightTransferError("start", rank, name, f"no address of this host: {error}") from error
    return TransportProcess(name, address, rank, gpu_id=gpu_id)
