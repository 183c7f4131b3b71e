"""Owns the flags about ranks and nodes."""

from dataclasses import dataclass

from ramet.srt.flags.flag import COUNT, SECONDS, flag

LOAD_BALANCE_METHODS = ("round_robin", "total_requests")


@dataclass(frozen=True, kw_only=True)
class ParallelFlags:
    """How an instance is spread."""

    tp_size: int = flag(
        1,
        "Tensor-parallel ranks: each holds a slice of every layer.",
        limit=COUNT,
        aliases=("--tensor-parallel-size", "--tp"),
    )
    pp_size: int = flag(
        1, "Pipeline stages: each holds a run of the layers.", limit=COUNT, aliases=("--pipeline-parallel-size", "--pp")
    )
    dp_size: int = flag(
        1, "Data-parallel replicas: each holds the whole model.", limit=COUNT, aliases=("--data-parallel-size", "--dp")
    )
    ep_size: int = flag(
        1,
        "Groups that the experts of a mixture-of-experts model are split over; divides --tp-size.",
        limit=COUNT,
        aliases=("--expert-parallel-size", "--ep"),
    )
    enable_dp_attention: bool = flag(
        False,
        "Split the tensor-parallel ranks into --dp-size groups that each hold all attention heads and the KV cache of "
        "their own requests; the other layers stay split over all ranks.",
    )
    load_balance_method: str = flag(
        "round_robin",
        "How requests are spread over the data-parallel replicas: in turn, or to the one with fewest running.",
        choices=LOAD_BALANCE_METHODS,
    )
    nnodes: int = flag(1, "Nodes that the instance runs on.", limit=COUNT)
    node_rank: int = flag(0, "This node's place among them; node 0 serves the users.")
    dist_init_addr: str | None = flag(None, "host:port on node 0 where the ranks of all nodes meet.")
    dist_timeout: float = flag(
        120.0,
        "Seconds that a node or rank may be late at the start, and that one operation between ranks may take.",
        limit=SECONDS,
    )
