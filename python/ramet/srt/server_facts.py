"""Owns what follows from the flags for everybody: sizes, names, addresses."""

import functools
import json
from dataclasses import dataclass

from ramet.srt.configs.lora_config import DEFAULT_MAX_LORAS, DEFAULT_MAX_RANK, LoraConfig
from ramet.srt.configs.modelexpress_config import ModelExpressConfig, parse_modelexpress_config
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.configs.runner_config import REQUIRED, UNUSED, WANTED
from ramet.srt.environ import default_profile_dir, envs
from ramet.srt.server_flags import ServerFlags
from ramet.srt.utils.hub import canonical_given_name, canonical_model_name
from ramet.srt.utils.net import (
    SeedAddress,
    format_address,
    format_url,
    host_from_here,
    is_loopback,
    reachable_host,
    split_address,
)


@dataclass(frozen=True, kw_only=True)
class ServerFacts(ServerFlags):
    """The flags, and what they mean."""

    @property
    def send_weights_group_ports(self) -> tuple[int, ...]:
        """The ports on the seed's host that were given, one for each rank; empty if none were.

        Raises:
            ValueError: if it is no list of ports.
        """
        given = self.remote_instance_weight_loader_send_weights_group_ports
        try:
            ports = json.loads(given or "[]")
        except ValueError:
            ports = None
        if not isinstance(ports, list) or not all(type(port) is int and 1 <= port <= 65535 for port in ports):
            raise ValueError(
                "--remote-instance-weight-loader-send-weights-group-ports must be a JSON list of port numbers; got "
                f"{given!r}"
            )
        return tuple(ports)

    @property
    def seeds(self) -> tuple[SeedAddress, ...]:
        """Where each seed instance is, in the order given.

        Raises:
            ValueError: if an address is malformed or lacks a port; the message names the flag.
        """
        given = self.remote_instance_weight_loader_seed_instance_ip or ""
        default_port = self.remote_instance_weight_loader_seed_instance_service_port
        seeds = []
        for text in filter(None, (part.strip() for part in given.split(","))):
            scheme, _, address = text.rpartition("://")
            if scheme not in ("", "http", "https"):
                raise ValueError(
                    "--remote-instance-weight-loader-seed-instance-ip must be host:port, or https://host:port; got "
                    f"{text!r}"
                )
            if address.count(":") == 1 or "]:" in address:
                host, port = split_address(address, "--remote-instance-weight-loader-seed-instance-ip")
            elif default_port is None:
                raise ValueError(
                    f"the seed {text} has no port: say {text}:PORT, or give "
                    "--remote-instance-weight-loader-seed-instance-service-port"
                )
            else:
                host, port = address.strip("[]"), default_port
            seeds.append(SeedAddress(host, port, scheme or "http"))
        return tuple(dict.fromkeys(seeds))

    @property
    def allowed_host_names(self) -> list[str]:
        """What --allowed-hosts lists."""
        return [name.strip() for name in (self.allowed_hosts or "").split(",") if name.strip()]

    @property
    def classifier_labels(self) -> list[str]:
        """What --classifier-from-token lists: the answer to an irrelevant document, and that to a relevant one."""
        return [] if self.classifier_from_token is None else self.classifier_from_token.split(",")

    @property
    def profile_root(self) -> str:
        """The folder of all traces."""
        return self.profile_dir or envs.RAMET_TORCH_PROFILER_DIR.get() or default_profile_dir()

    @property
    def names_profile_folder(self) -> bool:
        """Whether the operator has chosen it, so that callers may choose one below."""
        return bool(self.profile_dir or envs.RAMET_TORCH_PROFILER_DIR.get())

    @property
    def registration_key(self) -> str | None:
        """The key that registering weights needs: the strongest one there is."""
        return self.admin_api_key or self.api_key

    @property
    def is_seed(self) -> bool:
        """Whether the instance offers its weights: asked to, or grown out of another one."""
        return (
            self.remote_instance_weight_loader_start_seed_via_transfer_engine
            or self.load_format == "remote_instance"
            or self.modelexpress is not None
        )

    def network_use(self, host: str) -> str:
        """Whether other hosts may read the weights by a transfer engine, of an instance that offers them at `host`."""
        is_client = self.load_format == "remote_instance"
        backend = self.remote_instance_weight_loader_backend
        if self.remote_instance_weight_loader_start_seed_via_transfer_engine or self.modelexpress is not None:
            return WANTED if is_loopback(host) else REQUIRED
        if is_client and backend == "transfer_engine":
            is_asked_for = self.remote_instance_weight_loader_local_mode == "off" or not is_loopback(host)
            return WANTED if is_asked_for else UNUSED
        return UNUSED

    @functools.cached_property
    def modelexpress(self) -> ModelExpressConfig | None:
        """What is said about ModelExpress; None for an instance that has nothing to do with it.

        Raises:
            ValueError: if --modelexpress-config can't be used; the message names the key.
        """
        is_backend = self.remote_instance_weight_loader_backend == "modelexpress"
        if self.modelexpress_config is None and not (is_backend and self.load_format == "remote_instance"):
            return None
        return parse_modelexpress_config(self.modelexpress_config)

    @property
    def awaits_weights(self) -> bool:
        """Whether nothing is loaded, and an update brings the first weights."""
        return self.checkpoint_engine_wait_weights_before_ready

    @property
    def takes_weights_from_instances(self) -> bool:
        """Whether the files are only read when no other instance has the weights."""
        return self.load_format == "remote_instance" and not (self.modelexpress and self.modelexpress.source)

    @property
    def world_size(self) -> int:
        """Number of ranks of the instance, over all nodes."""
        return self.tp_size * self.pp_size * self.num_replicas

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """How many ranks there are, and what each is for: what ranks that have met can't change any more."""
        return (self.tp_size, self.pp_size, self.ep_size, self.num_replicas, self.attn_dp_size)

    @property
    def num_replicas(self) -> int:
        """Whole copies of the model, each with a scheduler of its own."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def attn_dp_size(self) -> int:
        """Groups that the tensor-parallel ranks are split into for the attention layers."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def local_ranks(self) -> range:
        """World ranks that run on this node."""
        count = self.world_size // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)

    def gpu_id(self, world_rank: int) -> int:
        """The GPU of this node that a rank takes, if it takes one."""
        return self.base_gpu_id + self.local_ranks.index(world_rank)

    @property
    def head_host(self) -> str:
        """Host of node 0, as the ranks of this node reach it."""
        if self.nnodes == 1 or self.dist_init_addr is None:
            return host_from_here(self.host)
        return split_address(self.dist_init_addr, "--dist-init-addr")[0]

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All of its names; answers have the one that was asked for."""
        return tuple(dict.fromkeys(self.served_model_name)) or (self.model_path,)

    @property
    def has_http(self) -> bool:
        """Whether there is an HTTP server, as far as the ranks can tell: they see its real port."""
        return self.port != 0

    @property
    def weights_name(self) -> str:
        """The model's name among instances that share its weights: the same for all spellings of a folder."""
        given = self.modelexpress.model_name if self.modelexpress is not None else None
        name = given or next(iter(self.served_model_name), None)
        return canonical_given_name(name) if name else canonical_model_name(self.model_path)

    @property
    def scheme(self) -> str:
        """By which the HTTP server is reached."""
        return "http" if self.ssl_certfile is None else "https"

    @property
    def authorities(self) -> set[str]:
        """host:port by which other instances may reach the HTTP server."""
        hosts = {host_from_here(self.host), reachable_host(self.host), self.head_host}
        return {format_address(host, self.port) for host in hosts}

    def url(self) -> str:
        """Where the HTTP server answers, for a caller on this host."""
        return format_url(host_from_here(self.host), self.port, self.scheme)

    @property
    def has_lora(self) -> bool:
        """Whether there may be adapters."""
        return self.enable_lora or bool(self.lora_paths)

    @property
    def lora_config(self) -> LoraConfig | None:
        """What is to be known of adapters; None if there are none."""
        if not self.has_lora:
            return None
        return LoraConfig(
            max_loras_per_batch=self.max_loras_per_batch or DEFAULT_MAX_LORAS,
            max_lora_rank=self.max_lora_rank or DEFAULT_MAX_RANK,
        )

    @property
    def parser_config(self) -> ParserConfig:
        """Which parsers read what the model writes."""
        return ParserConfig(tool_call_parser=self.tool_call_parser, reasoning_parser=self.reasoning_parser)
