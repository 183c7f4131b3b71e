"""Owns what a model loader needs to know: where weights come from and what to do when they don't come."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ramet.srt.configs.modelexpress_config import resolve_address

if TYPE_CHECKING:
    from ramet.srt.server_args import ServerArgs


class Board(Protocol):
    """Where world rank 0 leaves word for the other ranks of its instance; any thread may use it."""

    def announce(self, key: str, value: str) -> None: ...

    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        """The value; None if there is none in time."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """The instance that the weights are for."""

    instance_url: str = ""  # as others reach its HTTP server; "" if it has none
    started_at: float = 0.0  # unix seconds
    board: Board | None = None  # None for an instance of one rank


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
    api_keys: tuple[str, ...] = ()  # the instances of a fleet share one: a seed with a key wants to see it
    model_path: str = ""  # folder or hub id of the files, where they have not been fetched yet
    revision: str | None = None
    # ModelExpress: where the metadata server is, and what the weights go by there
    modelexpress_url: str | None = None  # None: the instance has nothing to do with ModelExpress
    modelexpress_model_name: str = ""
    modelexpress_tp_size: int = 1
    modelexpress_pp_size: int = 1
    modelexpress_ep_size: int = 1
    modelexpress_dtype: str = ""
    modelexpress_quantization: str = ""
    modelexpress_wait_s: float = 600.0  # for a source that is starting, or for whoever reads the files

    @classmethod
    def from_server_args(cls, args: "ServerArgs", *, dtype: str = "", quantization: str = "") -> "LoadConfig":
        """
        Args:
            dtype, quantization: the engine's real ones.
        """
        express = args.modelexpress
        names: dict[str, Any] = {}
        if express is not None:
            names = {
                "modelexpress_url": resolve_address(express.url),
                "modelexpress_model_name": args.weights_name,
                "modelexpress_tp_size": express.tp_size or args.tp_size,
                "modelexpress_pp_size": express.pp_size or args.pp_size,
                "modelexpress_ep_size": express.ep_size or args.ep_size,
                "modelexpress_dtype": express.dtype or dtype,
                "modelexpress_quantization": quantization if express.quantization is None else express.quantization,
                "modelexpress_wait_s": express.wait_timeout,
            }
        keys = [args.api_key]
        if args.remote_instance_weight_loader_backend != "modelexpress":
            # Who may publish at a metadata server decides whom an instance asks: that must not earn the admin key.
            keys.append(args.admin_api_key)
        is_forced_seed = args.load_format == "remote_instance" and not args.takes_weights_from_instances
        return cls(
            load_format="auto" if is_forced_seed else args.load_format,
            random_seed=args.random_seed,
            seeds=args.seeds,
            backend=args.remote_instance_weight_loader_backend,
            send_weights_group_ports=args.send_weights_group_ports,
            local_mode=args.remote_instance_weight_loader_local_mode,
            fallback=args.remote_instance_weight_loader_fallback,
            timeout_s=args.remote_instance_weight_loader_timeout,
            host=args.host,
            api_keys=tuple(key for key in keys if key is not None),
            model_path=args.model_path,
            revision=args.revision,
            **names,
        )
