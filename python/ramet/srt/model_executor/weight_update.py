"""Owns the contents that a rank has for its weights: one in the arena, which serves, and others staged beside it.

When one takes the other's place, the leader of the rank's replica says, between the same two passes of all its ranks.
Whatever fails before that is an outcome, and the content that serves is untouched. Whatever fails in it ends the rank,
and so the instance: it must never go on with some ranks changed and others not.
"""

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import torch

from ramet.srt.distributed.parallel_state import min_over_replica
from ramet.srt.errors import one_line
from ramet.srt.model_executor.dropped_memory import DroppedMemory
from ramet.srt.model_executor.rank_memory import RankMemory, instance_config
from ramet.srt.model_executor.rank_weights import LoadedWeights, OfferedWeights
from ramet.srt.model_executor.step_outcome import StepOutcome, together
from ramet.srt.model_executor.tensor_feeds import TensorFeeds
from ramet.srt.model_executor.weight_delta import stage_delta
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.model_loader.checkpoint.file_stamps import check_stamps, file_stamps, sample_files
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.model_loader.client.published import take_published
from ramet.srt.model_loader.loader import DummyModelLoader, get_model_loader
from ramet.srt.model_loader.tensor_stage import TensorStage
from ramet.srt.utils.hub import resolve_model_path, snapshot_revision
from ramet.srt.utils.net import SeedAddress
from ramet.srt.utils.threads import run_beside
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.memory_messages import MemoryStep, ReleaseMemoryReq, ResumeMemoryReq
from ramet.srt.weights.report import LoadReport, summarize
from ramet.srt.weights.update_messages import (
    DeltaFile,
    DropWeightsReq,
    FilesSource,
    InstanceSource,
    JoinGroupReq,
    LeaveGroupReq,
    LongWeightStep,
    MadeUpSource,
    OfferWeightsReq,
    PutTensorsReq,
    SealWeightsReq,
    StageWeightsReq,
    SwitchWeightsReq,
    TrainerSource,
    WeightSource,
    WeightStep,
)
from ramet.srt.weights.version import DEFAULT_VERSION

logger = logging.getLogger(__name__)

BOARD_KEY = "weights"
OTHERS_TIMEOUT_S = 3600.0  # for the slowest rank, once the leader is done
FREE_TIMEOUT_S = 60.0  # for memory of dropped contents, before a step begins
CLOSE_TIMEOUT_S = 5.0
NAMES = {  # of steps other than those toward new weights
    OfferWeightsReq: "the offer of weights",
    JoinGroupReq: "meeting a trainer",
    ReleaseMemoryReq: "giving memory back",
    ResumeMemoryReq: "taking memory again",
}
FIRST = 0  # the number of the content that the rank was started with


@dataclass(frozen=True)
class StagedWeights:
    """Content beside the arena."""

    arena: WeightArena
    report: LoadReport


class RankVersions:
    """A rank's weights, offered or not, and what is staged beside them.

    Args:
        weights: what serves.
        open_checkpoint: opens files as checkpoints of the rank's model.
        memory: gives memory back, and takes it again.
    """

    def __init__(self, weights: LoadedWeights, open_checkpoint: CheckpointOpener, memory: RankMemory):
        self.weights: LoadedWeights | OfferedWeights = weights
        self.current = FIRST
        self.offer_again: Callable[[], None] | None = None  # of an instance that gives its weights
        self._open_checkpoint = open_checkpoint
        self._memory = memory
        self._arriving = weights.weights
        self._parallel = self._arriving.manifest.parallel
        self._staged: dict[int, StagedWeights] = {}
        self._open: dict[int, TensorStage] = {}  # into which tensors come: none or one
        self.feeds = TensorFeeds(self._parallel, self.arena.byte_tensor().device)
        self._dropped: set[int] = set()  # numbers that are of no use when they have been staged
        self._dropped_memory = DroppedMemory()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._job: Future[StepOutcome] | None = None

    @property
    def arena(self) -> WeightArena:
        return self._arriving.arena

    def close(self) -> None:
        """Withdraw the offer for good. What is being staged is of no use any more, and ends with the process."""
        self.feeds.groups.close()
        self.weights.close()
        with contextlib.suppress(TimeoutError):
            self._dropped_memory.wait(CLOSE_TIMEOUT_S)

    # -- Steps that go on beside passes

    def begin(self, step: LongWeightStep | MemoryStep) -> None:
        """Begin a step in a thread. All ranks of the replica do, one step after the other.

        One that takes memory or gives it back waits until that of what was dropped before is free.
        """
        job = self._job = Future[StepOutcome]()

        def run() -> None:
            with self._turn:
                job.set_result(self._run(step))
                self._prepare_offer()

        threading.Thread(target=run, name="change-weights", daemon=True).start()

    def join(self, step: JoinGroupReq) -> Future[StepOutcome]:
        """Begin to meet a trainer, beside whatever else goes on. All ranks of the replica do.

        Returns:
            On the leader, what comes of it on all of them.
        """
        return run_beside(functools.partial(self._run, step), "join-group")

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way: on the leader, on any rank of its replica."""
        return self._job is not None and not self._job.done()

    def outcome(self) -> StepOutcome:
        """What came of the last step: on the leader, of all ranks of its replica."""
        assert self._job is not None
        return self._job.result()

    def _prepare_offer(self) -> None:
        """Have ready what takes longest of offering other weights, while there are some that may come to serve."""
        if self.offer_again is None or not self._staged:
            return
        try:
            self._arriving.prepare_offer()
        except (WeightTransferError, OSError) as error:  # the offer itself will fail, and say so
            logger.warning("rank %d: an offer can't be prepared: %s", self._parallel.world_rank, one_line(error))

    def _run(self, step: LongWeightStep | MemoryStep | JoinGroupReq) -> StepOutcome:
        outcome = self._take(step)
        try:
            return self._gather(step.request_id, outcome)
        except (ValueError, OSError, RuntimeError) as error:  # of the ranks' store
            return StepOutcome(failure=f"the ranks can't tell each other how far they are: {one_line(error)}")

    def _gather(self, request_id: str, outcome: StepOutcome) -> StepOutcome:
        """On the leader, the outcome of all ranks of the replica; on the others their own."""
        board, parallel = self._arriving.context.board, self._parallel
        if board is None:
            return outcome
        key = f"{BOARD_KEY}/{request_id}"
        if parallel.world_rank != parallel.leader_rank:
            board.announce(f"{key}/{parallel.world_rank}", msgspec.json.encode(outcome).decode())
            return outcome
        outcomes = {parallel.world_rank: outcome}
        for rank in parallel.replica_ranks:
            if rank != parallel.world_rank:
                text = board.await_announcement(f"{key}/{rank}", OTHERS_TIMEOUT_S)
                late = StepOutcome(failure=f"it has not ended within {OTHERS_TIMEOUT_S:g} s")
                outcomes[rank] = late if text is None else msgspec.json.decode(text, type=StepOutcome)
        return together(outcomes)

    def _take(self, step: LongWeightStep | MemoryStep | JoinGroupReq) -> StepOutcome:
        rank = self._parallel.world_rank
        what = NAMES.get(type(step), "staging weights")
        try:
            if not isinstance(step, JoinGroupReq | OfferWeightsReq):
                self._dropped_memory.wait(FREE_TIMEOUT_S)
            self.arena.make_current()
            match step:
                case StageWeightsReq():
                    return self._stage(step)
                case PutTensorsReq():
                    return self._put(step)
                case SealWeightsReq():
                    return self._seal(step)
                case OfferWeightsReq():
                    return self._offer(step.is_offered)
                case JoinGroupReq():
                    self.feeds.groups.join(step)
                    return StepOutcome()
                case _:
                    return self._move_memory(step)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            logger.warning("rank %d: %s failed: %s", rank, what, one_line(error))
            lacks_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            return StepOutcome(failure=one_line(error), lacks_memory=lacks_memory)
        except Exception as error:  # the reason is answered; what serves has not been touched
            logger.exception("rank %d: %s failed", rank, what)
            return StepOutcome(failure=repr(error))

    def _move_memory(self, step: MemoryStep) -> StepOutcome:
        if isinstance(self.weights, OfferedWeights):
            raise RuntimeError("weights that others may take can't be put away")
        moved = self._memory.take(step)
        sources = (moved.source,) if moved.source else ()
        return StepOutcome(sources=sources, num_bytes=moved.num_bytes, seconds=moved.seconds)

    def _stage(self, step: StageWeightsReq) -> StepOutcome:
        start = time.perf_counter()
        stage, report = self._fill(step.source)
        checksums = compute_checksums(stage.manifest, stage)
        told = stage.checksums
        if told is not None and told.values != checksums.values:
            pairs = zip(stage.manifest.entries, told.values, checksums.values, strict=True)
            wrong = [entry.name for entry, one, other in pairs if one != other]
            raise ValueError(f"what was staged is not what its source has: {name_some(wrong)} differ")
        stage.checksums = checksums
        self._keep(step.number, stage, report)
        return StepOutcome(
            sources=(report.source,),
            num_bytes=report.num_bytes,
            seconds=time.perf_counter() - start,
            transfer_s=report.transfer_seconds,
            in_host_memory=stage.in_host_memory,
            received=_mark_of(step.source, report),
        )

    def _keep(self, number: int, stage: WeightArena, report: LoadReport) -> None:
        with self._lock:
            if number not in self._dropped:
                self._staged[number] = StagedWeights(stage, report)
        logger.info("rank %d: staged weights %s", self._parallel.world_rank, summarize(report))

    def _put(self, step: PutTensorsReq) -> StepOutcome:
        """Tensors go into an open stage. If that fails, the stage is none any more."""
        start = time.perf_counter()
        with self._lock:
            stage = self._open.pop(step.number, None)
        if stage is None and not step.is_first:
            raise ValueError("what has come before of these weights is lost")
        if stage is None:
            stage = TensorStage(self.arena, self._manifest(""), self._open_checkpoint.whole)
        before, source = stage.num_bytes, self.feeds.name_of(step.source)
        stage.sources.add(source)
        with contextlib.closing(self.feeds.open(step.source)) as tensors:
            for name, tensor in tensors:
                stage.put(name, tensor)
        with self._lock:
            if step.number not in self._dropped:
                self._open[step.number] = stage
        seconds = time.perf_counter() - start
        num_bytes, lacking = stage.num_bytes - before, stage.lacking
        lacks = name_some(lacking) if lacking else ""
        return StepOutcome(sources=(source,), num_bytes=num_bytes, seconds=seconds, lacks=lacks)

    def _seal(self, step: SealWeightsReq) -> StepOutcome:
        start = time.perf_counter()
        with self._lock:
            stage = self._open.pop(step.number, None)
        if stage is None:
            raise ValueError("what has come of these weights is lost")
        stage.seal()
        seconds = time.perf_counter() - start
        source = "+".join(sorted(stage.sources))
        report = LoadReport(source=source, num_bytes=stage.num_bytes, seconds=seconds, verified=True)
        self._keep(step.number, stage.arena, report)
        return StepOutcome(seconds=seconds, in_host_memory=stage.arena.in_host_memory, received=stage.received_digest)

    def _fill(self, source: WeightSource) -> tuple[WeightArena, LoadReport]:
        """A new arena with what the source has. Raises ValueError if it has something else than is needed."""
        base = self._arriving.config.load
        opener = self._open_checkpoint.anew()
        if isinstance(source, MadeUpSource):
            stage = self.arena.open_stage(self._manifest(""))
            stage.is_made_up = True
            loader = DummyModelLoader(source.random_seed)
            return stage, loader.load_weights(stage.manifest, stage, "").report
        if isinstance(source, InstanceSource):
            stage = self.arena.open_stage(self._manifest(""))
            config = instance_config(base, source)
            report = get_model_loader(config, open_checkpoint=opener).load_weights(stage.manifest, stage, "").report
            if not report.verified:
                raise ValueError(f"{source.host}:{source.port} can't say the checksums of all of its weights")
            return stage, report
        if isinstance(source, TrainerSource):
            stage = self.arena.open_stage(self._manifest(""))
            ranks = [SeedAddress(one.host, one.port, one.scheme) for one in source.ranks]
            config = dataclasses.replace(base, shows_keys=not source.is_listed)
            return stage, take_published(stage, ranks, source.version, config, opener.whole)
        if isinstance(source, DeltaFile):
            if self.arena.is_made_up:
                raise ValueError("no weights are there on which a delta could belong")
            return stage_delta(source, self.arena, self._manifest(""), opener.whole)
        folder = resolve_model_path(source.path, source.revision)
        stamps = file_stamps(folder)
        check_stamps(folder, stamps, source.files, source.host_identity)
        files = opener(folder)  # what does not fit is said before there is memory for it
        files.plan(self.arena.manifest)
        stage = self.arena.open_stage(self._manifest(snapshot_revision(folder) or source.revision or ""))
        config = dataclasses.replace(base, load_format="safetensors", weights_digest=source.digest)
        report = get_model_loader(config, open_checkpoint=opener).load_weights(stage.manifest, stage, folder).report
        different = files.find_difference(stage)
        if different is None and source.digest is not None and stage.content_digest is not None:
            different = next(iter(check_bands(stage, stage.content_digest).wrong), None)
        if different is not None:
            raise ValueError(f"{folder}: {different} is not in memory what it is in the files")
        if file_stamps(folder) != stamps:
            raise ValueError(f"the weights in {folder} have changed while they were read")
        return stage, report

    def _manifest(self, revision: str) -> WeightManifest:
        """Of what is staged. Whatever its version is called where it is from, it gets its name here at the switch."""
        manifest = self._arriving.manifest
        return msgspec.structs.replace(manifest, revision=revision, checksums=None, weight_version=DEFAULT_VERSION)

    def _offer(self, is_offered: bool) -> StepOutcome:
        if isinstance(self.weights, OfferedWeights) == is_offered:
            return StepOutcome()
        if isinstance(self.weights, OfferedWeights):
            self.weights = self.weights.withdraw()
        elif self.offer_again is not None:
            self.offer_again()
        return StepOutcome()

    # -- Steps between two passes

    def switch(self, number: int, version: str) -> float:
        """Serve what is staged under `number`, and stage what has served under its own; all ranks of a replica call it.

        Args:
            version: the name by which it goes from now on.

        Returns:
            The seconds that it took, until all of them have.

        Raises:
            OSError, RuntimeError: if it can't be done; then this rank must not go on.
        """
        start = time.perf_counter()
        loaded = self.weights
        if isinstance(loaded, OfferedWeights):
            raise RuntimeError("weights that others may take can't be switched")
        staged = self._staged.pop(number)
        self.arena.exchange(staged.arena)
        self._staged[self.current] = StagedWeights(staged.arena, loaded.report)
        self.current = number
        arrived = dataclasses.replace(loaded.weights, manifest=self.arena.manifest)
        report = msgspec.structs.replace(staged.report, weight_version=version)
        self.weights = LoadedWeights(arrived, report, loaded.claim)
        min_over_replica(0)
        return time.perf_counter() - start

    def drop(self, number: int) -> None:
        """Forget what is staged under a number, or will be. Its memory is freed beside passes, which don't wait."""
        held: list[StagedWeights | TensorStage] = []
        with self._lock:
            if number in self._staged:
                held.append(self._staged.pop(number))
            elif number in self._open:
                held.append(self._open.pop(number))
            else:
                self._dropped.add(number)
        self._dropped_memory.free(held)

    def follow(self, step: WeightStep | MemoryStep) -> None:
        """Do what the replica's leader says."""
        match step:
            case SwitchWeightsReq():
                self.switch(step.number, step.version)
            case DropWeightsReq():
                self.drop(step.number)
            case JoinGroupReq():
                self.join(step)
            case LeaveGroupReq():
                self.feeds.groups.leave(step.name, step.number)
            case _:
                self.begin(step)


def _mark_of(source: WeightSource, report: LoadReport) -> str:
    """What must be the same on all ranks: each node reads files of its own, of which stamps tell little elsewhere."""
    match source:
        case DeltaFile():
            return report.digest
        case FilesSource():
            return sample_files(resolve_model_path(source.path, source.revision))
    return ""
