"""Owns a rank's parallel coordinates and the numbers derived from them; knows nothing of process groups."""

import msgspec


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the instance's parallel dimensions and this rank's place in each of them.

    Expert parallelism splits the tensor-parallel group: its `ep_size` runs of neighbouring ranks each hold
    a part of the experts, and the ranks of a run split these experts' matrices.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0

    def __post_init__(self) -> None:
        for dimension in ("tp", "pp", "dp", "ep"):
            size = getattr(self, f"{dimension}_size")
            rank = getattr(self, f"{dimension}_rank")
            if size < 1:
                raise ValueError(f"{dimension}_size must be at least 1, got {size}")
            if not 0 <= rank < size:
                raise ValueError(f"{dimension}_rank must be in [0, {size}), got {rank}")
        if self.tp_size % self.ep_size:
            raise ValueError(f"ep_size {self.ep_size} does not divide tp_size {self.tp_size}")
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
