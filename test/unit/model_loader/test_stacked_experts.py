"""Owns the tests of checkpoints that hold all experts of a layer in one tensor."""

import re

import pytest
import random_models as rm
import sharded_models as sm
import torch
import toy_model as toy
from safetensors.torch import save_file

EXPERT = re.compile(r"(.+)\.(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in the other spelling."""
    result, experts = {}, {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            result[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
        else:
            layer = experts.setdefault(match[1], {"gate": [], "up": [], "down": []})
            assert len(layer[PARTS[match[4]]]) == int(match[3])
            layer[PARTS[match[4]]].append(tensor)
    for layer, parts in experts.items():
        gate_up = torch.cat([torch.stack(parts["gate"]), torch.stack(parts["up"])], dim=1)
        result[f"{layer}.mlp.experts.gate_up_proj"] = gate_up
        result[f"{layer}.mlp.experts.down_proj"] = torch.stack(parts["down"])
    return result


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def model(request, tmp_path):
    folder = rm.make_config(tmp_path, request.param)
    whole = sm.build_model(folder, sm.all_ranks(1)[0])
    return folder, sm.random_checkpoint(sm.checkpoint_shapes([whole]))


@pytest.mark.parametrize("topology", [(1, 1), (2, 1), (4, 2)], ids=sm.topology_name)
@pytest.mark.parametrize("num_files", [1, 3])
def test_both_spellings_fill_the_same_bytes(model, tmp_path, topology, num_files):
    folder, tensors = model
    stacked = stack(tensors)
    assert len(stacked) < len(tensors)
    for name, content in (("single", tensors), ("stacked", stacked)):
        (tmp_path / name).mkdir()
        toy.save_checkpoint(tmp_path / name, content, num_files)
    for parallel in sm.all_ranks(*topology):
        manifest = sm.make_manifest(sm.build_model(folder, parallel))
        single, other = (sm.load_from_disk(tmp_path / name, manifest) for name in ("single", "stacked"))
        assert single.memory == other.memory


def break_both(stacked, tensors):
    stacked.update((name, tensor) for name, tensor in tensors.items() if ".experts.1." in name)


def break_rows(stacked, tensors):
    for name in stacked:
        if name.endswith("gate_up_proj"):
            stacked[name] = stacked[name][:, :-1].contiguous()


def break_missing(stacked, tensors):
    for name in [name for name in stacked if name.endswith("experts.down_proj")]:
        del stacked[name]


def break_width(stacked, tensors):
    for name in stacked:
        if name.endswith("experts.down_proj"):
            stacked[name] = stacked[name].transpose(1, 2).contiguous()


def break_number(stacked, tensors):
    for name in stacked:
        if name.endswith("experts.down_proj"):
            stacked[name] = torch.cat([stacked[name]] * 2)


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (break_both, r"experts\.1\.\w+\.weight twice: .*experts\.\w+_proj holds it too"),
        (break_rows, r"lacks .*experts\.0\.\w+\.weight"),
        (break_missing, r"lacks .*experts\.0\.(w2|down_proj)\.weight"),
        (break_width, r"experts\.0\.(w2|down_proj)\.weight has the shape"),
        (break_number, r"tensors that the model does not have: .*experts\.\d+\.(w2|down_proj)\.weight"),
    ],
)
def test_what_does_not_fit_is_named(model, breaker, message):
    folder, tensors = model
    stacked = stack(tensors)
    breaker(stacked, tensors)
    save_file(stacked, folder / "model.safetensors")
    manifest = sm.make_manifest(sm.build_model(folder, sm.all_ranks(1)[0]))
    with pytest.raises(ValueError, match=message):
        sm.load_from_disk(folder, manifest)
