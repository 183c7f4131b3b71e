"""Owns what a model loader needs to know: where weights come from and what to do when they don't come."""

from dataclasses import dataclass
from typing import Protocol

from ramet.srt.utils.net import SeedAddress


class Board(Protocol):
    """Where world rank 0 leaves word for the other ranks of its instance; any thread may use it."""

    def announce(self, key: str, value: str) -> None: ...

    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        """The value; None if there is none in time."""
        ...


NO_WEIGHTS = "none"  # the load format of an instance whose first weights come by an update


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """The instance that the weights are for."""

    instance_url: str = ""  # as others reach its HTTP server; "" if it has none
    started_at: float = 0.0  # unix seconds
    board: Board | None = None  # None for an instance of one rank


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a rank's arena is filled. Made by ServerArgs.load_config, where the values were validated."""

    load_format: str = "auto"
    random_seed: int = 0  # of dummy weights
    seeds: tuple[SeedAddress, ...] = ()
    backend: str = "transfer_engine"  # the transport for weights from another host
    send_weights_group_ports: tuple[int, ...] = ()  # on the seed's host, one for each rank; free ones when empty
    local_mode: str = "auto"  # "map", "copy", "off", or "auto": map where possible
    fallback: str = "disk"  # what follows when no seed could give the weights: "disk" or "error"
    timeout_s: float = 60.0  # for a seed to answer, and for a transfer without progress
    host: str = "127.0.0.1"  # address of this instance, for the transfer engine
    http_port: int = 0  # of this instance's HTTP server, by which others report it; 0: it has none
    ssl_ca_certs: str | None = None  # file with the certificates that https servers are verified with; None: system's
    api_keys: tuple[str, ...] = ()  # the instances of a fleet share one: a seed with a key wants to see it
    shows_keys: bool = True  # to seeds; False where a stranger may have named them, who then sees a proof alone
    weights_digest: str | None = None  # that weights must have: 64 hex digits, or "files": that of the own files
    is_update: bool = False  # other weights than those of the own files are wanted
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

    @property
    def reads_files(self) -> bool:
        """Whether the weights come from files and nothing else."""
        return self.load_format in ("auto", "safetensors")
