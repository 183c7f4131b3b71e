"""Owns how the load of an instance's replicas is written, for routers that spread requests over instances."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import ramet
from ramet.srt.managers.io_struct import GetInternalStateReqOutput


def replica_loads(states: Sequence[GetInternalStateReqOutput]) -> list[dict[str, Any]]:
    """The answer of /get_load: SGLang's older form."""
    return [
        {
            "dp_rank": rank,
            "num_reqs": state.num_running_reqs + state.num_waiting_reqs,
            "num_waiting_reqs": state.num_waiting_reqs,
            "num_tokens": state.num_used_tokens,
        }
        for rank, state in enumerate(states)
    ]


def all_loads(states: Sequence[GetInternalStateReqOutput], max_running_requests: int) -> dict[str, Any]:
    """The answer of /v1/loads.

    Args:
        max_running_requests: of each replica.
    """
    loads = [_load(rank, state, max_running_requests) for rank, state in enumerate(states)]

    def total(name: str) -> Any:
        return sum(load[name] for load in loads)

    def average(name: str) -> float:
        return total(name) / max(1, len(loads))

    return {
        "timestamp": datetime.now(UTC).isoformat(),
        "version": ramet.__version__,
        "dp_rank_count": len(loads),
        "loads": loads,
        "aggregate": {
            "total_running_reqs": total("num_running_reqs"),
            "total_waiting_reqs": total("num_waiting_reqs"),
            "total_reqs": total("num_total_reqs"),
            "total_used_tokens": total("num_used_tokens"),
            "avg_token_usage": average("token_usage"),
            "avg_throughput": average("gen_throughput"),
            "avg_utilization": average("utilization"),
        },
    }


def _load(rank: int, state: GetInternalStateReqOutput, max_running_requests: int) -> dict[str, Any]:
    return {
        "dp_rank": rank,
        "num_running_reqs": state.num_running_reqs,
        "num_waiting_reqs": state.num_waiting_reqs,
        "num_total_reqs": state.num_running_reqs + state.num_waiting_reqs,
        "num_used_tokens": state.num_used_tokens,
        "max_total_num_tokens": state.max_total_num_tokens,
        "token_usage": state.num_used_tokens / max(1, state.max_total_num_tokens),
        "gen_throughput": state.last_gen_throughput,
        "utilization": state.num_running_reqs / max_running_requests,
        "max_running_requests": max_running_requests,
    }
