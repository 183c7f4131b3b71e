"""The digest of a checkpoint: one for all topologies, each of whose shards can be checked against it; none can lie."""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import fp8_models as fp8
import numpy as np
import pytest
import random_models as rm
import sharded_models as sm
import torch
import toy_model as toy
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.model_loader.checkpoint import digest_store
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checkpoint.digest_store import compute_table, find_table, load_table
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.client import band_check
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.weights import content_digest
from ramet.srt.weights.content_digest import build_table, column_bands, row_bands

EXPERT = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
# Sizes that are no powers of two, an odd vocabulary whose last rank has padding, KV heads that ranks share, experts.
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 149}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(tmp_path / "digests"))
    return tmp_path / "digests"


def make_config(folder: Path, family: str) -> None:
    rm.make_config(folder, family, **SMALL | ({"mlp_only_layers": []} if "moe" in family else {}))


def make_checkpoint(folder: Path, family: str = "qwen3") -> dict[str, torch.Tensor]:
    make_config(folder, family)
    tensors = sm.random_checkpoint(sm.checkpoint_shapes([sm.build_model(folder, sm.all_ranks(1)[0])]))
    toy.save_checkpoint(folder, tensors, 2)
    return tensors


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_every_shard_of_every_topology_is_checked_and_no_byte_can_differ(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    table = compute_table(str(tmp_path))
    numbers = np.random.default_rng(0)
    topologies = [(1, 1), (2, 1), (4, 1)] + ([(2, 2), (4, 2)] if "moe" in family else [])
    for parallel in [rank for topology in topologies for rank in sm.all_ranks(*topology)]:
        manifest = sm.make_manifest(sm.build_model(tmp_path, parallel))
        arena = sm.load_from_disk(tmp_path, manifest)
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
        for entry in manifest.entries if parallel.world_rank == parallel.world_size - 1 else ():
            place = entry.offset + int(numbers.integers(entry.nbytes))
            arena.memory[place] ^= 1  # in the padding of a table, too
            assert check_bands(arena, table).wrong == {entry.name}, f"byte {place - entry.offset} of {entry.name}"
            arena.memory[place] ^= 1


def test_memory_that_is_no_host_memory_is_read_by_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    table = compute_table(str(tmp_path))
    arena = sm.load_from_disk(tmp_path, sm.make_manifest(sm.build_model(tmp_path, sm.all_ranks(2)[1])))
    monkeypatch.setattr(band_check, "HostWeightArena", type("Another", (), {}))
    for place in (None, *(entry.offset + entry.nbytes - 1 for entry in arena.manifest.entries[::3])):
        if place is not None:
            arena.memory[place] ^= 1
        check = check_bands(arena, table)
        assert len(check.wrong) == (place is not None) and not check.unchecked
        if place is not None:
            arena.memory[place] ^= 1


@pytest.mark.parametrize("is_turned", [False, True])
def test_experts_that_the_files_stack_are_found_in_their_stack(tmp_path: Path, is_turned: bool) -> None:
    tensors = make_checkpoint(tmp_path / "m", "qwen3_moe")
    layers: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    stacked = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        else:
            layers.setdefault(match[1], {})[match[3], int(match[2])] = tensor
    for layer, parts in layers.items():
        experts = range(len(parts) // 3)
        stacked[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([parts["gate", i], parts["up", i]]) for i in experts]
        )
        stacked[f"{layer}.mlp.experts.down_proj"] = torch.stack([parts["down", i] for i in experts])
    for name in [name for name in stacked if ".experts." in name and is_turned]:
        stacked[name] = stacked[name].transpose(1, 2).contiguous()
    make_config(tmp_path / "s", "qwen3_moe")
    toy.save_checkpoint(tmp_path / "s", stacked, 1)
    table = compute_table(str(tmp_path / "s"))
    for parallel in (*sm.all_ranks(2), *sm.all_ranks(4, 2)):
        arena = sm.load_from_disk(tmp_path / "s", sm.make_manifest(sm.build_model(tmp_path / "s", parallel)))
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
        expert = next(entry for entry in arena.manifest.entries if "experts" in entry.name)
        arena.memory[expert.offset] ^= 1
        assert check_bands(arena, table).wrong == {expert.name}


@pytest.mark.parametrize(
    ("family", "scales"),
    [("phi3", ""), ("phi3", "ct_tensor"), ("phi3", "blocks"), ("qwen3_vl", ""), ("qwen3_vl_moe", "")],
)
def test_fused_tensors_and_those_of_a_part_are_found(tmp_path: Path, family: str, scales: str) -> None:
    folder = rm.make_model(tmp_path / "plain", family)
    if scales:
        folder = fp8.write_fp8(folder, tmp_path / "fp8", scales)
    table, config = compute_table(str(folder)), ModelConfig.from_path(str(folder))
    for parallel in (sm.all_ranks(1)[0], *sm.all_ranks(2)):
        manifest = sm.make_manifest(sm.build_model(folder, parallel))
        opener = CheckpointOpener(functools.partial(describe_whole_model, config, manifest))
        arena = sm.load_from_disk(folder, manifest, opener)
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
        for entry in arena.manifest.entries:
            if entry.name.endswith(("qkv_proj.weight", "down_proj.weight")):
                for place in (entry.offset, entry.offset + entry.nbytes - 1):
                    arena.memory[place] ^= 1
                    assert check_bands(arena, table).wrong == {entry.name}
                    arena.memory[place] ^= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_widened_while_it_is_loaded_is_compared_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path)
    toy.save_checkpoint(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, 2)
    table = compute_table(str(tmp_path))
    numbers = np.random.default_rng(0)
    for parallel in sm.all_ranks(2):
        arena = sm.load_from_disk(tmp_path, sm.make_manifest(sm.build_model(tmp_path, parallel)))
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
        for entry in arena.manifest.entries:
            place = entry.offset + int(numbers.integers(entry.nbytes))
            arena.memory[place] ^= 1  # in bits that the narrower type does not have, too
            assert check_bands(arena, table).wrong == {entry.name}
            arena.memory[place] ^= 1


@pytest.mark.parametrize(
    ("family", "kind", "scale_dtype"),
    [
        ("llama3", "rows", None),
        ("llama3", "weights_only", None),
        ("llama3", "modelopt", None),
        ("llama3", "ct_blocks", torch.bfloat16),
        ("qwen3_moe", "tensor", None),
        ("llama3", "blocks", torch.float8_e8m0fnu),
        ("qwen3_moe", "blocks", torch.bfloat16),
    ],
)
def test_fp8_weights_and_their_scales_are_compared(
    family: str, kind: str, scale_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Scales of rows, matrices and blocks, under both names, float32 or narrower in the files."""
    changes = {"mlp_only_layers": []} if "moe" in family else {}
    source = rm.make_model(tmp_path / "plain", family, dtype="bfloat16", num_hidden_layers=1, **changes)
    types = {} if scale_dtype is None else {"scale_dtype": scale_dtype}
    folder = fp8.write_fp8(source, tmp_path / "fp8", kind, **types)
    table = compute_table(str(folder))
    for parallel in sm.all_ranks(2):
        model = sm.build_model(folder, parallel)
        manifest = sm.make_manifest(model)
        whole = describe_whole_model(model.config, manifest)
        arena = sm.load_from_disk(folder, manifest, lambda path, whole=whole: CheckpointSource(path, whole))
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
        scales = [entry for entry in manifest.entries if entry.name.endswith(("_scale", "_scale_inv"))]
        for entry in scales:
            for place in (0, entry.nbytes - 1):
                arena.memory[entry.offset + place] ^= 1
                assert check_bands(arena, table).wrong == {entry.name}, place
                arena.memory[entry.offset + place] ^= 1
        assert scales


def test_what_is_cast_while_it_is_loaded_is_not_said_to_be_checked(tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path)
    name = next(name for name in tensors if "down_proj" in name)
    toy.save_checkpoint(tmp_path, tensors | {name: tensors[name].double()}, 2)
    arena = sm.load_from_disk(tmp_path, sm.make_manifest(sm.build_model(tmp_path, sm.all_ranks(1)[0])))
    check = check_bands(arena, compute_table(str(tmp_path)))
    assert not check.wrong
    assert check.unchecked == {name: f"{name} is float64 in the checkpoint and float32 here"}


def test_bands_lie_where_ranks_are_cut() -> None:
    for extent, size in ((4096, 16), (11008, 8), (27648, 12), (5120, 10), (768, 3)):
        step = extent // size
        assert {start for start, _ in row_bands(extent)} >= set(range(0, extent, step))
        assert {start for start, _ in column_bands((1, extent))} >= set(range(0, extent, step))
    vocab = {start for start, _ in row_bands(50257)}
    assert vocab >= {50304 // 8 * rank for rank in range(8)}, "of a table that is padded to a multiple of 64"


def test_the_digest_is_what_the_docs_say(tmp_path: Path) -> None:
    tensors = {"b.bias": torch.arange(3, dtype=torch.int32), "a.weight": torch.arange(12.0).view(3, 4)}
    toy.save_checkpoint(tmp_path, tensors, 1)

    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    a, b = tensors["a.weight"].numpy(), tensors["b.bias"].numpy()
    columns = b"".join(sha(np.ascontiguousarray(a[:, i : i + 1]).tobytes())[:16] for i in range(4))
    rows = b"".join(sha(a[i : i + 1].tobytes())[:16] for i in range(3))
    leaves = sha(b'["a.weight","float32",[3,4]]' + sha(rows) + sha(columns))
    elements = b"".join(sha(b[i : i + 1].tobytes())[:16] for i in range(3))
    leaves += sha(b'["b.bias","int32",[3]]' + sha(elements) + sha(b""))
    assert compute_table(str(tmp_path)).digest == hashlib.sha256(b"ramet-weights-1\n" + leaves).hexdigest()


def test_a_table_that_lies_has_another_digest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    table = compute_table(str(tmp_path))
    first = next(iter(table.tensors.values()))
    for lie in (
        {"rows": bytes(16) + first.rows[16:]},
        {"dtype": "int32"},
        {"name": first.name + "x"},
        {"shape": (*first.shape, 1), "columns": b""},
    ):
        fields = {name: getattr(first, name) for name in first.__struct_fields__} | lie
        others = [one for one in table.tensors.values() if one is not first]
        try:
            assert build_table([type(first)(**fields), *others]).digest != table.digest
        except ValueError as error:
            assert first.name in str(error)


def test_what_is_stored_holds_for_as_long_as_the_files_stay(tmp_path: Path, store: Path) -> None:
    make_checkpoint(tmp_path / "m")
    folder = str(tmp_path / "m")
    assert find_table(folder) is None
    table = load_table(folder)
    assert find_table(folder) == table == load_table(folder)
    (tmp_path / "link").symlink_to(folder)
    assert find_table(str(tmp_path / "link")) == table
    shard = next(Path(folder).glob("*.safetensors"))
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert find_table(folder) is None, "though size, time and inode are what they were"
    assert load_table(folder).digest != table.digest
    for path in store.glob("*.msgpack"):
        path.write_bytes(path.read_bytes()[:-9])
    assert find_table(folder) is None


def test_a_table_is_handed_on_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    table = compute_table(str(tmp_path))
    monkeypatch.setattr(content_digest, "MAX_PART_BYTES", 5000)
    tensors: list[content_digest.TensorDigest] = []
    while len(tensors) < len(table.tensors):
        part = content_digest.part_of_table(table, len(tensors))
        assert part["num_tensors"] == len(table.tensors)
        tensors += content_digest.decode_tensors(part["tensors"])
    assert build_table(tensors) == table
    assert content_digest.part_of_table(None, 0) == {"num_tensors": 0, "tensors": b""}
    with pytest.raises(ValueError, match="first must not be negative"):
        content_digest.part_of_table(table, -1)


def test_where_digests_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_DIGEST_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert digest_store.store_folder() == tmp_path / "ramet" / "digests"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert digest_store.store_folder() == tmp_path / "home" / ".cache" / "ramet" / "digests"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user whom nobody knows
    assert digest_store.store_folder().is_absolute() and "~" not in str(digest_store.store_folder())


def test_files_that_change_while_they_are_read_have_no_digest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    shard = next(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="have changed while they were read"):
        compute_table(str(tmp_path), lambda _nbytes: os.utime(shard))
    assert digest_store.find_table(str(tmp_path)) is None
