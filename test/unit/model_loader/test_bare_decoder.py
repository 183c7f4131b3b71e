"""Names in checkpoints of a decoder without its output head, and of one that is a part of a model."""

from pathlib import Path

import pytest
import torch
from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.model_loader.checkpoint.safetensors_header import find_checkpoint_files, read_header
from safetensors.torch import save_file


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "layers.11.a", "norm.weight"])
def test_bare_names(name: str) -> None:
    assert whole_name(name) == f"model.{name}"
    assert whole_name(f"model.{name}") == f"model.{name}"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_a_part(name: str, whole: str) -> None:
    assert whole_name(name) == whole


@pytest.mark.parametrize(
    "name",
    [
        "language_model.norm.weight",
        "model.visual.norm.weight",
        "vision_tower.layers.0.a",
        "lm_head.weight",
        "normal.weight",
        "layers.a.b",
        "model.layers.0.norm.weight",
        "norm",
    ],
)
def test_other_names_stay(name: str) -> None:
    assert whole_name(name) == name


def test_headers_and_index_have_whole_names(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"norm.weight": "one.safetensors"}}')
    ((path, promised),) = find_checkpoint_files(str(tmp_path)).items()
    assert list(read_header(path)) == ["model.norm.weight"] == list(promised)


@pytest.mark.parametrize("other", ["norm.weight", "language_model.model.norm.weight"])
def test_a_tensor_in_both_spellings_is_refused(tmp_path: Path, other: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({other: torch.ones(3), "model.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"norm\.weight twice"):
        read_header(str(path))
