"""Owns what a config says of latent attention: the ranks and columns of its products. No torch."""

from dataclasses import dataclass

from ramet.srt.configs.config_reader import ConfigReader
from ramet.srt.configs.index_config import IndexTraits, read_index


@dataclass(frozen=True, kw_only=True)
class LatentTraits:
    """Latent attention (DeepSeek-V2, 2024): of each token one row is kept, from which all heads' keys and values come.

    The row has `kv_rank` columns and `rope_dim` that rotate.
    """

    q_rank: int | None  # of the queries' own product of two matrices; None: they are one matrix
    kv_rank: int
    nope_dim: int  # columns of a head's queries and keys that don't rotate
    rope_dim: int  # and behind them those that do, of which all heads have the same keys
    value_dim: int  # of a head
    is_interleaved: bool  # the columns of a pair that rotates are neighbours, not half a head apart
    index: IndexTraits | None = None  # of the keys that a query attends to; None: it attends to all

    @property
    def query_dim(self) -> int:
        """Columns of a head's queries."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Columns that are kept of each token."""
        return self.kv_rank + self.rope_dim

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes by their names in a config.json."""
        sizes = {
            "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
        }
        if self.index is not None:
            sizes |= self.index.dimensions
        return sizes if self.q_rank is None else {"q_lora_rank": self.q_rank, **sizes}


def read_latent(need: ConfigReader, num_heads: int) -> LatentTraits | None:
    """Latent attention, of a family that has it.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    if not need.has("kv_lora_rank"):
        return None
    rope_dim = need.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise need.wrong("qk_rope_head_dim", "must be an even number", rope_dim)
    latent = LatentTraits(
        q_rank=need.optional_integer("q_lora_rank"),
        kv_rank=need.integer("kv_lora_rank"),
        nope_dim=need.integer("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=need.integer("v_head_dim"),
        is_interleaved=need.flag("rope_interleave") or need.family.always_interleaved,
        index=read_index(need, rope_dim),
    )
    if latent.index is not None and latent.q_rank is None:
        raise need.wrong("q_lora_rank", "must be a positive integer, as the index takes queries of that rank", None)
    # What the classes derive, and write into configs.
    for name, size in (("head_dim", rope_dim), ("qk_head_dim", latent.query_dim)):
        need.take(name)
        if name in need.config and need.config[name] != size:
            raise need.wrong(name, f"must be {size}, which follows from the other sizes", need.config[name])
    num_kv_heads = need.optional_integer("num_key_value_heads")
    if num_kv_heads not in (None, num_heads):
        raise need.wrong("num_key_value_heads", f"must be num_attention_heads ({num_heads})", num_kv_heads)
    return latent
