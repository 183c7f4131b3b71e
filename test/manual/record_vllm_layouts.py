"""Writes test/unit/integrations/vllm_layouts.json anew: what vLLM's own loading puts where, for some small models.

For an environment that has vLLM's CPU build, Ramet and integrations/vllm:
    PYTHONPATH=test:python python test/manual/record_vllm_layouts.py
"""

import json
import socket
import tempfile
from pathlib import Path

import msgspec
import random_models as rm
import sharded_models as sm
import torch
import vllm
from ramet_vllm.model_memory import ModelMemory
from ramet_vllm.seed_tensors import collect_tensors
from ramet_vllm.watched_load import watch_load
from vllm import distributed
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

TARGET = Path(__file__).resolve().parents[1] / "unit" / "integrations" / "vllm_layouts.json"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
MODELS = {  # family: entries of config.json
    "qwen3": {**SIZES, "num_hidden_layers": 1, "intermediate_size": 96},
    "qwen3_moe": {**SIZES, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 32},
    "llama3": {**SIZES, "num_hidden_layers": 1, "intermediate_size": 96},
}
CASES = [  # family, tensor-parallel size, rank, whether experts are split whole
    ("qwen3", 1, 0, False),
    ("qwen3", 2, 0, False),
    ("qwen3", 2, 1, False),
    ("qwen3", 4, 3, False),
    ("qwen3_moe", 1, 0, False),
    ("qwen3_moe", 2, 1, False),
    ("qwen3_moe", 2, 1, True),
    ("llama3", 1, 0, False),
    ("llama3", 2, 1, False),
]


def record(family: str, tp_size: int, rank: int, has_expert_parallel: bool) -> dict:
    """One rank's tensors and what is put into them, as the model's own loading code does it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rm.make_config(folder, family, **MODELS[family])
        manifest = sm.make_manifest(sm.build_model(folder, sm.all_ranks(1)[0]))
        rm.write_tokenizer(folder)
        args = EngineArgs(model=name, max_model_len=64, enforce_eager=True)
        config = args.create_engine_config()
        config.parallel_config.enable_expert_parallel = has_expert_parallel
        with set_current_vllm_config(config):
            _play_rank(tp_size, rank)
            with set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(vllm_config=config)
        memory = ModelMemory(model)
        offered = collect_tensors([manifest]).values()
        placed = watch_load(model.load_weights, memory.tensors, offered, readable=memory.buffers)
    tensors = {one.name: (one.dtype.removeprefix("torch."), one.shape) for one in memory.describe(placed.boxes)}
    return {
        "family": family, "tp_size": tp_size, "rank": rank, "has_expert_parallel": has_expert_parallel,
        "tensors": tensors, "boxes": placed.boxes, "zeros": placed.zeros,
    }  # fmt: skip


def _play_rank(tp_size: int, rank: int) -> None:
    """Have this one process believe that it is a rank of several: nothing is sent while a model is made."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    distributed.initialize_model_parallel(1, 1)
    groups = [parallel_state.get_tp_group(), *([parallel_state._EP] if parallel_state._EP is not None else [])]
    for group in groups:
        group.world_size, group.rank_in_group, group.ranks = tp_size, rank, list(range(tp_size))


def main() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    distributed.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    found = {"vllm": vllm.__version__, "models": MODELS, "cases": [record(*case) for case in CASES]}
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(json.loads(msgspec.json.encode(found)), separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
