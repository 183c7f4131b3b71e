"""Runs a scheduler with its model in the test's own process: messages go in and come out without sockets."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.device_config import pick_device
from ramet.srt.configs.load_config import LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.lora.adapter import LoraFile
from ramet.srt.lora.adapter_files import find_adapter_file, read_adapter
from ramet.srt.managers.grammar_pool import make_grammar_pool
from ramet.srt.managers.io_struct import (
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    FinishReason,
    LoadLoraReqInput,
    LoraReqOutput,
    Message,
    RequestOutput,
    TokenizedGenerateReqInput,
    TokenLogprobs,
    UnloadLoraReqInput,
)
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_loop import SchedulerLoop
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.server_args import ServerArgs
from ramet.srt.text.tokenizer import Tokenizer

GRAMMAR_TIMEOUT_S = 30.0


class DirectChannel:
    """Stands in for the scheduler's sockets."""

    def __init__(self) -> None:
        self.inbox: list[Message] = []
        self.outputs: list[RequestOutput] = []
        self.replies: list[Message] = []

    def receive(self, timeout_s: float) -> list[Message]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, output: BatchTokenIDOutput) -> None:
        self.outputs += output.outputs

    def reply(self, message: Message) -> None:
        if isinstance(message, BatchEmbeddingOutput):
            self.outputs += message.outputs
        else:
            self.replies.append(message)


class EngineHarness:
    """A scheduler that a test steps by hand."""

    def __init__(self, folder: str | Path, *, overlap: bool = False, **server_args: Any):
        defaults: dict[str, Any] = {"max_total_tokens": 2048, "max_running_requests": 16, "page_size": 4}
        self.args = ServerArgs(model_path=str(folder), **(defaults | server_args))
        device = pick_device(self.args.device, 0)
        config = ModelConfig.from_path(
            str(folder),
            dtype=self.args.dtype,
            context_length=self.args.context_length,
            quantization=self.args.quantization,
            is_embedding=self.args.is_embedding,
            kv_cache_dtype=self.args.kv_cache_dtype,
        )
        runner_config = self.args.runner_config(device.type, dtype=config.dtype, quantization=config.quantization)
        self.runner = ModelRunner(runner_config, config, ParallelConfig(), device, lambda phase: None, LoadContext())
        torch.set_num_threads(1)  # such small models run slower on threads that wait for each other
        self.channel = DirectChannel()
        get_tokenizer = functools.cache(functools.partial(Tokenizer.from_path, str(folder)))
        grammar_pool = make_grammar_pool(self.args.grammar_backend, lambda: str(folder), config)
        scheduler_config = dataclasses.replace(self.args.scheduler_config(device.type), overlap=overlap)
        self.scheduler = Scheduler(scheduler_config, config, self.runner, get_tokenizer, grammar_pool, self.channel)
        self.loop = SchedulerLoop(self.scheduler, self.channel)
        self.num_batches = 0
        self.max_batch_size = 0

    def submit(
        self,
        rid: str,
        input_ids: Sequence[int],
        *,
        logprob_start_len: int | None = None,
        top: int = 0,
        return_logprob: bool = False,
        stream: bool = False,
        priority: int = 0,
        bad_words_ids: Sequence[Sequence[int]] = (),
        pooling: Pooling | None = None,
        lora_id: int = 0,
        **params: Any,
    ) -> None:
        """Queue one request; `logprob_start_len` asks for prompt log-probabilities too."""
        params = {"temperature": 0.0, "ignore_eos": True} | params
        self.channel.inbox.append(
            TokenizedGenerateReqInput(
                rid=rid,
                input_ids=list(input_ids),
                sampling_params=SamplingParams(**params),
                stream=stream,
                return_logprob=return_logprob or logprob_start_len is not None,
                logprob_start_len=-1 if logprob_start_len is None else logprob_start_len,
                top_logprobs_num=top,
                priority=priority,
                bad_words_ids=[list(ids) for ids in bad_words_ids],
                pooling=pooling,
                lora_id=lora_id,
            )
        )

    def load_adapter(self, lora_id: int, folder: str | Path, *, pinned: bool = False) -> str:
        """Load an adapter from a folder; why it was refused, or ""."""
        adapter = read_adapter(f"adapter {lora_id}", str(folder))
        source = LoraFile(path=find_adapter_file(str(folder)))
        message = LoadLoraReqInput(
            request_id=f"load {lora_id}", lora_id=lora_id, adapter=adapter, source=source, pinned=pinned
        )
        return self.ask_for_adapter(message)

    def ask_for_adapter(self, message: LoadLoraReqInput | UnloadLoraReqInput) -> str:
        """The answer's message, after as many passes as it takes."""
        self.channel.replies.clear()
        self.send(message)
        while not self.channel.replies:
            self.step()
        (reply,) = self.channel.replies
        assert isinstance(reply, LoraReqOutput) and reply.request_id == message.request_id
        assert reply.success == (not reply.message)
        return reply.message

    def send(self, message: Message) -> None:
        self.channel.inbox.append(message)

    def step(self) -> bool:
        """Take in messages and run one pass; False when there was nothing to run."""
        for message in self.channel.receive(0):
            self.loop.handle(message)
        batch = self.loop.step()
        if batch is not None:
            self.num_batches += 1
            self.max_batch_size = max(self.max_batch_size, len(batch.reqs))
        return batch is not None

    def run(self, max_steps: int = 5000) -> dict[str, "Result"]:
        """Step until everything has ended, check that no cache page is lost, and return what each request got."""
        for _ in range(max_steps):
            self.scheduler.grammar_queue.wait(GRAMMAR_TIMEOUT_S)
            if not self.step() and not self.loop.has_work:
                break
        else:
            raise AssertionError(f"requests still run after {max_steps} passes")
        self.scheduler.check_caches()
        return self.results()

    def results(self) -> dict[str, "Result"]:
        results: dict[str, Result] = {}
        for output in self.channel.outputs:
            results.setdefault(output.rid, Result()).add(output)
        return results

    def generate(self, prompts: Sequence[Sequence[int]], **params: Any) -> list["Result"]:
        """Run the prompts together, and return their results in order."""
        self.channel.outputs.clear()
        for index, prompt in enumerate(prompts):
            self.submit(str(index), prompt, **params)
        results = self.run()
        return [results[str(index)] for index in range(len(prompts))]


class Result:
    """Everything that one request got."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.input_logprobs: TokenLogprobs | None = None
        self.output_logprobs: list[float | None] = []
        self.top_logprobs: list[list[float]] = []
        self.vector = np.zeros(0, dtype=np.float32)  # of a pooled request
        self.versions: list[tuple[str, int]] = []  # of the weights, each with its first output token

    def add(self, output: RequestOutput) -> None:
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason
        self.versions += [(one.version, one.start) for one in output.new_versions]
        self.cached_tokens = output.cached_tokens
        self.vector = np.frombuffer(output.vector, dtype="<f4")
        if output.input_logprobs is not None:
            self.input_logprobs = output.input_logprobs
        if output.output_logprobs is not None:
            self.output_logprobs += output.output_logprobs.logprobs
            self.top_logprobs += output.output_logprobs.top_logprobs
