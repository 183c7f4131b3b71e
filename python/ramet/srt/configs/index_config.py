"""Owns what a config says of a sparse index: its sizes, and which layers have one of their own. No torch."""

from dataclasses import dataclass

from ramet.srt.configs.config_reader import ConfigReader

INDEXED = "indexed_attention"  # the only type of layer that families with an index have
_PATTERN = {"F": "full", "S": "shared"}


@dataclass(frozen=True, kw_only=True)
class IndexTraits:
    """A sparse index (DeepSeek-V3.2, 2025): it scores all keys before a query, which attends to the best ones alone."""

    num_heads: int
    head_dim: int  # columns of its queries, and of the one key of each token; the first ones rotate
    top_k: int  # keys that a query attends to; one with no more attends to all
    is_interleaved: bool  # the columns of a pair that rotates are neighbours, whatever they are in the attention itself

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes by their names in a config.json."""
        return {"index_n_heads": self.num_heads, "index_head_dim": self.head_dim, "index_topk": self.top_k}


def read_index(need: ConfigReader, rope_dim: int) -> IndexTraits | None:
    """The index, of a family that has one.

    Args:
        rope_dim: columns that rotate.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    if not need.has("index_topk"):
        return None
    head_dim = need.integer("index_head_dim")
    if head_dim < rope_dim:
        raise need.wrong("index_head_dim", f"must be at least 'qk_rope_head_dim' ({rope_dim})", head_dim)
    return IndexTraits(
        num_heads=need.integer("index_n_heads"),
        head_dim=head_dim,
        top_k=need.integer("index_topk"),
        is_interleaved=need.family.is_index_interleaved,
    )


def read_index_owners(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have an index of their own; each other one attends to what the last such one before it has chosen.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    if not need.has("index_topk"):
        return (False,) * num_layers
    if not need.has("indexer_types"):
        return (True,) * num_layers
    every, first = need.integer("index_topk_freq"), need.integer("index_skip_topk_offset", minimum=0)
    name = "index_topk_pattern" if need.value("indexer_types") is None else "indexer_types"
    kinds = need.value(name)
    need.take("index_topk_pattern")
    if kinds is None:
        owners = tuple(max(index - first + 1, 0) % every == 0 for index in range(num_layers))
        if not owners[0]:
            raise need.wrong("index_skip_topk_offset", "must leave the first layer its index", first)
        return owners
    if name == "index_topk_pattern" and isinstance(kinds, str):
        kinds = [_PATTERN.get(letter) for letter in kinds]
    if (
        not isinstance(kinds, list)
        or len(kinds) < num_layers
        or any(kind not in _PATTERN.values() for kind in kinds)
        or kinds[0] != "full"
    ):
        raise need.wrong(name, "must give full or shared for each layer, and full for the first", need.value(name))
    return tuple(kind == "full" for kind in kinds[:num_layers])
