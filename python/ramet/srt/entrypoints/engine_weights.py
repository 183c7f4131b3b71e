"""Owns the part of `Engine` that changes weights, looks at them, and pauses generation, by SGLang's names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from ramet.srt.entrypoints.generate_request import Output
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.weight_calls import (
    RollbackBody,
    UpdateDeltaBody,
    UpdateFromDiskBody,
    UpdateFromInstanceBody,
    roll_back,
    update_answer,
    update_by_delta,
    update_from_disk,
    update_from_instance,
    versions_answer,
)
from ramet.srt.managers.io_struct import PauseMode
from ramet.srt.managers.pause_control import SleepMode
from ramet.srt.server_args import ServerArgs
from ramet.srt.weights.memory_messages import ASKED_TAGS, AskedTag

Result = TypeVar("Result")
PAUSE_MODES = ("abort", "retract", "in_place")
SLEEP_MODES = ("abort", "wait", "keep")


class EngineWeights(ABC):
    """What an Engine can do beside answering requests. Failures are errors with the reason, as of `generate`."""

    server_args: ServerArgs

    def update_weights_from_disk(self, model_path: str, load_format: str | None = None, **options: Any) -> Output:
        """Serve other weights of the same model, from files; requests go on while they are read.

        Args:
            model_path: folder or hub id.
            load_format: "auto" or "safetensors".
            options: the other fields of /update_weights_from_disk: weight_version, abort_all_requests, revision,
                weights_digest, …

        Returns:
            What /update_weights_from_disk answers.

        Raises:
            ValueError: if it can't be done: then what served before still serves.
            ServiceError: (a RuntimeError) if the engine has been shut down or a process of it has died.
        """
        body = UpdateFromDiskBody.make(model_path=model_path, load_format=load_format, **options)
        return update_answer(self._call(lambda instance: update_from_disk(instance, body)))

    def update_weights_from_instance(self, address: str | None = None, **options: Any) -> Output:
        """Serve the weights of a running instance.

        Args:
            address: host:port.
            options: the other fields of /update_weights_from_instance: version, model_name, weight_version, …

        Returns and raises as `update_weights_from_disk`.
        """
        body = UpdateFromInstanceBody.make(address=address, **options)
        return update_answer(self._call(lambda instance: update_from_instance(instance, body)))

    def update_weights_delta(self, path: str, base_version: str | None = None, **options: Any) -> Output:
        """Serve what serves with some changes, from a file that says what it belongs on and what it makes.

        Args:
            path: of the delta, as ramet.srt.model_loader.delta_writer writes it.
            base_version: the name of what must serve; what it holds is compared in any case.
            options: the other fields of /update_weights_delta: weight_version, weights_digest, abort_all_requests, …

        Returns and raises as `update_weights_from_disk`.
        """
        body = UpdateDeltaBody.make(path=path, base_version=base_version, **options)
        return update_answer(self._call(lambda instance: update_by_delta(instance, body)))

    def rollback_weights(self, *, abort_all_requests: bool = False) -> Output:
        """Serve the weights again that served before. Returns and raises as `update_weights_from_disk`."""
        body = RollbackBody.make(abort_all_requests=abort_all_requests)
        return update_answer(self._call(lambda instance: roll_back(instance, body)))

    def weight_versions(self) -> Output:
        """What /weight_versions answers."""

        async def answer(instance: Instance) -> Output:
            return versions_answer(instance)

        return self._call(answer)

    def update_weight_version(self, new_version: str, abort_all_requests: bool = True) -> None:
        """Give the weights, which stay as they are, another version's name. Raises ValueError if it is none."""
        self._call(lambda instance: instance.versions.rename(new_version, abort_all=abort_all_requests))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The numbers in the first rows of a tensor, as /get_weights_by_name answers them. Raises ValueError."""
        if truncate_size < 1:
            raise ValueError("truncate_size must be at least 1")
        return self._call(lambda instance: instance.inspection.read(name, truncate_size))

    def pause_generation(self, mode: PauseMode = "abort") -> None:
        """Plan no further pass; "abort", "retract" or "in_place" says what becomes of requests (/pause_generation)."""
        if mode not in PAUSE_MODES:
            raise ValueError(f"mode must be one of {', '.join(PAUSE_MODES)}; got {mode!r}")
        self._call(lambda instance: instance.pauses.pause(mode))

    def continue_generation(self) -> None:
        """End the pause, if there is one."""
        self._call(lambda instance: instance.pauses.go_on())

    def release_memory_occupation(self, tags: list[AskedTag] | None = None, mode: SleepMode = "keep") -> None:
        """Give the memory of weights and KV cache back, and sleep; see /release_memory_occupation.

        Args:
            tags: some of "weights", "kv_cache" and "cuda_graph"; none: all.
            mode: "keep", "abort" or "wait": what becomes of requests.

        Raises ValueError if it can't be done: then nothing has changed.
        """
        _check_words(tags, ASKED_TAGS, "tags")
        _check_words([mode], SLEEP_MODES, "mode")
        self._call(lambda instance: instance.sleep.release(tags or ASKED_TAGS, mode))

    def resume_memory_occupation(self, tags: list[AskedTag] | None = None, address: str | None = None) -> None:
        """Take memory again, with the same weights in it; generate when nothing is missing any more.

        Args:
            tags: as above.
            address: host:port of an instance that has the weights, to be asked before others.

        Raises ValueError if it can't be done: then the engine sleeps on.
        """
        _check_words(tags, ASKED_TAGS, "tags")
        self._call(lambda instance: instance.sleep.resume(tags or None, address))

    @abstractmethod
    def _call(self, work: Callable[[Instance], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `work` with the instance, on its event loop."""


def _check_words(given: Collection[str] | None, known: Collection[str], name: str) -> None:
    if unknown := set(given or ()).difference(known):
        raise ValueError(f"{name} must be of {', '.join(known)}; got {sorted(unknown)[0]!r}")
