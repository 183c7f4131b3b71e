"""Owns a rank's parallel coordinates and the numbers derived from them; knows nothing of process groups."""

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ramet.srt.configs.model_config import ModelConfig

MAX_RANKS = 1 << 16  # of an instance, also of one that another host tells of


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the instance's parallel dimensions and this rank's place in each of them.

    Expert parallelism splits the tensor-parallel group: its `ep_size` runs of neighbouring ranks each hold
    a part of the experts, and the ranks of a run split these experts' matrices. Data-parallel attention splits it
    for the attention layers: each of its `attn_dp_size` runs has all heads, and computes other sequences.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    attn_dp_size: int = 1

    def __post_init__(self) -> None:
        for dimension in ("tp", "pp", "dp", "ep"):
            size = getattr(self, f"{dimension}_size")
            rank = getattr(self, f"{dimension}_rank")
            if not 1 <= size <= MAX_RANKS:
                raise ValueError(f"{dimension}_size must be at least 1 and at most {MAX_RANKS}, got {size}")
            if not 0 <= rank < size:
                raise ValueError(f"{dimension}_rank must be in [0, {size}), got {rank}")
        if self.tp_size % self.ep_size:
            raise ValueError(f"ep_size {self.ep_size} does not divide tp_size {self.tp_size}")
        if self.world_size > MAX_RANKS:
            raise ValueError(f"an instance has at most {MAX_RANKS} ranks, not {self.world_size}")
        if self.attn_dp_size < 1 or self.tp_size % self.attn_dp_size:
            raise ValueError(f"attn_dp_size {self.attn_dp_size} does not divide tp_size {self.tp_size}")
        if self.ep_rank != self.tp_rank // self.moe_tp_size:
            raise ValueError(
                f"tp_rank {self.tp_rank} of {self.tp_size} has ep_rank {self.tp_rank // self.moe_tp_size} "
                f"of {self.ep_size}, not {self.ep_rank}"
            )

    @property
    def moe_tp_size(self) -> int:
        """Number of ranks that share the matrices of one expert."""
        return self.tp_size // self.ep_size

    @property
    def moe_tp_rank(self) -> int:
        """The rank's place among those that share its experts' matrices."""
        return self.tp_rank % self.moe_tp_size

    @property
    def attn_dp_rank(self) -> int:
        """Which of the tensor-parallel group's attention groups the rank is in."""
        return self.tp_rank // (self.tp_size // self.attn_dp_size)

    @property
    def attention(self) -> "ParallelConfig":
        """How the attention layers are split: over the ranks of one attention group."""
        size = self.tp_size // self.attn_dp_size
        return ParallelConfig(tp_size=size, tp_rank=self.tp_rank % size)

    @classmethod
    def of_rank(
        cls,
        world_rank: int,
        *,
        tp_size: int = 1,
        pp_size: int = 1,
        dp_size: int = 1,
        ep_size: int = 1,
        attn_dp_size: int = 1,
    ) -> "ParallelConfig":
        """The coordinates of a world rank: tensor-parallel ranks are neighbours, then stages, then replicas."""
        shard_rank, tp_rank = divmod(world_rank, tp_size)
        dp_rank, pp_rank = divmod(shard_rank, pp_size)
        return cls(
            tp_size=tp_size,
            tp_rank=tp_rank,
            pp_size=pp_size,
            pp_rank=pp_rank,
            dp_size=dp_size,
            dp_rank=dp_rank,
            ep_size=ep_size,
            ep_rank=tp_rank // (tp_size // ep_size),
            attn_dp_size=attn_dp_size,
        )

    def layer_range(self, num_layers: int) -> range:
        """The layers of this rank's pipeline stage."""
        count = num_layers // self.pp_size
        return range(self.pp_rank * count, (self.pp_rank + 1) * count)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def leader_rank(self) -> int:
        """World rank of the rank that schedules for this one's replica: its first."""
        return self.dp_rank * self.pp_size * self.tp_size

    @property
    def sampling_rank(self) -> int:
        """World rank of the rank that chooses the tokens of this one's replica: the first of the last stage."""
        return self.leader_rank + (self.pp_size - 1) * self.tp_size

    @property
    def replica_ranks(self) -> range:
        """World ranks of this rank's replica."""
        return range(self.leader_rank, self.leader_rank + self.pp_size * self.tp_size)

    @property
    def shard_rank(self) -> int:
        """The rank's place in one replica: what ModelExpress calls worker_rank."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_rank(self) -> int:
        """The rank's place in its instance."""
        return self.dp_rank * self.pp_size * self.tp_size + self.shard_rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the instance."""
        return self.dp_size * self.pp_size * self.tp_size


def check_parallel_sizes(
    config: "ModelConfig", *, tp_size: int, pp_size: int, ep_size: int, attn_dp_size: int = 1
) -> None:
    """Find out whether a model can be split so, before anything is started.

    Raises:
        ValueError: if a dimension of the model does not divide; the message says which and by what.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attn_tp_size = tp_size // attn_dp_size
    what = f"--tp-size {tp_size}" if attn_dp_size == 1 else f"--tp-size {tp_size} / --dp-size {attn_dp_size}"
    if heads % attn_tp_size:
        raise ValueError(f"{what} does not divide the model's {heads} attention heads")
    if kv_heads % attn_tp_size and attn_tp_size % kv_heads:
        raise ValueError(f"{what} is neither a divisor nor a multiple of {kv_heads} key/value heads")
    delta = config.traits.delta
    if delta is not None and delta.num_key_heads % attn_tp_size:
        raise ValueError(f"{what} does not divide the {delta.num_key_heads} key heads of the model's linear layers")
    if config.traits.qk_norm == "all" and 1 < attn_tp_size < tp_size:
        raise ValueError(
            f"{config.architecture} norms all heads together: with --enable-dp-attention each rank must have all of "
            f"them, so --dp-size must be {tp_size}, as --tp-size is"
        )
    has_mlp = config.moe is None or not all(config.moe.sparse_layers)
    if has_mlp and config.intermediate_size % tp_size:
        raise ValueError(f"--tp-size {tp_size} does not divide the intermediate size {config.intermediate_size}")
    if config.num_hidden_layers % pp_size:
        raise ValueError(f"--pp-size {pp_size} does not divide the model's {config.num_hidden_layers} layers")
    if config.moe is not None:
        config.moe.check_split(tp_size, ep_size)
    elif ep_size > 1:
        raise ValueError(f"--ep-size {ep_size} is for models with experts; {config.architecture} has none")
