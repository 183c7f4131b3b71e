"""Tensors that come one by one make what a load of the whole checkpoint makes, on every rank; or they are refused."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fp8_models
import packed_models
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.model_loader import tensor_stage
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.tensor_stage import RankPart, TensorStage
from safetensors.torch import load_file, save_file

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Rank:
    """One rank's part of a model, and a stage beside it."""

    def __init__(self, folder: Path, parallel: ParallelConfig | None = None, quantization: str | None = None) -> None:
        self.model = sm.build_model(folder, parallel or ParallelConfig(), quantization)
        self.serving = fp8_models.load_arena(folder, self.model)
        self.manifest = self.serving.manifest
        self.serving.publish()
        self.stage = TensorStage(self.serving, self.manifest, describe_whole_model(self.model.config, self.manifest))

    def put(self, tensors: Mapping[str, torch.Tensor | RankPart]) -> "Rank":
        for name, tensor in tensors.items():
            self.stage.put(name, tensor)
        return self

    def sealed(self) -> dict[str, str]:
        self.stage.seal()
        assert self.stage.arena.checksums == compute_checksums(self.manifest, self.stage.arena)
        return checksums(self.stage.arena)

    def loaded(self, folder: Path) -> dict[str, str]:
        """What there would be if this rank had loaded another checkpoint."""
        return checksums(fp8_models.load_arena(folder, self.model))


def checksums(arena: WeightArena) -> dict[str, str]:
    values = compute_checksums(arena.manifest, arena).values
    return dict(zip((entry.name for entry in arena.manifest.entries), values, strict=True))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def make_pair(folder: Path, family: str, **options: Any) -> list[Path]:
    return [rm.make_model(folder / str(seed), family, seed=seed, dtype="bfloat16", **options) for seed in (0, 1)]


def half_of(names: Iterable[str]) -> list[str]:
    """Some, so that matrices that are fused here come in part."""
    return sorted(names)[::2]


def mixture(old: Path, new: Path, names: Iterable[str], target: Path) -> Path:
    """The old model with the new one's tensors of some names."""
    rm.without_weights(old, target)
    chosen = tensors_of(new)
    save_file(tensors_of(old) | {name: chosen[name] for name in names}, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of a model with a tied head."""
    return make_pair(tmp_path_factory.mktemp("pair"), "llama3")


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama3", None),
        ("llama3", "fp8"),
        ("phi3", "fp8"),
        ("qwen3_moe", None),
        ("mixtral", "fp8"),
        ("qwen3_vl", None),
        ("qwen3_vl_moe", None),
        ("qwen3_vl_moe", "fp8"),
    ],  # fmt: skip
)
def test_what_comes_is_what_a_load_would_have(tmp_path: Path, family: str, quantization: str | None) -> None:
    """On two ranks; all tensors, and half of them on top of what serves."""
    old, new = make_pair(tmp_path, family)
    sent = tensors_of(new)
    names = half_of(sent)
    mixed = mixture(old, new, names, tmp_path / "mixed")
    for parallel in sm.all_ranks(2, 2 if "mo" in family else 1):
        rank = Rank(old, parallel, quantization).put(sent)
        assert rank.sealed() == rank.loaded(new) != checksums(rank.serving)
        assert rank.stage.num_bytes == sum(tensor.nbytes for tensor in sent.values())
        rank = Rank(old, parallel, quantization).put({name: sent[name] for name in names})
        assert rank.sealed() == rank.loaded(mixed)


@pytest.mark.parametrize("kind", ["rows", "tensor", "blocks", "mxfp8", "gptq", "awq"])
def test_quantised_tensors_come_as_they_are(tmp_path: Path, kind: str) -> None:
    """With all that belongs to a matrix; parts of it are refused in the end, plain ones at once."""
    plain = make_pair(tmp_path, "qwen2_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
                      shared_expert_intermediate_size=64)  # fmt: skip
    if kind in ("gptq", "awq"):
        made = packed_models.gptq() if kind == "gptq" else packed_models.awq()
        old, new = (packed_models.write(folder, tmp_path / f"{kind}{folder.name}", made)[0] for folder in plain)
    else:
        block = (1, 32) if kind == "mxfp8" else (16, 16)
        targets = [tmp_path / f"{kind}{folder.name}" for folder in plain]
        old, new = (fp8_models.write_fp8(*one, kind, block=block) for one in zip(plain, targets, strict=True))
    sent = tensors_of(new)
    for parallel in sm.all_ranks(2):
        rank = Rank(old, parallel).put(sent)
        assert rank.sealed() == rank.loaded(new)
    scales = next(name for name in sorted(sent) if "q_proj" in name and "scale" in name and "input" not in name)
    with pytest.raises(ValueError, match=r"came without .*q_proj.*: a quantised matrix is changed as a whole"):
        Rank(old).put({scales: sent[scales]}).sealed()
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="q_proj.weight is bfloat16|no tensor .*q_proj.weight"):
        Rank(old).put({name: tensors_of(plain[1])[name]})


def test_fp8_by_row_takes_what_is_quantised_already(pair: list[Path]) -> None:
    sent = {}
    for name, tensor in tensors_of(pair[1]).items():
        if fp8_models.QUANTISED.search(name):
            sent[name], sent[f"{name}_scale"] = quantize_rows(tensor)
        else:
            sent[name] = tensor
    rank = Rank(pair[0], quantization="fp8").put(sent)
    assert rank.sealed() == rank.loaded(pair[1])
    with pytest.raises(ValueError, match=f"{UP} came without {UP}_scale"):
        Rank(pair[0], quantization="fp8").put({UP: sent[UP]}).sealed()
    with pytest.raises(ValueError, match=f"{UP}_scale"):
        Rank(pair[0]).put({f"{UP}_scale": sent[f"{UP}_scale"]})


def test_fused_and_prefixed_names_are_understood(tmp_path: Path) -> None:
    """As engines call them, and as models for pictures hold them."""
    old, new = make_pair(tmp_path, "qwen2")
    sent = tensors_of(new)
    for layer in range(3):
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            folder, _, _ = fused.partition(".")
            for kind in ("weight", "bias") if folder == "self_attn" else ("weight",):
                names = [f"model.layers.{layer}.{folder}.{part}_proj.{kind}" for part in parts]
                sent[f"model.layers.{layer}.{fused}.{kind}"] = torch.cat([sent.pop(name) for name in names])
    sent["model.language_model.norm.weight"] = sent.pop("model.norm.weight")
    rank = Rank(old).put(sent)
    assert rank.sealed() == rank.loaded(new)


def test_packed_tensors_that_lie_side_by_side_are_taken_apart(tmp_path: Path) -> None:
    """And what says nothing of them is left out, if it says nothing."""
    plain = make_pair(tmp_path, "llama3", hidden_size=64, intermediate_size=64)
    old, new = (packed_models.write(one, tmp_path / f"p{one.name}", packed_models.gptq())[0] for one in plain)
    sent = tensors_of(new)
    for name in [name for name in sent if "q_proj" in name]:
        parts = [sent.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        fused = parts[0] if name.endswith("g_idx") else torch.cat(parts, dim=-1)
        sent[name.replace("q_proj", "qkv_proj")] = fused
    rank = Rank(old).put(sent)
    assert rank.sealed() == rank.loaded(new)
    groups = next(name for name in sent if "qkv_proj.g_idx" in name)
    with pytest.raises(ValueError, match="g_idx has columns in another order than their own"):
        Rank(old).put({groups: sent[groups].flip(0)})


def test_square_stacks_need_others_that_tell_how_they_lie(tmp_path: Path) -> None:
    old, new = make_pair(tmp_path, "qwen3_vl_moe", moe_intermediate_size=32)
    sent = tensors_of(new)
    square = {name: tensor for name, tensor in sent.items() if "gate_up_proj" in name}
    others = {name: tensor for name, tensor in sent.items() if "experts.down_proj" in name}
    assert {tensor.shape[1:] for tensor in square.values()} == {(64, 64)}
    rank = Rank(old).put(others | square)
    assert rank.sealed() == rank.loaded(mixture(old, new, others | square, tmp_path / "mixed"))
    with pytest.raises(ValueError, match="down_proj are transposed.* did not tell it: send .*down_proj first"):
        Rank(old).put(square | others)
    with pytest.raises(ValueError, match="gate_up_proj.*: nothing tells whether such square matrices are transposed"):
        Rank(old).put(square).sealed()


def test_a_rank_takes_what_it_holds_by_its_own_names(pair: list[Path]) -> None:
    """And nothing that other ranks hold, or that has come before."""
    parallel = sm.all_ranks(2)[1]
    other = fp8_models.load_arena(pair[1], sm.build_model(pair[1], parallel))
    parts = {entry.name: RankPart(other.tensor(entry)) for entry in other.manifest.entries}
    parts[HEAD] = parts.pop(EMBEDDING)  # the same one
    rank = Rank(pair[0], parallel).put(parts)
    assert rank.sealed() == rank.loaded(pair[1])
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    for part, words in (
        (
            torch.zeros(160, 128),
            rf"{qkv} is float32 of the shape \(160, 128\), this rank has it as bfloat16",
        ),
        (parts[qkv].tensor.to(torch.int16), "is int16 of the shape"),
        (parts[qkv].tensor, r"q_proj\.weight.* of .*qkv_proj\.weight has come before"),
    ):
        with pytest.raises(ValueError, match=words):
            rank.put({qkv: RankPart(part)})
    with pytest.raises(ValueError, match="this rank has no tensor model.layers.0.mlp.up_proj.weight"):
        rank.put({"model.layers.0.mlp.up_proj.weight": RankPart(torch.zeros(1))})


def test_ranks_that_get_parts_of_other_tensors_find_out(pair: Any) -> None:
    """Each has bytes of its own, so that names are all that can be compared."""
    told = []
    for parallel, num_parts in zip(sm.all_ranks(2) * 2, (3, 3, 3, 2), strict=True):
        rank = Rank(pair[0], parallel)
        other = fp8_models.load_arena(pair[1], rank.model)
        rank.put({entry.name: RankPart(other.tensor(entry)) for entry in other.manifest.entries[:num_parts]})
        told.append(rank.stage.received_digest)
    assert told[0] == told[1] == told[2] != told[3]


def bad(name: str, tensor: torch.Tensor, words: str) -> Any:
    return pytest.param({name: tensor}, words, id=words[:40])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        bad("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2), r"the model has no tensor model\.layers\.9\.mlp"),
        bad("model.layers.1.mlp.up_proj.bias", torch.zeros(2), r"no tensor model\.layers\.1\.mlp\.up_proj\.bias"),
        bad(UP, torch.zeros(208, 64), r"up_proj\.weight has the shape \(208, 64\), the model needs \(208, 128\)"),
        bad(UP, torch.zeros(104, 128), r"up_proj\.weight has the shape \(104, 128\)"),
        bad(UP, torch.zeros(208, 128, dtype=torch.int32), r"up_proj\.weight is int32; a weight must be one of float64"),
        bad(UP, torch.zeros(208, 128).to(torch.float8_e4m3fn), "up_proj.weight is float8_e4m3fn, but the model's"),
        bad(UP, torch.zeros(208, 128, dtype=torch.complex64), "unknown dtype 'complex64'"),
        bad(UP, torch.zeros(208, 128).to_sparse(), "up_proj.weight is a torch.sparse_coo tensor"),
        bad(UP, torch.zeros(208, 128, device="meta"), "up_proj.weight is a torch.strided tensor on meta"),
    ],
)
def test_what_has_no_place_is_refused_by_name(pair: list[Path], tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rank(pair[0]).put(tensors)


def test_a_tensor_comes_once(pair: list[Path]) -> None:
    sent = tensors_of(pair[1])[UP]
    with pytest.raises(ValueError, match=f"{UP} has come before"):
        Rank(pair[0]).put({UP: sent}).put({UP: sent})


def test_a_tied_head_may_come_with_its_embedding_alone(pair: list[Path]) -> None:
    table = tensors_of(pair[1])[EMBEDDING]
    expected = Rank(pair[0]).put({EMBEDDING: table}).sealed()
    assert Rank(pair[0]).put({HEAD: table, EMBEDDING: table}).sealed() == expected
    for sent in ({HEAD: table}, {EMBEDDING: table, HEAD: table + 1}):
        with pytest.raises(ValueError, match="lm_head.weight came, and is not what came as model.embed_tokens.weight"):
            Rank(pair[0]).put(sent).sealed()


def test_ranks_can_tell_whether_the_same_has_come_to_them(pair: list[Path]) -> None:
    """Whatever part of it they keep, in whatever order it came."""
    sent = {name: tensor for name, tensor in tensors_of(pair[1]).items() if name != EMBEDDING}
    first, second = (Rank(pair[0], parallel).stage for parallel in sm.all_ranks(2))
    for name in sent:
        first.put(name, sent[name])
    for name in reversed(sent):
        second.put(name, sent[name])
    assert first.received_digest == second.received_digest
    first.put(EMBEDDING, tensors_of(pair[1])[EMBEDDING])
    second.put(EMBEDDING, tensors_of(pair[1])[EMBEDDING] + 1)
    assert first.received_digest != second.received_digest


def test_views_and_wider_types_are_taken(pair: list[Path]) -> None:
    """A tensor that is no row-major memory, and one in float32, which is cast as at load."""
    sent = tensors_of(pair[1])
    expected = Rank(pair[0]).put({UP: sent[UP]}).sealed()
    turned = torch.empty(2 * 128, 208, dtype=torch.bfloat16)[::2].t()
    turned.copy_(sent[UP])
    for tensor in (turned, sent[UP].float()):
        assert Rank(pair[0]).put({UP: tensor}).sealed() == expected


@pytest.mark.parametrize("part", ["layers.1.mlp.gate_up", "layers.2.mlp.gate_up", "norm"])
def test_bytes_that_change_in_memory_are_found(pair: list[Path], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of what was sent, and of what was taken over."""
    rank = Rank(pair[0]).put({UP: tensors_of(pair[1])[UP]})
    wrong = next(entry for entry in rank.manifest.entries if part in entry.name)

    def harm_and_compute(manifest: Any, arena: WeightArena) -> Any:
        arena.tensor(wrong)[-1] += 1
        return compute_checksums(manifest, arena)

    monkeypatch.setattr(tensor_stage, "compute_checksums", harm_and_compute)
    with pytest.raises(ValueError, match=f"what stands in memory is not what was sent, or what served: {wrong.name}"):
        rank.stage.seal()
