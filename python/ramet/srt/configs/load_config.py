"""Owns what a model loader needs to know: where weights come from and what to do when they don't come."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ramet.srt.server_args import ServerArgs


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """The part of ServerArgs that decides how a rank's arena is filled; validated there."""

    load_format: str = "auto"
    random_seed: int = 0  # of dummy weights
    seeds: tuple[tuple[str, int], ...] = ()  # host and HTTP port of each instance that weights may come from
    backend: str = "transfer_engine"  # the transport for weights from another host
    send_weights_group_ports: tuple[int, ...] = ()  # on the seed's host, one for each rank; free ones when empty
    local_mode: str = "auto"  # "map", "copy", "off", or "auto": map where possible
    fallback: str = "disk"  # what follows when no seed could give the weights: "disk" or "error"
    timeout_s: float = 60.0  # for a seed to answer, and for a transfer without progress
    host: str = "127.0.0.1"  # address of this instance, for the transfer engine
    api_key: str | None = None  # the instances of a fleet share it: a seed with a key wants to see it

    @classmethod
    def from_server_args(cls, args: "ServerArgs") -> "LoadConfig":
        return cls(
            load_format=args.load_format,
            random_seed=args.random_seed,
            seeds=args.seeds,
            backend=args.remote_instance_weight_loader_backend,
            send_weights_group_ports=args.send_weights_group_ports,
            local_mode=args.remote_instance_weight_loader_local_mode,
            fallback=args.remote_instance_weight_loader_fallback,
            timeout_s=args.remote_instance_weight_loader_timeout,
            host=args.host,
            api_key=args.api_key,
        )
