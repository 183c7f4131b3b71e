"""Owns the server's configuration: what the flags must be together, and what follows from them for each owner."""

import functools
import json
import os
from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.load_config import NO_WEIGHTS, LoadConfig
from ramet.srt.configs.lora_config import DEFAULT_MAX_LORAS, DEFAULT_MAX_RANK, LoraConfig
from ramet.srt.configs.modelexpress_config import (
    ModelExpressConfig,
    embedded_port,
    parse_modelexpress_config,
    resolve_address,
)
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.configs.runner_config import REQUIRED, UNUSED, WANTED, RunnerConfig, WeightsConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.configs.weight_format import FORMATS
from ramet.srt.environ import default_profile_dir, envs
from ramet.srt.server_flags import DEVICE_DEFAULTS, ServerFlags, flag_name
from ramet.srt.utils.http_origin import ANY_HOST, is_host_name
from ramet.srt.utils.hub import canonical_given_name, canonical_model_name
from ramet.srt.utils.net import (
    SeedAddress,
    format_address,
    format_url,
    host_from_here,
    is_loopback,
    local_address,
    reachable_host,
    split_address,
)
from ramet.srt.weights.content_digest import parse_digest
from ramet.srt.weights.version import check_version

BACKLOG_TARGETS = 2.5  # that requests wait for a token while many prompts wait, where no target was given


@dataclass(frozen=True, kw_only=True)
class ServerArgs(ServerFlags):
    """Everything that can be said about how an instance runs. Validated when made, frozen after."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._validate_files()
        self._validate_task()
        self._validate_passes()
        self._validate_parallelism()
        self._validate_modelexpress()
        self._validate_remote_instance()
        self._validate_certificates()
        self._validate_keys()
        self._validate_allowed_hosts()
        self._validate_lora()

    def _validate_files(self) -> None:
        if not self.model_path:
            raise ValueError("--model-path must not be empty")
        if self.weights_digest is not None and self.load_format == "dummy":
            raise ValueError("--weights-digest and --load-format dummy contradict each other")
        if self.awaits_weights:
            self._validate_waiting()
        if self.weights_digest not in (None, "files"):
            parse_digest(str(self.weights_digest), "--weights-digest")
        check_version(self.weight_version, "--weight-version")
        if self.enable_weights_cpu_backup and not self.enable_memory_saver:
            raise ValueError("--enable-weights-cpu-backup needs --enable-memory-saver")
        if self.chat_template is not None and not os.path.isfile(self.chat_template):
            raise ValueError(f"--chat-template: there is no file {self.chat_template}")
        self.parser_config.check()

    def _validate_waiting(self) -> None:
        flag = "--checkpoint-engine-wait-weights-before-ready"
        others = {
            f"--load-format {self.load_format}": self.load_format not in ("auto", "dummy"),
            "--weights-digest": self.weights_digest is not None,
            "--lora-paths": bool(self.lora_paths),
        }
        for other, is_there in others.items():
            if is_there:
                raise ValueError(f"{flag} and {other} contradict each other")

    def _validate_task(self) -> None:
        if self.classifier_from_token is None:
            return
        if self.is_embedding:
            raise ValueError("--classifier-from-token and --is-embedding contradict each other")
        labels = self.classifier_labels
        if len(labels) != 2 or not all(labels) or labels[0] == labels[1]:
            raise ValueError(
                "--classifier-from-token must be two different tokens, joined by a comma; got "
                f"{self.classifier_from_token!r}"
            )

    def _validate_passes(self) -> None:
        if self.target_itl_ms and self.chunked_prefill_size == -1:
            raise ValueError("--target-itl-ms splits prompts, which --chunked-prefill-size -1 forbids")
        if self.schedule_low_priority_values_first and self.schedule_policy != "priority":
            raise ValueError("--schedule-low-priority-values-first needs --schedule-policy priority")

    def _validate_parallelism(self) -> None:
        if self.enable_dp_attention and (self.dp_size == 1 or self.tp_size % self.dp_size):
            raise ValueError(
                f"--enable-dp-attention needs a --dp-size above 1 that divides --tp-size; got {self.dp_size} and "
                f"{self.tp_size}"
            )
        if self.tp_size % self.ep_size:
            raise ValueError(f"--ep-size {self.ep_size} does not divide --tp-size {self.tp_size}")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"--node-rank must be from 0 to {self.nnodes - 1} (--nnodes); got {self.node_rank}")
        if self.world_size % self.nnodes:
            raise ValueError(
                f"{self.world_size} ranks (--tp-size {self.tp_size} x --pp-size {self.pp_size} x "
                f"{self.num_replicas} replicas) can't be spread evenly over --nnodes {self.nnodes}"
            )
        if self.dist_init_addr is not None:
            split_address(self.dist_init_addr, "--dist-init-addr")
        if self.nnodes == 1:
            return
        if self.dist_init_addr is None:
            raise ValueError("--nnodes above 1 needs --dist-init-addr host:port, the same on every node")
        if self.is_seed and self.engine_info_bootstrap_port == 0:
            raise ValueError("--engine-info-bootstrap-port 0 is for one node: others can't know which port it is")

    def _validate_modelexpress(self) -> None:
        is_backend = self.remote_instance_weight_loader_backend == "modelexpress"
        if is_backend and self.load_format != "remote_instance" and self.modelexpress is None:
            raise ValueError(
                "--remote-instance-weight-loader-backend modelexpress needs --load-format remote_instance, or "
                '--modelexpress-config with "source": true'
            )
        config = self.modelexpress
        if config is None:
            return
        if config.quantization not in (None, "", *FORMATS):
            raise ValueError(
                f'--modelexpress-config quantization must be one of {", ".join(FORMATS)}, or "" for none; '
                f"got {config.quantization!r}"
            )
        if not config.is_embedded:
            resolve_address(config.url)
        config.check_sizes(tp_size=self.tp_size, pp_size=self.pp_size, ep_size=self.ep_size)
        if config.is_embedded and self.nnodes > 1 and embedded_port(config.url) == 0:
            raise ValueError("--modelexpress-config url embedded:0 is for one node: others can't know which port it is")
        if self.load_format == "remote_instance" and not is_backend:
            raise ValueError(
                "--modelexpress-config with --load-format remote_instance needs "
                "--remote-instance-weight-loader-backend modelexpress"
            )
        if self.load_format != "remote_instance" and not (config.source or config.is_embedded):
            raise ValueError(
                '--modelexpress-config without "source": true needs --load-format remote_instance and '
                "--remote-instance-weight-loader-backend modelexpress"
            )

    def _validate_remote_instance(self) -> None:
        ip = self.remote_instance_weight_loader_seed_instance_ip
        port = self.remote_instance_weight_loader_seed_instance_service_port
        if self.load_format != "remote_instance" or self.modelexpress is not None:
            if ip is not None or port is not None:
                raise ValueError(
                    "--remote-instance-weight-loader-seed-instance-ip and -service-port need --load-format "
                    "remote_instance, and a backend other than modelexpress"
                )
            return
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(
                "--remote-instance-weight-loader-seed-instance-service-port must be a port number from 1 to "
                f"65535; got {port}"
            )
        self._validate_group_ports()
        if not self.seeds:
            raise ValueError(
                "--load-format remote_instance needs --remote-instance-weight-loader-seed-instance-ip and "
                "--remote-instance-weight-loader-seed-instance-service-port"
            )

    def _validate_certificates(self) -> None:
        if self.ssl_ca_certs is None:
            return
        import ssl  # hardly ever needed at a start

        try:
            ssl.create_default_context(cafile=self.ssl_ca_certs)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"--ssl-ca-certs: no certificates in {self.ssl_ca_certs}: {reason}") from None

    def _validate_keys(self) -> None:
        for flag, key in (("--api-key", self.api_key), ("--admin-api-key", self.admin_api_key)):
            if key is not None and (key != key.strip() or not key):  # "" would be every caller's
                raise ValueError(f"{flag} must not be empty, nor begin or end with white space")

    def _validate_allowed_hosts(self) -> None:
        for name in self.allowed_host_names:
            if name != ANY_HOST and not is_host_name(name):
                raise ValueError(
                    f"--allowed-hosts takes names and addresses, as in ui.example,10.0.0.9, or *; got {name!r}"
                )

    def _validate_lora(self) -> None:
        if not self.has_lora:
            for name in ("max_loras_per_batch", "max_lora_rank"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag_name(name)} needs --enable-lora")

    def _validate_group_ports(self) -> None:
        name = "--remote-instance-weight-loader-send-weights-group-ports"
        given = self.remote_instance_weight_loader_send_weights_group_ports
        if given is None:
            return
        if self.remote_instance_weight_loader_backend != "nccl":
            raise ValueError(f"{name} needs --remote-instance-weight-loader-backend nccl")
        ports = self.send_weights_group_ports
        if len(ports) != self.world_size or len(set(ports)) != len(ports):
            raise ValueError(f"{name} must have one port for each of the {self.world_size} ranks; got {given}")

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
        return self.served_model_name or self.model_path

    @property
    def has_http(self) -> bool:
        """Whether there is an HTTP server, as far as the ranks can tell: they see its real port."""
        return self.port != 0

    @property
    def weights_name(self) -> str:
        """The model's name among instances that share its weights: the same for all spellings of a folder."""
        given = self.modelexpress.model_name if self.modelexpress is not None else None
        name = given or self.served_model_name
        return canonical_given_name(name) if name else canonical_model_name(self.model_path)

    @property
    def authorities(self) -> set[str]:
        """host:port by which other instances may reach the HTTP server."""
        hosts = {host_from_here(self.host), reachable_host(self.host), self.head_host}
        return {format_address(host, self.port) for host in hosts}

    def url(self) -> str:
        """Where the HTTP server answers, for a caller on this host."""
        return format_url(host_from_here(self.host), self.port)

    def scheduler_config(self, device_type: str) -> SchedulerConfig:
        """What a replica's scheduler must know, on that kind of device ("cpu" or "cuda")."""
        defaults = DEVICE_DEFAULTS[device_type]
        target_itl_ms, most_itl_ms = self.target_itl_ms, self.target_itl_ms
        if target_itl_ms is None or most_itl_ms is None:  # nobody has said what users of this instance bear
            target_itl_ms, most_itl_ms = defaults.target_itl_ms, BACKLOG_TARGETS * defaults.target_itl_ms
        splits_prompts = self.chunked_prefill_size != -1
        return SchedulerConfig(
            max_running_requests=self.max_running_requests or defaults.max_running_requests,
            max_queued_requests=self.max_queued_requests,
            page_size=self.page_size,
            chunked_prefill_size=self.chunked_prefill_size or defaults.chunked_prefill_size,
            target_itl_s=target_itl_ms / 1000 if splits_prompts else 0.0,
            most_itl_s=most_itl_ms / 1000 if splits_prompts else 0.0,
            schedule_policy=self.schedule_policy,
            low_priority_values_first=self.schedule_low_priority_values_first,
            disable_radix_cache=self.disable_radix_cache,
            stream_interval=self.stream_interval,
            random_seed=self.random_seed,
            overlap=device_type == "cuda" and not self.disable_overlap_schedule,
            num_lora_slots=0 if self.lora_config is None else self.lora_config.max_loras_per_batch,
        )

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

    def load_config(self, *, dtype: str = "", quantization: str = "") -> LoadConfig:
        """What a rank's model loader must know.

        Args:
            dtype, quantization: the engine's real ones.
        """
        express = self.modelexpress
        names: dict[str, Any] = {}
        if express is not None:
            names = {
                "modelexpress_url": resolve_address(express.url),
                "modelexpress_model_name": self.weights_name,
                "modelexpress_tp_size": express.tp_size or self.tp_size,
                "modelexpress_pp_size": express.pp_size or self.pp_size,
                "modelexpress_ep_size": express.ep_size or self.ep_size,
                "modelexpress_dtype": express.dtype or dtype,
                "modelexpress_quantization": quantization if express.quantization is None else express.quantization,
                "modelexpress_wait_s": express.wait_timeout,
            }
        keys = [self.api_key]
        if self.remote_instance_weight_loader_backend != "modelexpress":
            # Who may publish at a metadata server decides whom an instance asks: that must not earn the admin key.
            keys.append(self.admin_api_key)
        is_forced_seed = self.load_format == "remote_instance" and not self.takes_weights_from_instances
        return LoadConfig(
            load_format=NO_WEIGHTS if self.awaits_weights else "auto" if is_forced_seed else self.load_format,
            random_seed=self.random_seed,
            seeds=self.seeds,
            backend=self.remote_instance_weight_loader_backend,
            send_weights_group_ports=self.send_weights_group_ports,
            local_mode=self.remote_instance_weight_loader_local_mode,
            fallback=self.remote_instance_weight_loader_fallback,
            timeout_s=self.remote_instance_weight_loader_timeout,
            host=self.host,
            ssl_ca_certs=self.ssl_ca_certs,
            api_keys=tuple(key for key in keys if key is not None),
            weights_digest=self.weights_digest.lower() if self.weights_digest else None,
            model_path=self.model_path,
            revision=self.revision,
            **names,
        )

    def runner_config(self, device_type: str, *, dtype: str, quantization: str) -> RunnerConfig:
        """What a rank's model runner must know, on that kind of device ("cpu" or "cuda").

        Args:
            dtype, quantization: the engine's real ones.
        """
        defaults = DEVICE_DEFAULTS[device_type]
        node_address = None if self.nnodes == 1 else local_address(self.dist_init_addr)
        # A loopback address is of no use to other nodes.
        weights_host = node_address if node_address is not None and is_loopback(self.host) else self.host
        return RunnerConfig(
            attention_backend=self.attention_backend,
            page_size=self.page_size,
            max_running_requests=self.max_running_requests or defaults.max_running_requests,
            max_prefill_tokens=self.scheduler_config(device_type).prefill_budget,
            max_total_tokens=self.max_total_tokens,
            mem_fraction_static=self.mem_fraction_static or defaults.mem_fraction_static,
            use_cuda_graph=not self.disable_cuda_graph,
            num_local_ranks=len(self.local_ranks),
            weights=WeightsConfig(
                name=self.weights_name,
                load=self.load_config(dtype=dtype, quantization=quantization),
                is_seed=self.is_seed,
                host=weights_host,
                control_host=node_address,
                admin_api_key=self.registration_key,
                is_published=self.modelexpress is not None,
                network=self.network_use(weights_host),
                check_interval_s=self.weights_check_interval,
                version=self.weight_version,
            ),
            lora=self.lora_config,
            can_sleep=self.enable_memory_saver,
            keeps_copy_room=self.enable_weights_cpu_backup,
        )
