"""Owns what a client and a seed must agree on before weights move."""

import os
from collections.abc import Mapping

from ramet.srt.weights.manifest import WeightManifest, says_tied
from ramet.srt.weights.version import DEFAULT_VERSION


def find_disagreement(client: WeightManifest, seed: WeightManifest) -> str | None:
    """Why a client must not take a seed's weights, as far as names and numbers tell; None if nothing speaks against it.

    Layout and coverage are the planner's to judge. A client that names no version of the weights takes any.
    """
    for field in ("role", "quantization", "dtype"):
        ours, theirs = getattr(client, field), getattr(seed, field)
        if ours != theirs:
            return f"its {field} is {theirs or 'none'}, not {ours or 'none'}"
    for name, size in client.dimensions.items():
        # The planner can't tell: what a small model needs lies inside the tensors of a larger one.
        if seed.dimensions.get(name, size) != size:
            return f"its {name} is {seed.dimensions[name]}, not {size}"
    ours, theirs = says_tied(client), says_tied(seed)
    if ours is not None and theirs is not None and ours != theirs:
        return f"its output head is {_head(theirs)}, not {_head(ours)}"
    if client.revision and seed.revision and client.revision != seed.revision:
        return f"its revision is {seed.revision}, not {client.revision}"
    if client.weight_version not in (DEFAULT_VERSION, seed.weight_version):
        return f"its weight version is {seed.weight_version}, not {client.weight_version}"
    if client.model_name != seed.model_name and not is_folder_name(client, seed):
        return f"its model is {seed.model_name}, not {client.model_name}"
    return None


def find_other_head(client: WeightManifest, addresses: Mapping[str, int]) -> str | None:
    """Why a client whose output head is the embedding's table must not take the weights of a seed without a manifest.

    Args:
        addresses: of the seed's tensors, by their names. Upstream engines list a tied head once, or at one place.
    """
    head, embedding = addresses.get("lm_head.weight"), addresses.get("model.embed_tokens.weight")
    if not client.is_tied or head is None or embedding in (None, head):
        return None
    return f"its output head is {_head(False)}, not {_head(True)}"


def _head(is_tied: bool) -> str:
    return "the embedding's table" if is_tied else "a matrix of its own"


def is_folder_name(client: WeightManifest, seed: WeightManifest) -> bool:
    """Whether one side goes by a folder's name, which says nothing to the other."""
    names = (client.model_name, seed.model_name)
    return any(name.startswith((os.sep, ".", "~")) or os.path.isdir(name) for name in names)
