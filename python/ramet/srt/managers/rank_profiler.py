"""Owns the recording of one rank's passes with torch.profiler, and the trace that comes of it. Tells nobody else."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.environ import default_profile_dir
from ramet.srt.managers.io_struct import ProfileReqOutput, StartProfileReqInput, StopProfileReqInput

logger = logging.getLogger(__name__)

Wait = Callable[[], BatchResult]  # waits for a pass's result
Launched = TypeVar("Launched")
FAILURES = (ValueError, OSError, RuntimeError)  # what `start` and `stop` raise; torch's own are RuntimeErrors


class RankProfiler:
    """Records passes from `start` until so many are launched, or until `stop`.

    A pass is in the trace as "decode_pass[N]" or "prefill_pass[N]", N being its sequences, from which it is launched on
    the device; on the rank that samples, "wait_for_result" is the time in which the host waits for a pass's tokens.
    """

    def __init__(self, world_rank: int, device: torch.device, finish_sending: Callable[[], None]):
        """
        Args:
            finish_sending: ends what the rank sends beside its passes. Torch writes the end of a recorded transfer into
                the recording, even when that has been freed: so it must come first.
        """
        self._finish_sending = finish_sending
        self._world_rank = world_rank
        self._device = device
        self._profile: profile | None = None
        self._path = Path()
        self._num_passes = 0
        self._num_steps: int | None = None
        self.is_writing = False  # a trace, which may take minutes

    @property
    def is_recording(self) -> bool:
        return self._profile is not None

    def start(self, request: StartProfileReqInput) -> str:
        """Begin, and say in a line what is recorded.

        Raises:
            ValueError: if a recording runs already, if this device has nothing of that kind to record, or if there can
                be no file in that folder.
            RuntimeError: if torch can't record.
        """
        if self._profile is not None:
            raise ValueError("a profile is being recorded already; /stop_profile ends it")
        kinds = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}
        activities = [kinds[name] for name in request.activities if name == "CPU" or self._device.type == "cuda"]
        if not activities:
            raise ValueError("activities: this instance runs on a CPU, there is no GPU to record")
        folder = _resolve_below(request.root, request.output_dir)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if request.root == default_profile_dir() and folder.stat().st_uid != os.geteuid():
                raise ValueError("it belongs to somebody else")  # /tmp is everybody's
            with tempfile.TemporaryFile(dir=folder):
                pass  # better now than after the recording
        except (OSError, ValueError) as error:
            raise ValueError(f"output_dir: no file can be written there ({error})") from error
        self._path = folder / f"{request.profile_id}-rank-{self._world_rank}.trace.json.gz"
        self._num_passes, self._num_steps = 0, request.num_steps
        recording = profile(activities=activities, with_stack=request.with_stack, record_shapes=request.record_shapes)
        recording.start()
        self._profile = recording
        length = "until /stop_profile" if self._num_steps is None else f"for {self._num_steps} passes"
        return f"recording {length}; then each rank writes {request.profile_id}-rank-N.trace.json.gz to {folder}"

    def stop(self) -> str:
        """End the recording and write the trace, which appears under its name when it is complete.

        Raises:
            ValueError: if nothing is being recorded.
            OSError, RuntimeError: if it can't be written.
        """
        if self._profile is None:
            raise ValueError("no profile is being recorded")
        recording, self._profile = self._profile, None
        part = self._path.with_suffix(".part.gz")  # torch compresses what ends so
        self.is_writing = True
        try:
            self._finish_sending()
            recording.stop()  # waits for the device
            recording.export_chrome_trace(str(part))
        finally:
            self.is_writing = False
        part.replace(self._path)
        line = f"recorded {self._num_passes} passes to {self._path}"
        logger.info(line)
        return line

    def record(self, plan: BatchPlan, launch: Callable[[BatchPlan], Launched]) -> Launched:
        """Launch a pass within the recording, which ends with the last pass that was asked for."""
        with record_function(f"{'decode' if plan.is_decode else 'prefill'}_pass[{len(plan.sequences)}]"):
            launched = launch(plan)
        self._num_passes += 1
        if self._num_passes == self._num_steps:
            self.close()
        return launched

    def follow(self, message: StartProfileReqInput | StopProfileReqInput) -> None:
        """Do as the leader of the replica does. What fails here is only logged: it is the leader that answers."""
        try:
            self.start(message) if isinstance(message, StartProfileReqInput) else self.stop()
        except FAILURES as error:
            logger.error("this rank is not profiled: %s", error)

    def close(self) -> None:
        """End a recording, if there is one, when nobody waits for an answer."""
        if self._profile is not None:
            try:
                self.stop()
            except FAILURES as error:
                logger.error("the profile of this rank is lost: %s", error)


def _resolve_below(root: str, output_dir: str) -> Path:
    """The folder on this node, whatever links lead to it. Raises ValueError if it is not `root` or below."""
    try:
        folder, resolved_root = Path(output_dir).resolve(), Path(root).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"output_dir: no file can be written there ({error})") from error
    if root and not folder.is_relative_to(resolved_root):
        raise ValueError(f"output_dir: it must be below {resolved_root} (--profile-dir)")
    return folder


def in_sight(wait: Wait) -> Wait:
    """The same, to be seen in a recording."""

    def wait_in_sight() -> BatchResult:
        with record_function("wait_for_result"):
            return wait()

    return wait_in_sight


def profile_reply(request_id: str, act: Callable[[], str]) -> ProfileReqOutput:
    """The answer to a call about profiles, which says what `act` says, or why it could not be done."""
    try:
        return ProfileReqOutput(request_id=request_id, success=True, message=act())
    except FAILURES as error:
        logger.warning("not profiled: %s", error)
        return ProfileReqOutput(request_id=request_id, success=False, message=str(error))
