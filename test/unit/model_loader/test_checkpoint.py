"""Owns the tests of loading safetensors files into an arena."""

import json
import os
import struct

import pytest
import torch
import toy_model as toy
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.loader import get_model_loader
from safetensors.torch import save_file


def load(folder, dtype=torch.float32, tp_size=1, tp_rank=0, load_format="auto"):
    model = toy.make_model(tp_size, tp_rank, dtype)
    manifest = toy.make_manifest(model, tp_size, tp_rank)
    arena = allocate_arena(manifest, "cpu")
    arena.bind(model)
    report, _ = get_model_loader(LoadConfig(load_format=load_format)).load_weights(manifest, arena, str(folder))
    return model, report


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_parameter_holds_its_slices(tmp_path, num_files, dtype, stored):
    tensors = toy.checkpoint_tensors(stored)
    toy.save_checkpoint(tmp_path, tensors, num_files)
    model, report = load(tmp_path, dtype)
    toy.assert_loaded(model, toy.expected_tensors(model, tensors))
    assert report.source == "checkpoint" and report.num_bytes > 0
    assert model.lm_head is model.embed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_shard(tmp_path, rank):
    tensors = toy.checkpoint_tensors(torch.bfloat16)
    toy.save_checkpoint(tmp_path, tensors, 2)
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load(tmp_path, dtype, tp_size=2, tp_rank=rank)
        toy.assert_loaded(model, toy.expected_tensors(model, tensors))


def test_harmless_surplus_is_ignored(tmp_path):
    tensors = toy.checkpoint_tensors()
    head = tensors["model.embed_tokens.weight"].clone()  # a tied one that is equal
    extra = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    model, _ = load(tmp_path)
    toy.assert_loaded(model, toy.expected_tensors(model, tensors))


def break_missing(tensors):
    del tensors["layer.k_proj.weight"]


def break_surplus(tensors):
    tensors["layer.unknown"] = torch.zeros(2)


def break_small(tensors):
    tensors["layer.o_proj.weight"] = tensors["layer.o_proj.weight"][:, :-1].contiguous()


def break_large(tensors):
    tensors["layer.o_proj.weight"] = torch.zeros(toy.HIDDEN + 1, toy.HEADS * toy.HEAD_DIM)


def break_dims(tensors):
    tensors["layer.o_proj.weight"] = tensors["layer.o_proj.weight"].flatten()


def break_dtype(tensors):
    tensors["layer.o_proj.weight"] = tensors["layer.o_proj.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (break_missing, "lacks layer.k_proj.weight"),
        (break_surplus, "does not have: layer.unknown in model.safetensors"),
        (break_small, r"layer.o_proj.weight has the shape \(32, 31\), the model needs \(32, 32\)"),
        (break_large, r"layer.o_proj.weight has the shape \(33, 32\), the model needs \(32, 32\)"),
        (break_dims, r"layer.o_proj.weight has the shape \(1024,\)"),
        (break_dtype, r"model\.safetensors: layer\.o_proj\.weight is int32; a weight must be one of float64"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(tmp_path, breaker, message):
    tensors = toy.checkpoint_tensors()
    breaker(tensors)
    toy.save_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    toy.save_checkpoint(tmp_path, toy.checkpoint_tensors())
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    for kept in (size - 1, size // 2, 100, 4, 0):
        os.truncate(path, kept)
        with pytest.raises(ValueError, match="model.safetensors.*truncated"):
            load(tmp_path)


def header_file(path, header: bytes, data: bytes = b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 399999999996]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 18446744073709551616], "data_offsets": [0, 0]}}',
    ],
)
def test_a_broken_header_is_named(tmp_path, header):
    header_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a safetensors index"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": ' + "[" * 30_000, "is not a safetensors index"),
        ('{"weight_map": []}', "is not a safetensors index"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "outside the model folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "other"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(ValueError, match=f"{name} is no file"):
        load(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_there(tmp_path):
    toy.save_checkpoint(tmp_path, toy.checkpoint_tensors(), 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layer.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not have layer.ghost"):
        load(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(ValueError, match="there are no weights"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin is of a format"):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no model folder"):
        load(tmp_path / "nowhere")


def test_dummy_weights_repeat_with_the_seed(tmp_path):
    first, report = load(tmp_path, load_format="dummy")
    second, _ = load(tmp_path, load_format="dummy")
    assert report.source == "dummy"
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.qkv.std() > 0.001 and not first.embed[toy.VOCAB :].any()
