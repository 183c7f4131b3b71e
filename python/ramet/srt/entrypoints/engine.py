"""Owns `Engine`: one instance inside a Python program, without HTTP, for synchronous and asynchronous callers.

The instance lives on an event loop in a thread of its own, so the caller may have a running loop or none.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

from ramet.srt.entrypoints.child_processes import SCHEDULER_MODULE
from ramet.srt.entrypoints.encode_request import answer_encode
from ramet.srt.entrypoints.engine_tensors import EngineTensors
from ramet.srt.entrypoints.generate_request import GenerateReqInput, Output, answer_request, stream_request
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.instance_info import server_info
from ramet.srt.entrypoints.openai.pooling_protocol import EncodeReqInput
from ramet.srt.errors import ServiceError
from ramet.srt.lora.adapter_paths import LoraPath
from ramet.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

SERVER_ONLY = ("log_requests", "otlp_traces_endpoint", "ssl_certfile", "cors_allow_origins", "root_path")

Result = TypeVar("Result")
Prompt = str | list[str]
Ids = list[int] | list[list[int]]
STREAM_END = None
ENDED = "the engine has been shut down"


class Engine(EngineTensors):
    """One instance in this program. Takes every field of ServerArgs; those of HTTP mean nothing here, or are refused.

    Usable as a context manager. What is still running when the program ends is ended with it.

    Raises:
        ValueError: for a wrong argument, model folder or tokenizer.
        LaunchError: (a RuntimeError) if the instance can't start; the message says why.
    """

    scheduler_module = SCHEDULER_MODULE  # tests put another in its place

    def __init__(self, **server_args: Any):
        self.server_args = make_server_args(server_args)
        without_http = dataclasses.replace(self.server_args, port=0)
        self._core = EngineCore(Instance(without_http, time.time(), self.scheduler_module))
        # Not `self.shutdown`: that would keep the engine alive until the program ends.
        self._finalizer = weakref.finalize(self, self._core.stop)
        self._core.start()

    def generate(
        self,
        prompt: Prompt | None = None,
        sampling_params: Output | list[Output] | None = None,
        input_ids: Ids | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Output | list[Output] | Iterator[Output]:
        """Continue one or several prompts.

        Args:
            prompt: text, or a list of texts; or else `input_ids`: token ids, or a list of lists.
            sampling_params: as in /generate; one object, or one for each prompt.
            stream: yield outputs as they grow, each with all text so far.
            options: the other fields of /generate: return_logprob, logprob_start_len, top_logprobs_num, …

        Returns:
            What /generate answers: one output, or a list for a list of prompts or for n above 1.

        Raises:
            ValueError: for a wrong argument; the message names it.
            ServiceError: (a RuntimeError) if the engine has been shut down or a process of it has died.
        """
        request = self._request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._core.iterate(request)
        return self._core.call(self._core.answer(request))

    async def async_generate(
        self,
        prompt: Prompt | None = None,
        sampling_params: Output | list[Output] | None = None,
        input_ids: Ids | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Output | list[Output] | AsyncIterator[Output]:
        """As `generate`, for a running event loop: await it; with `stream` the result is an async iterator."""
        request = self._request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._core.aiterate(request)
        return await self._core.acall(self._core.answer(request))

    def encode(
        self, prompt: Prompt | None = None, input_ids: Ids | None = None, **options: Any
    ) -> Output | list[Output]:
        """The embedding of one or several prompts, by a model that makes some.

        Args:
            prompt: text, or a list of texts; or else `input_ids`: token ids, or a list of lists.
            options: the other fields of /encode: dimensions, rid.

        Returns:
            What /encode answers: an object with `embedding`, or a list for a list of prompts.

        Raises what `generate` raises.
        """
        return self._core.call(self._core.encode(EncodeReqInput.make(text=prompt, input_ids=input_ids, **options)))

    async def async_encode(
        self, prompt: Prompt | None = None, input_ids: Ids | None = None, **options: Any
    ) -> Output | list[Output]:
        """As `encode`, for a running event loop: await it."""
        request = EncodeReqInput.make(text=prompt, input_ids=input_ids, **options)
        return await self._core.acall(self._core.encode(request))

    def get_server_info(self) -> Output:
        """What /get_server_info answers."""
        return self._core.call(self._core.server_info())

    def flush_cache(self) -> bool:
        """Drop the prefix cache; False if requests are running."""
        return self._core.call(self._core.flush_cache())

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> None:
        """Load an adapter: requests name it by `lora_path`, as in /generate.

        Args:
            lora_path: folder, hub id, or instance://HOST:PORT.
            pinned: once requests have used it, it stays in its slot.

        Raises:
            ValueError: if it can't be loaded; the message says why.
        """
        self._core.call(self._core.load_lora_adapter(LoraPath(lora_name, lora_path, pinned)))

    def unload_lora_adapter(self, lora_name: str) -> None:
        """Give an adapter to no further request, and drop it when those that have it have ended. Raises ValueError."""
        self._core.call(self._core.unload_lora_adapter(lora_name))

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the request with the id `rid`, or all of them: they finish with what they have."""
        if abort_all == bool(rid):
            raise ValueError("exactly one of rid and abort_all must be given")
        self._core.call(self._core.abort(rid))

    def shutdown(self) -> None:
        """End the instance and its processes. May be called again."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _call(self, work: Callable[[Instance], Coroutine[Any, Any, Result]]) -> Result:
        return self._core.call(work(self._core.instance))

    @staticmethod
    def _request(
        prompt: Prompt | None, sampling_params: Any, input_ids: Ids | None, stream: bool, options: dict[str, Any]
    ) -> GenerateReqInput:
        return GenerateReqInput.make(
            text=prompt, input_ids=input_ids, sampling_params=sampling_params, stream=stream, **options
        )


def make_server_args(fields: dict[str, Any]) -> ServerArgs:
    """ServerArgs of keyword arguments. Raises ValueError for an unknown or missing one, and for a wrong value."""
    known = [field.name for field in dataclasses.fields(ServerArgs)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; the known ones are {', '.join(known)}")
    if "model_path" not in fields:
        raise ValueError("model_path must be given")
    if of_servers := [name for name in SERVER_ONLY if fields.get(name)]:
        raise ValueError(f"{of_servers[0]} is for servers: an Engine has no HTTP")
    return ServerArgs(**fields)


class EngineCore:
    """The thread, the event loop and the instance in it. Holds no reference to its Engine."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._closed = False
        self._lock = threading.Lock()  # nothing is submitted to a loop that nobody will run again
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        # The children die with the thread that starts them: it is this one, which lives as long as they shall.
        self._thread = threading.Thread(target=self._run, name="ramet engine", daemon=True)

    def start(self) -> None:
        """Return when the instance is ready. Raises ValueError or LaunchError if it can't be."""
        self._thread.start()
        try:
            error = self._started.get()
        except BaseException:  # a Ctrl-C while the weights are loading
            self.stop()
            raise
        if error is not None:
            self._thread.join()
            raise error

    def stop(self) -> None:
        """End the instance and the thread."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._end.set)
            if threading.current_thread() is not self._thread:  # it is, if the garbage collector calls from there
                self._thread.join()

    def _run(self) -> None:
        try:
            self.instance.start()
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._started.put(error)  # `start` raises it, if it still waits
            if self.instance.schedulers:
                raise
        finally:
            self.instance.stop_processes()
            self._close_loop()

    def _close_loop(self) -> None:
        """As asyncio.Runner does it, but without a new thread: there are none while the interpreter ends."""
        with self._lock:
            self._closed = True
        self._loop.run_until_complete(_cancel_other_tasks())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self) -> None:
        try:
            self.instance.open(on_death=self._on_death, on_end=self._end.set)
            if await self.instance.wait_ready(self._end):
                self._started.put(None)
                await self._end.wait()
        finally:
            await self.instance.close()

    def _on_death(self, line: str) -> None:
        logger.error("%s; the engine has ended", line)
        self._end.set()

    # ---- for callers in other threads ----

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, run on the engine's loop."""
        try:
            return self._submit(work).result()
        except concurrent.futures.CancelledError:
            raise self._ended_error() from None

    async def acall(self, work: Coroutine[Any, Any, Result]) -> Result:
        """As `call`, from a coroutine on another loop. Cancelling it cancels `work`."""
        future = self._submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise self._ended_error() from None  # the engine's loop has ended, not the caller

    def iterate(self, request: GenerateReqInput) -> Iterator[Output]:
        """The outputs of a streamed request; leaving the loop early aborts it."""
        outputs: queue.SimpleQueue[Output | BaseException | None] = queue.SimpleQueue()
        future = self._submit_stream(request, outputs.put)
        try:
            while (item := outputs.get()) is not STREAM_END:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    async def aiterate(self, request: GenerateReqInput) -> AsyncIterator[Output]:
        """As `iterate`, from a coroutine on another loop."""
        outputs: asyncio.Queue[Output | BaseException | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: Output | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop has been closed
                loop.call_soon_threadsafe(outputs.put_nowait, item)

        future = self._submit_stream(request, put)
        try:
            while (item := await outputs.get()) is not STREAM_END:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
        with self._lock:
            if self._closed:
                work.close()
                raise self._ended_error()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _submit_stream(
        self, request: GenerateReqInput, put: Callable[[Output | BaseException | None], None]
    ) -> "concurrent.futures.Future[None]":
        """`put` gets the outputs, and at last an exception or STREAM_END."""

        def put_end(future: "concurrent.futures.Future[None]") -> None:
            put(self._ended_error() if future.cancelled() else future.exception() or STREAM_END)

        future = self._submit(self._stream_into(request, put))
        future.add_done_callback(put_end)
        return future

    def _ended_error(self) -> ServiceError:
        return ServiceError(self.instance.death or ENDED)

    # ---- on the engine's loop ----

    async def answer(self, request: GenerateReqInput) -> Output | list[Output]:
        """The outputs of a request that is not streamed."""
        self._choose_model(request)
        return await answer_request(self.instance.manager, request)

    async def encode(self, request: EncodeReqInput) -> Output | list[Output]:
        """The embeddings of a request."""
        return await answer_encode(self.instance.manager, request)

    async def server_info(self) -> Output:
        """What /get_server_info answers."""
        return server_info(self.instance, await self.instance.manager.internal_states())

    async def flush_cache(self) -> bool:
        """Whether the prefix cache was dropped."""
        return (await self.instance.manager.flush_cache()).success

    async def abort(self, rid: str) -> int:
        """End the request `rid`, or all for "": the number of sequences that this concerns."""
        return self.instance.manager.abort(rid) if rid else self.instance.manager.abort_all()

    async def load_lora_adapter(self, path: LoraPath) -> None:
        """Load an adapter."""
        await self.instance.lora.load(path)

    async def unload_lora_adapter(self, name: str) -> None:
        """Unload one, once no request has it."""
        await self.instance.lora.unload(name)

    def _choose_model(self, request: GenerateReqInput) -> None:
        request.choose_model(self.instance.manager.adapters, self.instance.server_args.model_name)

    async def _stream_into(self, request: GenerateReqInput, put: Callable[[Output], None]) -> None:
        self._choose_model(request)
        async with aclosing(stream_request(self.instance.manager, request)) as outputs:
            async for output in outputs:
                put(output)


async def _cancel_other_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
