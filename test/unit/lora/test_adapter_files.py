"""Adapters as peft writes them: what is read of them, and what is refused by its name."""

import json
import math

import pytest
import torch
from lora_adapters import ALL, make_adapter
from ramet.srt.lora.adapter import LoraTargets, check_lora_name
from ramet.srt.lora.adapter_files import read_adapter
from ramet.srt.lora.adapter_paths import LoraPath, read_folder
from random_models import make_model
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama2", tokenizer=False)


@pytest.fixture(autouse=True)
def own_digests(tmp_path, monkeypatch):
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(tmp_path / "digests"))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def modules_of(folder):
    return {module.name: module for module in read_adapter("a", str(folder)).modules}


def test_ranks_and_scales(model, tmp_path):
    folder = make_adapter(
        tmp_path, model, rank=4, alpha=6, ranks={"q_proj": 8, "layers.1.mlp.up_proj": 2}, dtype=torch.bfloat16,
        alpha_pattern={"k_proj": 10, r"layers\.[02].*down_proj": 1},
    )  # fmt: skip
    adapter = read_adapter("some adapter", str(folder))
    assert adapter.name == "some adapter" and adapter.dtype == "bfloat16" and adapter.max_rank == 8
    assert len(adapter.modules) == 3 * len(ALL) and len(adapter.digest) == 64
    modules = modules_of(folder)
    assert (modules["model.layers.0.self_attn.q_proj"].rank, modules["model.layers.0.self_attn.q_proj"].scale) == (
        8, 6 / 8,
    )  # fmt: skip
    assert modules["model.layers.1.self_attn.k_proj"].scale == 10 / 4
    assert [modules[f"model.layers.{i}.mlp.up_proj"].rank for i in range(3)] == [4, 2, 4]
    assert [modules[f"model.layers.{i}.mlp.down_proj"].scale for i in range(3)] == [1 / 4, 6 / 4, 1 / 4]
    edit_config(folder, use_rslora=True)
    assert modules_of(folder)["model.layers.0.self_attn.q_proj"].scale == 6 / math.sqrt(8)


@pytest.mark.parametrize(
    "targets, excluded, layers, chosen",
    [
        (["q_proj", "mlp.up_proj"], [], [], {"0.q", "1.q", "0.up", "1.up"}),
        (["q_proj"], [], [1], {"1.q"}),
        (["q_proj", "up_proj"], ["layers.0.mlp.up_proj"], [], {"0.q", "1.q", "1.up"}),
        (r".*\.0\..*_proj", r".*q_proj", [1], {"0.up"}),
        (r"\.0\..*", [], [], set()),
        ("all-linear", ".*up.*", [], {"0.q", "1.q"}),
    ],
)
def test_targets(targets, excluded, layers, chosen):
    ends = {"q": "self_attn.q_proj", "up": "mlp.up_proj"}
    names = {f"{i}.{short}": f"model.layers.{i}.{end}" for i in range(2) for short, end in ends.items()}
    found = LoraTargets(chosen=targets, excluded=excluded, layers=layers)
    assert {short for short, name in names.items() if found.has(name)} == chosen


def test_layers_by_what_they_are_in():
    names = ["model.layers.1.blocks.2.q_proj", "model.layers.2.blocks.1.q_proj"]
    for layers_in, chosen in (([], 0), (["layers"], 0), (["blocks"], 1), (["x", "blocks"], 1)):
        targets = LoraTargets(chosen=["q_proj"], layers=[1], layers_in=layers_in)
        assert [targets.has(name) for name in names] == [place == chosen for place in range(2)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is not supported"),
        ({"something_new": 1}, "something_new is not supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' is not supported: it changes the model's own matrices"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": "8"}, "r must be a number"),
        ({"r": 7}, "gives it the rank 7"),
        ({"rank_pattern": {"q_proj": 9}}, "gives it the rank 9"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern 'q_proj' must be a number above 0"),
        ({"rank_pattern": {"(": 9}}, "no regular expression"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "does not name as targets"),
        ({"exclude_modules": ["layers.1.mlp.up_proj"]}, "does not name as targets"),
    ],
)
def test_configs_that_are_refused(model, tmp_path, change, words):
    folder = make_adapter(tmp_path, model)
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=words):
        read_adapter("a", str(folder))


def test_files_that_are_refused(model, tmp_path):
    folder = make_adapter(tmp_path, model)
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    first = min(whole)

    def refused_with(tensors, words):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=words):
            read_adapter("a", str(folder))

    refused_with({name: whole[name] for name in whole if name != first}, "only one of the two matrices")
    refused_with(whole | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}, "lora_embedding_A")
    refused_with(whole | {first: whole[first].bfloat16()}, "bfloat16, float32: all of it must be one of")
    refused_with({name: value.to(torch.int32) for name, value in whole.items()}, "holds int32")
    refused_with({}, "holds no tensors")
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match="truncated"):
        read_adapter("a", str(folder))
    path.unlink()
    with pytest.raises(ValueError, match="holds no adapter"):
        read_adapter("a", str(folder))
    with pytest.raises(ValueError, match="no adapter folder"):
        read_adapter("a", str(folder / "none"))


@pytest.mark.parametrize("name", ["", " a", "a\n", "a" * 257, "a\0"])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match="an adapter's name must have"):
        check_lora_name(name)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^adapter path .*/none does not exist$"):
        read_folder(LoraPath("a", str(tmp_path / "none")))
