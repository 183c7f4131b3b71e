"""Owns the tests of checkpoints that hold all experts of a layer in one tensor."""

import re

import fp8_models as fp8
import pytest
import random_models as rm
import sharded_models as sm
import torch
import toy_model as toy
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from safetensors.torch import load_file, save_file

EXPERT = re.compile(r"(.+)\.(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight(_scale_inv)?")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def stack(tensors: dict[str, torch.Tensor], *, is_turned: bool = False) -> dict[str, torch.Tensor]:
    """The same weights in the other spelling.

    Args:
        is_turned: with columns before rows, as Qwen3-VL-MoE is published.
    """
    result, experts = {}, {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            result[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
        else:
            layer = experts.setdefault((match[1], match[5] or ""), {"gate": {}, "up": {}, "down": {}})
            layer[PARTS[match[4]]][int(match[3])] = tensor
    for (layer, end), parts in experts.items():
        gate, up, down = (torch.stack([part[expert] for expert in range(len(part))]) for part in parts.values())
        for name, stacked in (("gate_up_proj", torch.cat([gate, up], dim=1)), ("down_proj", down)):
            made = stacked.transpose(1, 2) if is_turned else stacked
            result[f"{layer}.mlp.experts.{name}{end}"] = made.contiguous()
    return result


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def model(request, tmp_path):
    folder = rm.make_config(tmp_path, request.param)
    whole = sm.build_model(folder, sm.all_ranks(1)[0])
    return folder, sm.random_checkpoint(sm.checkpoint_shapes([whole]))


@pytest.mark.parametrize("topology", [(1, 1), (2, 1), (4, 2)], ids=sm.topology_name)
@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("is_turned", [False, True])
def test_both_spellings_fill_the_same_bytes(model, tmp_path, topology, num_files, is_turned):
    folder, tensors = model
    stacked = stack(tensors, is_turned=is_turned)
    assert len(stacked) < len(tensors)
    for name, content in (("single", tensors), ("stacked", stacked)):
        (tmp_path / name).mkdir()
        toy.save_checkpoint(tmp_path / name, content, num_files)
    for parallel in sm.all_ranks(*topology):
        manifest = sm.make_manifest(sm.build_model(folder, parallel))
        single, other = (sm.load_from_disk(tmp_path / name, manifest) for name in ("single", "stacked"))
        assert single.memory == other.memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_that_were_turned_round_are_compared_with_the_files(model, tmp_path, dtype):
    """Some lines of them, whatever type they have in the files."""
    folder, tensors = model
    turned = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stack(tensors, is_turned=True).items()}
    save_file(turned, folder / "model.safetensors")
    for parallel in sm.all_ranks(4, 2)[1:3]:
        arena = sm.load_from_disk(folder, sm.make_manifest(sm.build_model(folder, parallel)))
        source = CheckpointSource(str(folder))
        assert source.find_difference(arena) is None and source.converted_names == []
        for entry in arena.manifest.entries:
            if "experts" in entry.name:
                arena.tensor(entry)[1:].neg_()
                assert source.find_difference(arena) == entry.name
                arena.tensor(entry)[1:].neg_()


@pytest.mark.parametrize("is_online", [False, True])
def test_turned_stacks_in_fp8(tmp_path, is_online):
    """Quantised in the files, by block, or while they are read."""
    source = rm.make_model(tmp_path / "m", "qwen3_moe", dtype="bfloat16", moe_intermediate_size=48, tokenizer=False)
    folder = source if is_online else fp8.write_fp8(source, tmp_path / "fp8", "blocks", block=(8, 8))
    turned = rm.without_weights(folder, tmp_path / "turned")
    save_file(stack(load_file(folder / "model.safetensors"), is_turned=True), turned / "model.safetensors")
    for parallel in (*sm.all_ranks(1), *sm.all_ranks(2), *sm.all_ranks(2, 2)):
        expected, actual = (fp8.load(path, parallel) for path in (folder, turned))
        assert expected.keys() == actual.keys()
        assert all(fp8.same(tensor, actual[name]) for name, tensor in expected.items())


def test_blocks_that_turned_matrices_do_not_tell_rows_of_are_refused(tmp_path):
    source = rm.make_model(tmp_path / "m", "qwen3_moe", dtype="bfloat16", moe_intermediate_size=48, tokenizer=False)
    folder = fp8.write_fp8(source, tmp_path / "fp8", "blocks", block=(8, 16))
    tensors = stack(load_file(folder / "model.safetensors"), is_turned=True)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"transposed matrices, of which blocks of 8 x 16 may be rows or columns"):
        fp8.load_model(folder)


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
        (break_width, r"in .*experts\.down_proj are transposed, those in .*experts\.gate_up_proj are not"),
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
