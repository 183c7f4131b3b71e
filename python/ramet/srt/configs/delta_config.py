"""Owns what a config says of layers with a gated delta net: their heads, and the convolution before them. No torch."""

from dataclasses import dataclass

from ramet.srt.configs.config_reader import ConfigReader

MOST_KERNEL = 16  # tokens that a convolution may see


@dataclass(frozen=True, kw_only=True)
class DeltaTraits:
    """Gated delta net (Yang et al., 2024): of all tokens before it, a head keeps one matrix [key_dim, value_dim].

    A key head has the queries and keys of `num_value_heads / num_key_heads` value heads, which are neighbours.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head, of queries and keys
    value_dim: int
    kernel_size: int  # tokens that the convolution before the heads sees, the newest included
    # The checkpoint has one matrix for queries, keys, values and gates, whose rows stand by key head; and one for the
    # numbers that say how much is written and forgotten.
    is_by_key_head: bool

    @property
    def values_per_key(self) -> int:
        """Value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes by their names in a config.json."""
        return {
            "linear_num_key_heads": self.num_key_heads,
            "linear_num_value_heads": self.num_value_heads,
            "linear_key_head_dim": self.key_dim,
            "linear_value_head_dim": self.value_dim,
            "linear_conv_kernel_dim": self.kernel_size,
        }


def read_delta(need: ConfigReader) -> DeltaTraits | None:
    """The linear layers of a family that has some.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    if not need.has("linear_num_key_heads"):
        return None
    num_key_heads, num_value_heads = need.integer("linear_num_key_heads"), need.integer("linear_num_value_heads")
    if num_value_heads % num_key_heads:
        raise need.wrong(
            "linear_num_value_heads", f"must be a multiple of linear_num_key_heads ({num_key_heads})", num_value_heads
        )
    return DeltaTraits(
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_dim=need.integer("linear_key_head_dim"),
        value_dim=need.integer("linear_value_head_dim"),
        kernel_size=need.integer("linear_conv_kernel_dim", minimum=2, maximum=MOST_KERNEL),
        is_by_key_head=need.family.delta_by_key_head,
    )
