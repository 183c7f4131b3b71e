"""Owns what verl does with a rollout server: its own adapter asks it, and its own weight sync updates it.

RL_WEIGHTS names a checkpoint's file, whose tensors verl sends as it sends a trainer's. On a CPU two steps are left out,
which fail where there is no CUDA: verl's copy of each tensor to the GPU, and SGLang's rewriting of the GPU's number in
what is sent.
"""

import asyncio
import os
import sys
from types import SimpleNamespace
from urllib.parse import urlsplit

import torchvision_operators  # noqa: F401 - before what imports torchvision

# isort: split
import sglang.srt.utils.patch_torch as patch_torch
import torch
from safetensors.torch import load_file
from steps import URL, run, step
from torch.distributed.device_mesh import init_device_mesh
from verl.workers.rollout.sglang_rollout import sglang_rollout
from verl.workers.rollout.sglang_rollout.http_server_engine import (
    AsyncHttpServerAdapter,
    HttpServerAdapter,
)

if not torch.cuda.is_available():
    patch_torch.monkey_patch_torch_reductions = lambda: None
    sglang_rollout._to_ipc_device = lambda tensor: tensor
    torch.multiprocessing.set_sharing_strategy("file_system")  # as for any sender of tensors in host memory
for _kind in (AsyncHttpServerAdapter, HttpServerAdapter):
    _kind.__abstractmethods__ = frozenset()  # SGLang since 0.5.13 wants two methods that verl has not, nor calls
PLACE = urlsplit(URL)
SETTINGS = {"host": PLACE.hostname, "port": PLACE.port, "launch_server": False, "max_attempts": 1, "device": "cpu",
            "model_path": os.path.dirname(os.environ["RL_WEIGHTS"])}  # fmt: skip
PROMPT = list(range(10, 30))
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
BUCKET_MB = 1  # several of them make the model


def make_adapter() -> sglang_rollout.ServerAdapter:
    """verl's adapter as a trainer's rank has it, but for Ray, by which it asks for the server's address."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    adapter = sglang_rollout.ServerAdapter.__new__(sglang_rollout.ServerAdapter)
    adapter._engine = AsyncHttpServerAdapter(**SETTINGS)
    adapter._has_server, adapter._pd_role, adapter.sleep_level = True, None, 2
    adapter.device_mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "infer_tp", "infer_pp"))
    sync = SimpleNamespace(update_weights_bucket_megabytes=BUCKET_MB)
    adapter.config = _Config(checkpoint_engine=sync, free_cache_engine=True)
    adapter.model_config = SimpleNamespace(hf_config=SimpleNamespace(model_type="llama"))
    return adapter


class _Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


async def generate(adapter, **options):
    return await adapter._engine.generate(input_ids=PROMPT, sampling_params=GREEDY, **options)


@step
def rollout():
    """The synchronous one."""
    return HttpServerAdapter(**SETTINGS).generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]


async def all_of_it():
    adapter = make_adapter()
    saw = {"before": (await generate(adapter, return_logprob=True))}
    answers = await asyncio.gather(*(generate(adapter) for _ in range(8)))
    saw["at_once"] = [answer["output_ids"] for answer in answers]
    weights = load_file(os.environ["RL_WEIGHTS"])
    saw["megabytes"] = sum(tensor.nbytes for tensor in weights.values()) / (1 << 20)
    await adapter.update_weights(iter(weights.items()))
    saw["after"] = (await generate(adapter))["output_ids"]
    await adapter.release()
    await adapter.resume(tags=["weights"])
    await adapter.update_weights(iter(weights.items()))
    await adapter.resume(tags=["kv_cache"])
    saw["after_sleep"] = (await generate(adapter))["output_ids"]
    saw["models"] = await adapter._engine.available_models()
    await adapter._engine.abort_request(abort_all=True)
    return saw


@step
def weight_sync():
    """Rollouts, weights, more rollouts; asleep, awake with weights that are sent first, as verl's loop does."""
    return asyncio.run(all_of_it())


def keep_output() -> None:
    """Have torch's process for shared memory, which outlives this one, hold nothing that others read to its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        number = stream.fileno()
        kept = os.fdopen(os.dup(number), "w")  # no child inherits it
        os.dup2(nowhere, number)
        setattr(sys, stream.name.strip("<>"), kept)


if __name__ == "__main__":
    keep_output()
    sys.exit(run())
